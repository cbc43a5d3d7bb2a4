"""Processes that stream the same model have one copy of it together, whoever is killed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from packing_workers import ALL
from share_workers import LINUX, ROOT, Worker, an_address, memory_files, until
from weightstream.streaming import SharingError
from weightstream.streaming.memory.packed_drafts import PLACES
from weightstream.streaming.sharing.share import ask_status

pytestmark = [LINUX, pytest.mark.slow]

PACKED_PATCHES = {"blocks.1.qkv.weight": 2.0, "blocks.3.out.weight": 0.5}
EVERYWHERE = {f"blocks.{block}.{part}.weight": 0.25 for block in range(4) for part in ("qkv", "out", "mlp.0", "mlp.2")}
PATCHED = {"blocks.1.qkv.weight": 2.0, "blocks.4.out.weight": 0.5}

Start = Callable[[str | None], Worker]


@pytest.fixture
def address() -> Iterator[str]:
    """That of a broker in a process of its own."""
    address = an_address()
    broker = subprocess.Popen([sys.executable, "-m", "streaming", "share", address], cwd=ROOT)
    BROKERS[address] = broker
    until(lambda: answers(address))
    yield address
    broker.kill()
    broker.wait(60)
    del BROKERS[address]


BROKERS: dict[str, subprocess.Popen[bytes]] = {}


def answers(address: str) -> bool:
    try:
        return bool(ask_status(address))
    except SharingError:
        return False


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts workers, and ends them."""
    workers: list[Worker] = []

    def begin(address: str | None) -> Worker:
        workers.append(Worker(tmp_path, address))
        return workers[-1]

    yield begin
    for worker in workers:
        if worker.process.poll() is None:
            worker.kill()


def test_two_processes_have_the_model_once(address: str, start: Start) -> None:
    alone, first, second = (start(where) for where in (None, address, address))
    for worker in (alone, first, second):
        outputs = worker.start()
        outputs += worker.ask("run", steps=2)
        assert set(outputs) == {worker.ask("plain")}
    own, one, two = (worker.ask("figures") for worker in (alone, first, second))
    nbytes = one["shared"]
    assert (own["built"], own["taken"], own["shared"], own["mapped"], own["reason"]) == (0, 0, 0, 0, "")
    assert nbytes > 0.9 * one["streamed"]
    assert (one["taken"], two["built"], two["shared"]) == (0, 0, nbytes)
    assert one["built"] == two["taken"] == one["mapped"] == two["mapped"]
    assert {each["staged"] for each in (own, one, two)} == {0}
    assert one["locked"] == two["locked"] == own["locked"], "each has locked as much as one alone"
    found = ask_status(address)
    assert (found["copies"], found["bytes"]) == (one["built"], nbytes), "and all of them together have it once"
    assert {each["process"] for each in found["workers"]} == {first.process.pid, second.process.pid}
    # A LoRA in one of them: the rest stays shared, and what differs is that one's own.
    second.ask("load", strengths=PATCHED, known=False)
    assert set(second.ask("run", steps=3)) == {second.ask("plain", strengths=PATCHED)}
    patched = second.ask("figures")
    assert patched["mapped"] == two["mapped"] - len(PATCHED)
    assert 0 < patched["shared"] < nbytes
    assert set(first.ask("run", steps=2)) == {first.ask("plain")}
    # Killed, one after the other: with the last one everything is gone.
    first.kill()
    until(lambda: ask_status(address)["copies"] == patched["mapped"])
    assert set(second.ask("run", steps=2)) == {second.ask("plain", strengths=PATCHED)}
    second.kill()
    until(lambda: ask_status(address)["copies"] == 0)
    assert memory_files(BROKERS[address].pid) == 0


def test_a_builder_that_is_killed_half_way_leaves_nothing(address: str, start: Start) -> None:
    first, second = start(address), start(address)
    first.ask("open")
    first.ask("hang_at_write", number=7)
    first.ask("load")
    first.tell("run", steps=3)
    assert first.hear() == "hangs"
    until(lambda: ask_status(address)["building"] > 0)
    assert set(second.start()) == {second.ask("plain")}, "nobody waits"
    waiting = second.ask("figures")
    assert waiting["staged"] > 0
    assert waiting["taken"] > 0
    first.kill()
    until(lambda: ask_status(address)["building"] == 0)
    assert set(second.ask("run", steps=2)) == {second.ask("plain")}
    figures = second.ask("figures")
    assert (figures["staged"], figures["mapped"]) == (0, figures["built"] + figures["taken"])
    second.ask("close")
    until(lambda: ask_status(address)["copies"] == 0)
    assert memory_files(BROKERS[address].pid) == 0


