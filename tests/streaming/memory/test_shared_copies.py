"""Master copies that several workers share: here they are models of one process, each with a connection of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import PinningBackend, Scaled, Stored, learn, output_with
from share_workers import LINUX, brokered, fill_memory, memory_files, shared_spans, status_of, until
from weightstream.streaming import PinBudget, cut_model
from weightstream.streaming.memory import shared_buffer
from weightstream.streaming.sharing import share
from weightstream.streaming.sharing.broker import Broker
from weightstream.streaming.sharing.share import NO_SHARE, Share

pytestmark = [LINUX, pytest.mark.usefixtures("watched")]

PATCHED = {"blocks.1.qkv.weight": 2.0, "blocks.4.out.weight": 0.5}


@pytest.fixture
def broker() -> Iterator[Broker]:
    with brokered() as broker:
        yield broker


class Worker(Stored):
    """A model with a connection of its own. What it computes is compared with the plain model, bit by bit."""

    def __init__(self, folder: Path, address: str, backend: PinningBackend | None = None, **settings: Any) -> None:
        self.share = Share(address)
        super().__init__(folder, backend or PinningBackend(), PinBudget(share=self.share), **settings)
        self.patches = Scaled({})
        self.pins.share = NO_SHARE
        learn(self.streamer, lambda: self.model(self.x))  # Alone: later plans stream the same units.
        self.pins.share = self.share

    def load(self, strengths: dict[str, float] | None = None, known: bool = True) -> None:
        """Load it with these patches, as for a prompt."""
        self.patches = Scaled(strengths or {}, known)
        self.streamer.refresh()
        self.streamer.load(self.least, self.patches)
        self.streamer.begin_prompt()

    def run(self) -> torch.Tensor:
        load = self.streamer.load
        return self.streamer.run(lambda: self.model(self.x), reload=lambda plan: load(plan, self.patches))

    def check(self, steps: int = 3) -> None:
        expected = output_with(self.plain, self.patches.strengths, self.x)
        for _ in range(steps):
            assert torch.equal(self.run(), expected)

    def prompt(self, strengths: dict[str, float] | None = None, known: bool = True) -> None:
        self.load(strengths, known)
        self.check()

    def counts(self) -> tuple[int, int]:
        """Copies that it has built for all and taken from others, since this was asked last."""
        found = self.share.built, self.share.taken
        self.share.built = self.share.taken = 0
        return found

    def units(self, shared: bool) -> set[int]:
        """Streamed units whose master copies are shared, or its own."""
        weights = self.streamer.site.weight_copies
        return {unit for unit in self.streamer.plan.streamed if weights.copies(unit).is_read_only == shared}

    @property
    def large(self) -> set[int]:
        """Streamed units that are worth sharing."""
        units = self.streamer.blocks.units
        return {unit for unit in self.streamer.plan.streamed if units[unit].nbytes >= shared_buffer.LEAST_BYTES}

    def close(self) -> None:
        super().close()
        assert (self.pins.shared, self.pins.locked) == (0, 0)
        self.share.give_up("it is over")


def holding(worker: Worker, names: set[str]) -> frozenset[int]:
    return worker.streamer.site.weight_copies.holding(names)


def test_no_module_ever_holds_shared_memory(tmp_path: Path, broker: Broker) -> None:
    """While no block runs: other code may write to what modules hold."""
    worker = Worker(tmp_path, broker.address)
    for strengths in (None, PATCHED, None):
        worker.load(strengths)
        for _ in range(3):
            worker.check(1)
            spans = shared_spans()
            held = [*worker.model.parameters(), *worker.model.buffers()]
            assert not [one for one in held for begin, end in spans if begin <= one.data_ptr() < end]
        assert len(shared_spans()) == len(worker.large)
    worker.close()
    assert shared_spans() == []


def test_the_second_builds_nothing_and_memory_is_there_once(tmp_path: Path, broker: Broker) -> None:
    first, second = Worker(tmp_path, broker.address), Worker(tmp_path, broker.address)
    first.prompt()
    count = len(first.large)
    assert count > 10
    assert first.counts() == (count, 0)
    second.prompt()
    assert second.counts() == (0, count)
    found = status_of(broker)
    nbytes = sum(first.streamer.blocks.units[unit].nbytes for unit in first.large)
    assert (found["copies"], found["bytes"], found["building"]) == (count, nbytes, 0)
    assert memory_files() == count, "the broker's; a worker keeps none open"
    for worker in (first, second):
        snapshot = worker.streamer.snapshot()
        assert (worker.units(shared=True), worker.pins.shared) == (worker.large, nbytes)
        assert (snapshot.shared_bytes, snapshot.staged_bytes, snapshot.note) == (nbytes, 0, "")
        assert snapshot.pinned_bytes == worker.pins.locked
        own = worker.pins.locked - nbytes - snapshot.ring_bytes
        assert own == sum(worker.streamer.blocks.units[unit].nbytes for unit in worker.units(shared=False))
    first.close()
    until(lambda: [each["copies"] for each in status_of(broker)["workers"]] == [count])
    second.check()
    second.close()
    until(lambda: status_of(broker)["copies"] == memory_files() == 0)


def test_what_is_cast_on_the_way_has_a_key_of_its_own(tmp_path: Path, broker: Broker) -> None:
    first = Worker(tmp_path, broker.address)
    half, again = (Worker(tmp_path, broker.address, dtype=torch.bfloat16) for _ in range(2))
    other = Worker(tmp_path, broker.address, dtype=torch.float16)
    for worker in (first, half, other):
        worker.prompt()
        assert worker.counts()[1] == 0
    again.prompt()
    assert again.counts() == (0, len(again.large))
    for worker in (first, half, again, other):
        worker.close()


def test_another_file_has_other_keys(tmp_path: Path, broker: Broker) -> None:
    one, other = (Worker(tmp_path, broker.address, seed=seed) for seed in (0, 1))
    one.prompt()
    other.prompt()
    assert other.counts() == (len(other.large), 0)
    one.close()
    other.close()


def test_a_file_that_changes_between_two_loads_has_another_key(tmp_path: Path, broker: Broker) -> None:
    """Also where the fingerprint misses the change, and somebody sets the time back."""
    first = Worker(tmp_path, broker.address)
    first.prompt()
    name = "blocks.2.qkv.weight"
    entry = first.checkpoint.files[0].entries[name]
    before = os.stat(first.path)
    content = bytearray(first.path.read_bytes())
    place = entry.begin + (entry.end - entry.begin) // 4
    content[place : place + 4] = (1.25).hex().encode()[:4]
    first.path.write_bytes(content)
    os.utime(first.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = Worker(tmp_path, broker.address)
    assert second.checkpoint.files[0].fingerprint == first.checkpoint.files[0].fingerprint, "or this shows nothing"
    second.plain.load_state_dict(second.checkpoint.state_dict())
    assert not torch.equal(second.plain.get_parameter(name), first.plain.get_parameter(name))
    second.prompt()
    assert second.counts() == (len(second.large), 0)
    second.close()
    first.close()


def test_only_what_is_patched_otherwise_is_a_workers_own(tmp_path: Path, broker: Broker) -> None:
    first, second = Worker(tmp_path, broker.address), Worker(tmp_path, broker.address)
    first.prompt()
    second.prompt(PATCHED, known=False)
    patched = holding(second, set(PATCHED))
    assert len(patched) == 2
    assert second.counts() == (0, len(second.large - patched))
    assert second.units(shared=True) == second.large - patched
    first.check()
    second.prompt()
    assert second.counts() == (0, 2), "without them it has again what all have"
    assert second.units(shared=True) == second.large
    second.prompt(PATCHED, known=False)
    assert second.units(shared=True) == second.large - patched
    first.check()
    for worker in (first, second):
        worker.close()


def test_workers_with_the_same_patches_share_them_too(tmp_path: Path, broker: Broker) -> None:
    first, second, third = (Worker(tmp_path, broker.address) for _ in range(3))
    first.prompt(PATCHED)
    assert first.counts() == (len(first.large), 0)
    assert first.units(shared=True) == first.large
    second.prompt(PATCHED)
    assert second.counts() == (0, len(second.large))
    assert second.patches.computed == [], "nothing is patched twice"
    third.prompt({**PATCHED, "blocks.4.out.weight": 0.25})
    assert third.counts() == (1, len(third.large) - 1)
    for strengths in (None, PATCHED, {"blocks.1.qkv.weight": 3.0}, PATCHED, None):
        for worker in (first, second, third):
            worker.prompt(strengths)
            assert worker.units(shared=True) == worker.large
    assert status_of(broker)["copies"] == len(first.large)
    for worker in (first, second, third):
        worker.close()


def test_what_others_write_stays_with_the_worker_where_it_was_written(tmp_path: Path, broker: Broker) -> None:
    """It is noticed at the next load, and what streams then is this worker's own."""
    first, second = Worker(tmp_path, broker.address), Worker(tmp_path, broker.address)
    name = "blocks.3.qkv.weight"
    for worker in (first, second):
        worker.prompt()
    for write in (lambda weight: weight.mul_(2), lambda weight: weight.data.numpy().__imul__(2)):
        held = first.model.get_parameter(name)
        with torch.no_grad():
            write(held)
            first.plain.get_parameter(name).mul_(2)
        changes = first.streamer.changes()
        assert {change.value.name for change in changes} == {name}
        first.streamer.show(changes)
        first.streamer.take_up(cut_model(first.model), changes)
        first.prompt()
        assert first.units(shared=True) == first.large - holding(first, {name})
        second.check()
    for worker in (first, second):
        worker.close()


