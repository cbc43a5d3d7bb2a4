"""Models of one process that share copies without a broker: one copy, counted once, gone with the last of them."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from models import PinningBackend, Scaled, Stored, learn
from share_workers import LINUX, memory_files
from weightstream.streaming import PinBudget
from weightstream.streaming.memory import shared_buffer
from weightstream.streaming.memory.shared_buffer import SharedBuffer
from weightstream.streaming.sharing import local
from weightstream.streaming.sharing.ledger import Kind
from weightstream.streaming.sharing.local import LocalShare
from weightstream.streaming.sharing.share import NO_SHARE

pytestmark = [LINUX, pytest.mark.usefixtures("watched")]

PATCHED = {"blocks.1.qkv.weight": 2.0, "blocks.4.out.weight": 0.5}
PAGE = shared_buffer.LEAST_BYTES


class Twin(Stored):
    """One of several models of a file. What it computes is compared with the plain model, bit by bit."""

    def __init__(self, folder: Path, share: LocalShare, pins: PinBudget, **settings: Any) -> None:
        super().__init__(folder, PinningBackend(), pins, share=NO_SHARE, **settings)
        learn(self.streamer, lambda: self.model(self.x))  # Alone: later plans stream the same units.
        self.streamer._share = share
        self.streamer.move_to(self.backend)

    def prompt(self, strengths: dict[str, float] | None = None) -> None:
        patches = Scaled(strengths or {})
        self.streamer.refresh()
        self.streamer.load(self.least, patches)
        self.streamer.begin_prompt()
        before = {name: self.plain.get_parameter(name).clone() for name in patches.strengths}
        for name, strength in patches.strengths.items():
            self.plain.get_parameter(name).mul_(strength)
        expected = self.plain(self.x)
        for name, tensor in before.items():
            self.plain.get_parameter(name).copy_(tensor)
        load = self.streamer.load
        for _ in range(3):
            found = self.streamer.run(lambda: self.model(self.x), reload=lambda plan: load(plan, patches))
            assert torch.equal(found, expected)

    @property
    def large_bytes(self) -> int:
        """Bytes of streamed units that are worth sharing."""
        sizes = [self.streamer.blocks.units[unit].nbytes for unit in self.streamer.plan.streamed]
        return sum(size for size in sizes if size >= PAGE)


@pytest.mark.parametrize("strengths", [{}, PATCHED], ids=["plain", "patched"])
def test_two_models_have_one_copy_that_is_counted_once(tmp_path: Path, strengths: dict[str, float]) -> None:
    share, pins = LocalShare(), PinBudget()
    first, second = Twin(tmp_path, share, pins), Twin(tmp_path, share, pins)
    first.prompt(strengths)
    built, used = share.built, pins.used
    ring = first.streamer.snapshot().ring_bytes
    assert (share.nbytes, share.taken, pins.shared) == (first.large_bytes, 0, first.large_bytes)
    second.prompt(strengths)
    assert (share.built, share.taken) == (built, built), "the second has built nothing"
    assert (share.nbytes, pins.shared) == (first.large_bytes, first.large_bytes)
    own = first.streamer.snapshot().pinned_bytes - first.large_bytes
    assert pins.used - used == own, f"beside its ring of {ring} bytes and what is too small"
    first.streamer.close()
    assert share.nbytes == second.large_bytes, "the other one holds it"
    second.prompt(strengths)
    second.streamer.close()
    assert (share.nbytes, share.copies, memory_files()) == (0, 0, 0)
    assert (pins.used, pins.locked, pins.shared) == (0, 0, 0)


def test_a_model_that_is_dropped_leaves_the_other_intact(tmp_path: Path) -> None:
    share, pins = LocalShare(), PinBudget()
    first, second = Twin(tmp_path, share, pins), Twin(tmp_path, share, pins)
    for twin in (first, second):
        twin.prompt()
    built = share.built
    del first, twin
    gc.collect()
    second.prompt()
    assert (share.built, share.nbytes) == (built, second.large_bytes)
    del second
    gc.collect()
    assert (share.nbytes, pins.locked) == (0, 0)


def test_one_with_a_lora_shares_what_that_does_not_change(tmp_path: Path) -> None:
    share, pins = LocalShare(), PinBudget()
    first, second = Twin(tmp_path, share, pins), Twin(tmp_path, share, pins)
    first.prompt()
    built = share.built
    second.prompt(PATCHED)
    assert share.built == built + len(PATCHED), "one for each unit that is patched, for whoever is next"
    first.prompt(PATCHED)
    first.prompt()
    first.streamer.close()
    second.streamer.close()
    assert share.nbytes == 0


def test_a_limit_of_the_process_has_room_for_what_is_there(tmp_path: Path) -> None:
    share, pins = LocalShare(), PinBudget()
    first, second = Twin(tmp_path, share, pins), Twin(tmp_path, share, pins)
    first.prompt()
    own = first.streamer.snapshot().pinned_bytes - first.large_bytes
    pins.limit = pins.used + own
    second.prompt()
    snapshots = [twin.streamer.snapshot() for twin in (first, second)]
    assert [(now.shared_bytes, now.staged_bytes, now.note) for now in snapshots] == [(first.large_bytes, 0, "")] * 2
    first.streamer.close()
    second.streamer.close()


def test_models_that_begin_together_build_each_copy_once(tmp_path: Path) -> None:
    share, pins = LocalShare(), PinBudget()
    twins = [Twin(tmp_path, share, pins) for _ in range(3)]
    failed: list[BaseException] = []

    def run(twin: Twin) -> None:
        try:
            with torch.inference_mode():
                twin.prompt()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(twin,)) for twin in twins]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    for twin in twins:
        twin.prompt()
    assert share.nbytes == twins[0].large_bytes
    assert share.built == share.copies
    for twin in twins:
        twin.streamer.close()
    assert share.nbytes == 0


# -- the ledger of the process ---------------------------------------------------------------------------------------


def filled(share: LocalShare, key: bytes = b"k" * 32) -> SharedBuffer:
    assert share.want(key, PAGE).kind is Kind.BUILD
    buffer = SharedBuffer(share, key, PAGE)
    buffer.fill(0, PAGE, lambda target: target.fill_(7))
    buffer.finish()
    return buffer


def taken(share: LocalShare, key: bytes = b"k" * 32) -> SharedBuffer:
    answer = share.want(key, PAGE)
    assert answer.kind is Kind.HAVE
    buffer = SharedBuffer(share, key, PAGE, answer.descriptor)
    os.close(answer.descriptor)
    return buffer


def test_a_descriptor_that_is_given_out_is_the_callers() -> None:
    share = LocalShare()
    first = filled(share)
    second = taken(share)
    first.close()
    third = taken(share)
    assert torch.equal(third.memory, second.memory)
    second.close()
    third.close()
    assert (share.copies, memory_files()) == (0, 0)
    assert share.want(b"k" * 32, PAGE).kind is Kind.BUILD, "nobody has it any more"
    share.stop_building(b"k" * 32)


def test_an_end_on_the_thread_that_asks_waits_until_it_has_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the garbage collector may have it: the ledger is in the middle of an answer."""
    share = LocalShare()
    buffers = [filled(share)]
    ledger = share._ledger
    want = ledger.want

    def interrupted(*arguments: Any) -> Any:
        buffers.pop().close()
        assert ledger.copies, "it is not touched while another question is answered"
        return want(*arguments)

    monkeypatch.setattr(ledger, "want", interrupted)
    answer = share.want(b"k" * 32, PAGE)
    assert answer.kind is Kind.HAVE
    os.close(answer.descriptor)
    assert ledger.copies[b"k" * 32].holds.total() == 1, "the end was settled right after the answer"
    share.drop(b"k" * 32)
    assert ledger.copies == {}