def test_a_broker_that_is_killed_takes_nothing_away(address: str, start: Start) -> None:
    first, second = start(address), start(address)
    for worker in (first, second):
        assert set(worker.start()) == {worker.ask("plain")}
    BROKERS[address].kill()
    BROKERS[address].wait(60)
    for strengths in (None, PATCHED, None):
        for worker in (first, second):
            worker.ask("load", strengths=strengths)
            assert set(worker.ask("run", steps=2)) == {worker.ask("plain", strengths=strengths)}
    for worker in (first, second):
        figures = worker.ask("figures")
        assert "the broker" in figures["reason"]
        assert (figures["staged"], figures["mapped"]) == (0, figures["built"] + figures["taken"] - len(PATCHED))
        worker.ask("close")
        assert worker.ask("figures")["mapped"] == 0


def test_two_processes_have_the_packed_model_once(address: str, start: Start) -> None:
    alone, first, second = (start(where) for where in (None, address, address))
    for worker in (alone, first, second):
        worker.ask("open_packing")
        assert set(worker.ask("prompt")) == {worker.ask("plain")}
    own, one, two = (worker.ask("figures") for worker in (alone, first, second))
    assert [worker.ask("packing") for worker in (alone, first, second)] == [
        {"shared": 0, "own": ALL, "measured": ALL},
        {"shared": ALL, "own": 0, "measured": ALL},
        {"shared": ALL, "own": 0, "measured": 0},
    ]
    nbytes = one["shared"]
    assert two["shared"] == nbytes > 0.9 * one["streamed"]
    found = ask_status(address)
    assert (found["copies"], found["bytes"], found["building"]) == (one["mapped"], nbytes, 0)
    machine = nbytes + sum(each["locked"] - each["shared"] for each in (one, two))
    assert machine <= 1.05 * own["locked"], "both together have locked what one alone has"
    # A LoRA in one of them, then the same one in the other: what it changes is packed once, by who comes first.
    for worker, packed in ((second, len(PACKED_PATCHES)), (first, ALL)):
        assert set(worker.ask("prompt", strengths=PACKED_PATCHES)) == {worker.ask("plain", strengths=PACKED_PATCHES)}
        assert worker.ask("packing") == {"shared": ALL, "own": 0, "measured": packed}
    assert ask_status(address)["bytes"] == first.ask("figures")["shared"] == second.ask("figures")["shared"]
    # Another LoRA in both at once: what one packs the other does not pack, and in the end all is there once.
    for _ in range(2):
        for worker in (first, second):
            worker.tell("prompt", strengths=EVERYWHERE)
        for worker in (first, second):
            assert set(worker.hear()) == {worker.ask("plain", strengths=EVERYWHERE)}
    packed = [worker.ask("packing") for worker in (first, second)]
    assert [each["shared"] for each in packed] == [ALL, ALL]
    assert sum(each["measured"] for each in packed) == ALL + len(PACKED_PATCHES) + ALL
    assert ask_status(address)["bytes"] == first.ask("figures")["shared"] == second.ask("figures")["shared"]
    first.kill()
    assert set(second.ask("run", steps=2)) == {second.ask("plain", strengths=EVERYWHERE)}
    second.kill()
    until(lambda: ask_status(address)["copies"] == 0)
    assert memory_files(BROKERS[address].pid) == 0


def test_a_process_that_is_killed_while_it_packs_leaves_nothing(address: str, start: Start) -> None:
    first, second = start(address), start(address)
    for worker in (first, second):
        worker.ask("open_packing")
    first.ask("hang_at_write", number=9)
    first.tell("prompt")
    assert first.hear() == "hangs"
    until(lambda: ask_status(address)["building"] > 0)
    assert set(second.ask("prompt")) == {second.ask("plain")}, "nobody waits"
    packed = second.ask("packing")
    assert 0 < packed["measured"] < packed["shared"] < ALL
    assert packed["shared"] >= ALL - PLACES - 2, "those that hang, and those that come"
    first.kill()
    until(lambda: ask_status(address)["building"] == 0)
    assert set(second.ask("prompt")) == {second.ask("plain")}
    assert second.ask("packing") == {"shared": ALL, "own": 0, "measured": packed["measured"] + ALL - packed["shared"]}
    second.ask("close")
    until(lambda: ask_status(address)["copies"] == 0)
    assert memory_files(BROKERS[address].pid) == 0