def test_writes_under_patches_stream_from_the_next_load_on_and_go_with_the_patches(
    tmp_path: Path, broker: Broker
) -> None:
    """As the host has it, which puts its backup back then. Others never see them."""
    first, second = Worker(tmp_path, broker.address), Worker(tmp_path, broker.address)
    name, other = "blocks.1.qkv.weight", "blocks.4.out.weight"
    for write in (lambda weight: weight.mul_(3), lambda weight: weight.data.numpy().__imul__(3)):
        for worker in (first, second):
            worker.prompt(PATCHED)
            assert worker.units(shared=True) == worker.large
        with torch.no_grad():
            write(first.model.get_parameter(name))
        assert list(first.streamer.changes()) == []
        first.load(PATCHED)
        assert first.units(shared=True) == first.large - holding(first, {name})
        first.patches = Scaled({name: 6.0, other: 0.5})
        first.check(1)
        first.patches = Scaled(PATCHED)
        second.check()
        first.prompt()
        assert first.units(shared=True) == first.large
        second.check()
    for worker in (first, second):
        worker.close()


def test_code_that_writes_to_copies_gets_one_of_its_own(tmp_path: Path, broker: Broker) -> None:
    """As hooks of the host do, which write to what modules hold and undo it later."""
    names = {"blocks.1.qkv.weight", "blocks.2.out.weight"}
    first, second = Worker(tmp_path, broker.address), Worker(tmp_path, broker.address)
    for strengths in (None, {"blocks.1.qkv.weight": 2.0}):
        for worker in (first, second):
            worker.prompt(strengths)
        first.streamer.make_masters(names)
        held = holding(first, names)
        assert first.units(shared=True) == first.large - held
        before = {name: first.model.get_parameter(name).detach().clone() for name in names}
        with torch.no_grad():
            for name in names:
                first.model.get_parameter(name).mul_(0.5)
                first.plain.get_parameter(name).mul_(0.5)
        first.streamer.lend_masters()
        first.streamer.invalidate()
        first.check()
        assert first.units(shared=True) == first.large - held
        second.check()
        with torch.no_grad():
            for name in names:
                first.model.get_parameter(name).copy_(before[name])
                first.plain.get_parameter(name).mul_(2)
        first.streamer.take_masters_back()
        first.streamer.invalidate()
        first.check()
        first.streamer.unload()
    for worker in (first, second):
        worker.close()