def test_what_is_not_built_after_all_is_free_for_others() -> None:
    share = LocalShare()
    assert share.want(b"k" * 32, PAGE).kind is Kind.BUILD
    buffer = SharedBuffer(share, b"k" * 32, PAGE)
    assert share.want(b"k" * 32, PAGE).kind is Kind.LATER
    moves = share.moves()
    del buffer
    gc.collect()
    assert share.moves() > moves
    filled(share).close()


def test_when_it_is_given_up_what_is_shared_stays(caplog: pytest.LogCaptureFixture) -> None:
    share = LocalShare()
    first = filled(share)
    second = taken(share)
    share.give_up("it must end")
    assert not share.is_on
    assert share.want(b"o" * 32, PAGE).kind is Kind.REFUSED
    assert "copies of their own: it must end" in caplog.text
    first.close()
    assert int(second.memory[0]) == 7
    second.close()
    assert memory_files() == 0


def test_a_system_without_such_memory_shares_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(local, "why_not_here", lambda: "win32 has no sealed memory files")
    share, pins = LocalShare(), PinBudget()
    first, second = Twin(tmp_path, share, pins), Twin(tmp_path, share, pins)
    for twin in (first, second):
        twin.prompt()
        assert twin.streamer.snapshot().shared_bytes == 0
    assert (share.reason, share.built) == ("win32 has no sealed memory files", 0)
    for twin in (first, second):
        twin.streamer.close()


def test_without_a_descriptor_a_model_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    share = LocalShare()
    first = filled(share)

    def refuse(descriptor: int) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(local.os, "dup", refuse)
    assert share.want(b"k" * 32, PAGE).kind is Kind.REFUSED
    monkeypatch.undo()
    assert share.reason == "Too many open files"
    first.close()
    assert share.copies == 0


def test_a_process_that_is_forked_off_keeps_nothing_alive() -> None:
    share = LocalShare()
    first = filled(share)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, b"%d" % (memory_files() + share.is_on))
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 8) == b"0"
    os.close(read)
    os.close(write)
    assert share.is_on
    assert int(taken(share).memory[0]) == 7
    first.close()