def test_a_copy_that_others_build_is_taken_when_it_is_whole(tmp_path: Path, broker: Broker) -> None:
    """Meanwhile the weights come from the file, and nobody waits."""
    first, second = Worker(tmp_path, broker.address), Worker(tmp_path, broker.address)
    second.load()
    copies = first.streamer.site.weight_copies.copies
    chosen = sorted(second.large)[:3]
    arena = first.streamer.site.supply.arena
    for unit in chosen:
        assert copies(unit).master_copy.fill(arena, lambda: True, forget=False), "claimed, and stopped at once"
    second.check(4)
    assert second.counts() == (len(second.large) - 3, 0)
    assert second.streamer.building
    moves = second.streamer.moves
    assert second.streamer.site.supply.waits_for_others
    copies(chosen[0]).master_copy.fill(arena, lambda: False, forget=False)
    second.check(1)
    assert second.counts() == (0, 1)
    arena.release(copies(chosen[1]).drop_master())
    until(lambda: status_of(broker)["building"] == 1)
    second.check(1)
    assert second.counts() == (1, 0), "its builder has given it up"
    assert second.units(shared=False) & second.large == {chosen[2]}
    copies(chosen[2]).master_copy.fill(arena, lambda: False, forget=False)
    second.check(1)
    assert second.units(shared=True) == second.large
    assert not second.streamer.building
    assert second.streamer.moves == moves, "no load was needed"
    second.close()
    for unit in (chosen[0], chosen[2]):
        copies(unit).master_copy.give_up_begun(arena)
    first.close()


def test_a_builder_that_is_stopped_goes_on_where_it_was(
    tmp_path: Path, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weightstream.streaming.memory import master_copy as masters

    monkeypatch.setattr(masters, "BUILD_BYTES", 1024)
    worker = Worker(tmp_path, broker.address)
    worker.load()
    unit = max(worker.large)
    copies, arena = worker.streamer.site.weight_copies.copies(unit), worker.streamer.site.supply.arena
    stops = iter([False, False, True])
    copies.master_copy.fill(arena, lambda: next(stops), forget=False)
    assert status_of(broker)["building"] == 1
    worker.check()
    assert worker.counts() == (len(worker.large), 0)
    worker.close()


def test_a_patch_that_comes_amid_building_is_never_written_to_shared_memory(tmp_path: Path, broker: Broker) -> None:
    worker = Worker(tmp_path, broker.address)
    worker.load()
    names = {"blocks.1.qkv.weight", "blocks.2.out.weight"}
    one, other = (worker.streamer.site.weight_copies.copies(unit) for unit in sorted(holding(worker, names)))
    arena = worker.streamer.site.supply.arena
    one.master_copy.fill(arena, lambda: True, forget=False)
    other.master_copy.fill(arena, lambda: False, forget=False)
    assert other.master_copy.lock(arena)
    worker.prompt({"blocks.1.qkv.weight": 2.0, "blocks.2.out.weight": 3.0}, known=False)
    assert not one.is_read_only
    assert not other.is_read_only
    worker.prompt()
    assert worker.units(shared=True) == worker.large
    worker.close()


REFUSALS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "this system gives no memory": lambda patch: patch.setattr(os, "memfd_create", _refuses),
    "this test has no sealed memory files": lambda patch: patch.setattr(
        share, "why_not_here", lambda: "this test has no sealed memory files"
    ),
    "gpu:0 cannot use memory that is read-only": lambda patch: patch.setattr(
        PinningBackend, "register_read_only", lambda *_: "error 801"
    ),
}


def _refuses(*_: object) -> int:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("reason", REFUSALS)
def test_where_it_cannot_be_shared_each_has_its_own_and_says_why(
    tmp_path: Path, broker: Broker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    workers = [Worker(tmp_path, broker.address) for _ in range(2)]
    REFUSALS[reason](monkeypatch)
    for worker in workers:
        worker.prompt()
        worker.prompt(PATCHED)
        assert worker.counts() == (0, 0)
        assert worker.share.reason.startswith(reason)
        assert worker.streamer.snapshot().staged_bytes == 0
        assert (worker.pins.shared, worker.units(shared=True)) == (0, set())
        assert sum(reason in record.getMessage() for record in caplog.records) == 1, "it is said once"
        caplog.clear()
        worker.close()


def test_no_room_amid_a_copy_leaves_nothing_half(
    tmp_path: Path, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(tmp_path, broker.address)
    fill_memory(monkeypatch, after=5)
    worker.prompt()
    assert "No space left" in worker.share.reason
    assert worker.streamer.snapshot().staged_bytes == 0
    until(lambda: status_of(broker)["building"] == 0)
    worker.close()


def test_a_broker_that_ends_takes_nothing_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with brokered() as broker:
        workers = [Worker(tmp_path, broker.address) for _ in range(3)]
        for worker in workers[:2]:
            worker.prompt()
    for worker in workers[:2]:
        worker.check()
        assert worker.units(shared=True) == worker.large
        worker.prompt(PATCHED)
        worker.prompt()
        assert worker.units(shared=True) == worker.large - holding(worker, set(PATCHED))
        assert "the broker" in worker.share.reason
    workers[2].prompt()
    assert workers[2].share.reason.startswith("no broker answers at @")
    assert sum("not shared with others" in record.getMessage() for record in caplog.records) == 3
    for worker in workers:
        worker.close()


def test_limits_of_page_locked_memory_count_what_is_shared(tmp_path: Path, broker: Broker) -> None:
    """Each process has locked it. But RAM that is full is no reason against a copy that is there."""
    first = Worker(tmp_path, broker.address)
    first.prompt()
    second = Worker(tmp_path, broker.address)
    second.pins._spare = lambda: 0
    second.prompt()
    assert second.units(shared=True) == second.large
    assert second.streamer.snapshot().note == "host memory is nearly full", "for the small ones"
    third = Worker(tmp_path, broker.address)
    third.pins.limit = 60_000
    third.prompt()
    assert 0 < third.pins.used <= 60_000
    assert "the limit of" in third.streamer.snapshot().note
    for worker in (first, second, third):
        worker.close()


def test_a_model_that_is_dropped_holds_nothing(tmp_path: Path, broker: Broker) -> None:
    worker = Worker(tmp_path, broker.address)
    worker.prompt()
    pins, share = worker.pins, worker.share
    assert status_of(broker)["copies"] > 0
    del worker
    import gc

    gc.collect()
    until(lambda: (pins.used, pins.shared, pins.locked) == (0, 0, 0))
    until(lambda: status_of(broker)["copies"] == 0)
    share.give_up("it is over")


def test_masters_that_are_given_up_are_taken_again(tmp_path: Path, broker: Broker) -> None:
    first, second = Worker(tmp_path, broker.address), Worker(tmp_path, broker.address)
    for worker in (first, second):
        worker.prompt()
        worker.counts()
    assert first.streamer.give_up_masters(1 << 60) > 0
    assert first.pins.shared == 0
    first.load()
    first.check()
    assert first.counts() == (0, len(first.large))
    for worker in (first, second):
        worker.close()
