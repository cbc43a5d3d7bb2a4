"""Packed copies that several workers share: here they are models of one process, each with a connection of its own."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Scaled
from packing_workers import ALL, PATCHED, PackingWorker
from reads import Reads
from share_workers import LINUX, brokered, fill_memory, memory_files, shared_spans, status_of, until
from weightstream.streaming import cut_model
from weightstream.streaming.config import PackingMode
from weightstream.streaming.memory import copy_keys, packed_drafts, packing, shared_packed
from weightstream.streaming.memory.memory_ahead import Wanted
from weightstream.streaming.sharing.broker import Broker

pytestmark = [LINUX, pytest.mark.usefixtures("watched")]

QKV, OUT = "blocks.1.qkv", "blocks.3.out"


@pytest.fixture
def broker() -> Iterator[Broker]:
    with brokered() as broker:
        yield broker


@pytest.fixture
def two(tmp_path: Path, broker: Broker) -> Iterator[tuple[PackingWorker, PackingWorker]]:
    """Workers that pack what they load, and share all of it in the end."""
    workers = PackingWorker(tmp_path, broker.address, alone=True), PackingWorker(tmp_path, broker.address, alone=True)
    yield workers
    for worker in workers:
        worker.close()
    until(lambda: status_of(broker)["copies"] == memory_files() == 0)


Two = tuple[PackingWorker, PackingWorker]


def test_the_second_reads_and_packs_nothing_and_memory_is_there_once(
    tmp_path: Path, broker: Broker, packed_units: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (PackingWorker(tmp_path, broker.address, alone=True) for _ in range(2))
    locked = first.pins.locked
    first.prompt()
    built, _ = first.counts()
    assert len(first.packed(shared=True)) == ALL
    del packed_units[:]
    reads = Reads(monkeypatch)
    second.prompt()
    assert second.counts() == (0, built)
    assert packed_units == [], "it packs nothing"
    assert not {f"{name}.weight" for name in second.packed(shared=True)} & reads.tensors, "and reads nothing"
    assert second.packed(shared=False) == set()
    found = status_of(broker)
    for worker in (first, second):
        snapshot = worker.streamer.snapshot()
        assert worker.pins.shared == snapshot.shared_bytes == found["bytes"] >= worker.packed_bytes
        assert (snapshot.staged_bytes, snapshot.note) == (0, "")
        assert snapshot.pinned_bytes == worker.pins.locked
    machine = found["bytes"] + sum(worker.pins.locked - worker.pins.shared for worker in (first, second))
    assert machine <= 1.05 * first.pins.locked
    assert locked == 0
    assert found["copies"] == memory_files() == built, "master copies of what is packed are nobody's any more"
    first.close()
    until(lambda: [each["copies"] for each in status_of(broker)["workers"]] == [built])
    second.check(3)
    second.close()
    until(lambda: status_of(broker)["copies"] == memory_files() == 0)


def test_workers_that_never_packed_alone_end_with_one_packed_copy(tmp_path: Path, broker: Broker) -> None:
    """The raw copies that they share at first are given back one by one."""
    first, second = PackingWorker(tmp_path, broker.address), PackingWorker(tmp_path, broker.address)
    for worker in (first, second):
        worker.prompt(steps=2)
        assert not worker.streamer.plan.packed
    raw = status_of(broker)["bytes"]
    for worker in (first, second, first):
        worker.check(3)
    assert first.packed(shared=True) == second.packed(shared=True)
    assert len(first.packed(shared=True)) == ALL
    found = status_of(broker)
    assert found["bytes"] == first.pins.shared == second.pins.shared < 0.75 * raw
    for worker in (first, second):
        worker.close()


def test_workers_with_the_same_patches_share_them_packed(two: Two, packed_units: list[int]) -> None:
    first, second = two
    for strengths in (PATCHED, None, {"blocks.1.qkv.weight": 3.0}, PATCHED):
        for worker in two:
            worker.prompt(strengths)
            assert len(worker.packed(shared=True)) == ALL
        assert first.pins.shared == second.pins.shared
    del packed_units[:]
    first.prompt({**PATCHED, "blocks.3.out.weight": 0.25})
    assert len(packed_units) == 1, "one differs"
    assert first.counts()[0] > 0
    second.prompt({**PATCHED, "blocks.3.out.weight": 0.25})
    assert len(packed_units) == 1
    assert second.patches.computed == [], "nothing is patched twice"


def test_patches_that_others_cannot_know_are_a_workers_own(two: Two) -> None:
    first, second = two
    first.prompt()
    second.prompt(PATCHED, known=False)
    assert second.packed(shared=False) == {QKV, OUT}
    first.check()
    second.prompt(PATCHED)
    assert second.packed(shared=False) == set()
    second.prompt()
    assert second.packed(shared=True) == first.packed(shared=True)
    assert status_of_bytes(two) == {first.pins.shared}


def status_of_bytes(two: Two) -> set[int]:
    return {worker.pins.shared for worker in two}


def test_no_module_ever_holds_shared_memory(two: Two) -> None:
    """While no block runs: other code may write to what modules hold."""
    for worker in two:
        for strengths in (None, PATCHED):
            worker.load(strengths)
            for _ in range(3):
                worker.check()
                held = [*worker.model.parameters(), *worker.model.buffers()]
                assert not [one for one in held for begin, end in shared_spans() if begin <= one.data_ptr() < end]


def test_what_others_write_stays_with_the_worker_where_it_was_written(two: Two) -> None:
    first, second = two
    for worker in two:
        worker.prompt()
    with torch.no_grad():
        first.model.get_parameter(f"{QKV}.weight").mul_(2)
        first.plain.get_parameter(f"{QKV}.weight").mul_(2)
    changes = first.streamer.changes()
    assert {change.value.name for change in changes} == {f"{QKV}.weight"}
    first.streamer.show(changes)
    first.streamer.take_up(cut_model(first.model), changes)
    first.prompt()
    assert QKV not in first.packed(shared=True)
    second.prompt()
    assert len(second.packed(shared=True)) == ALL


def test_a_worker_that_wants_it_raw_has_it_raw(tmp_path: Path, broker: Broker) -> None:
    packs, another = (PackingWorker(tmp_path, broker.address, alone=True) for _ in range(2))
    raw, also = (PackingWorker(tmp_path, broker.address, packing=PackingMode.OFF) for _ in range(2))
    for strengths in (None, PATCHED, None):
        for worker in (packs, raw, another, also):
            worker.prompt(strengths)
        assert packs.packed(shared=True) == another.packed(shared=True)
        assert not raw.streamer.plan.packed
        assert raw.pins.shared == also.pins.shared > packs.pins.shared == another.pins.shared
    for worker in (packs, raw, another, also):
        worker.close()


def corrupted(number: int, value: int) -> Callable[..., bytes]:
    """A table of which one byte is another one."""
    own = packed_drafts.table_of

    def table_of(packed: Any) -> bytes:
        table = bytearray(own(packed))
        table[number] = value
        return bytes(table)

    return table_of


TABLES = {"it has no table": 0, "its table is of version": 8, "its table is of another unit": 12, "cannot have": 31}


@pytest.mark.parametrize("reason", TABLES)
def test_a_table_that_cannot_be_right_makes_a_copy_of_its_own(
    reason: str, two: Two, monkeypatch: pytest.MonkeyPatch, packed_units: list[int]
) -> None:
    first, second = two
    with monkeypatch.context() as patch:
        patch.setattr(packed_drafts, "table_of", corrupted(TABLES[reason], 77))
        first.prompt()
    del packed_units[:]
    second.prompt()
    assert len(packed_units) == ALL
    assert len(second.packed(shared=False)) == ALL
    assert reason in second.share.reason
    assert second.share.is_on
    first.check()
    assert second.streamer.snapshot().staged_bytes == 0


def test_another_version_of_the_format_has_other_keys(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = two
    first.prompt()
    monkeypatch.setattr(copy_keys, "VERSION", copy_keys.VERSION + 1)
    second.prompt()
    assert second.share.reason == ""
    assert second.share.built == len(second.packed(shared=True)) == ALL
    first.check()


def test_what_others_pack_streams_as_it_is_meanwhile(two: Two, packed_units: list[int]) -> None:
    """Nobody waits, nothing is packed twice, and the next prompt has it packed."""
    first, second = two
    claims = []
    for name in (QKV, OUT):
        wanted = Wanted(first.copies(name), 10**6)
        claims.append(shared_packed.packed_share(first.streamer.site.supply.arena, Scaled({}), False).claim(wanted))
    assert all(isinstance(claim, shared_packed.Claim) for claim in claims)
    second.prompt()
    assert len(second.packed(shared=True)) == ALL - 2
    assert "2 of 16 layers do not stream packed: another process packs them for both" in second.streamer.explain()
    claims.pop().give_up()
    second.prompt()
    assert len(second.packed(shared=True)) == ALL - 1
    claims.pop().give_up()
    first.prompt()
    del packed_units[:]
    second.prompt()
    assert packed_units == []
    assert first.packed(shared=True) == second.packed(shared=True)


def test_no_room_amid_a_copy_leaves_nothing_half(two: Two, broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = two
    fill_memory(monkeypatch, after=25)
    first.prompt()
    assert "No space left" in first.share.reason
    assert len(first.packed(shared=True)) + len(first.packed(shared=False)) == ALL
    assert first.packed(shared=False)
    assert first.streamer.snapshot().staged_bytes == 0
    until(lambda: status_of(broker)["building"] == 0)
    second.prompt()
    first.check()


@pytest.mark.parametrize("function", ["table_of", "SharedBuffer.finish", "Drafts.place", "Drafts.write"])
def test_an_error_amid_packing_leaves_nothing_half(
    function: str, two: Two, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = two
    owner, _, name = function.rpartition(".")
    target = getattr(packed_drafts, owner) if owner else packed_drafts
    if owner == "Drafts":
        target = packed_drafts.Drafts
    own, count = getattr(target, name), iter(range(1000))

    def fails(*arguments: Any) -> Any:
        if next(count) == 3:
            raise RuntimeError("the device has failed")
        return own(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(target, name, fails)
        with pytest.raises(RuntimeError, match="the device has failed"):
            first.prompt()
    gc.collect()  # The error's frames.
    until(lambda: status_of(broker)["building"] == 0)
    assert first.backend.allocated == 0
    for worker in (second, first):
        worker.prompt()
        assert len(worker.packed(shared=True)) == ALL


def test_what_takes_more_than_was_planned_is_not_kept_from_others(
    two: Two, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = two
    own, count = packing.measure_unit, iter(range(1000))
    with monkeypatch.context() as patch:
        patch.setattr(packing, "measure_unit", lambda *args: None if next(count) == 3 else own(*args))
        first.prompt()
    assert len(first.packed(shared=True)) == ALL - 1
    until(lambda: status_of(broker)["building"] == 0)
    second.prompt()
    assert len(second.packed(shared=True)) == ALL


def test_a_file_that_is_touched_meanwhile_is_known_as_another(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read of it since may be anything."""
    first, second = two
    own, count = packing.measure_unit, iter(range(1000))

    def measure_unit(*arguments: Any) -> Any:
        if next(count) == 5:
            os.utime(first.path)
            first.streamer.check_files()
        return own(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "measure_unit", measure_unit)
        first.prompt()
    assert 0 < len(first.packed(shared=False)) < ALL
    second.prompt()
    assert len(second.packed(shared=True)) == ALL
    first.check()


def test_a_broker_that_ends_takes_nothing_away(tmp_path: Path) -> None:
    with brokered() as broker:
        workers = [PackingWorker(tmp_path, broker.address, alone=True) for _ in range(3)]
        for worker in workers[:2]:
            worker.prompt()
    for worker in workers[:2]:
        worker.check()
        worker.prompt(PATCHED)
        assert worker.packed(shared=False) == {QKV, OUT}
        assert "the broker" in worker.share.reason
    workers[2].prompt()
    assert len(workers[2].packed(shared=False)) == ALL
    for worker in workers:
        worker.close()


def test_ram_that_is_full_is_no_reason_against_a_copy_that_is_there(two: Two) -> None:
    first, second = two
    first.prompt()
    second.pins._spare = lambda: 0
    second.prompt()
    assert len(second.packed(shared=True)) == ALL
    second.pins._spare = None


def test_where_ram_is_full_only_what_nobody_has_streams_as_it_is(two: Two) -> None:
    first, second = two
    first.prompt(PATCHED)
    second.pins._spare = lambda: 0
    second.prompt({**PATCHED, f"{QKV}.weight": 3.0})
    assert first.packed(shared=True) - second.packed(shared=True) == {QKV}
    assert second.packed(shared=False) == set()
    second.pins._spare = None


def test_limits_of_page_locked_memory_count_packed_copies_of_others(two: Two) -> None:
    first, second = two
    first.prompt()
    second.pins.limit = first.packed_bytes // 2
    second.prompt()
    assert 0 < len(second.packed(shared=True)) < ALL
    assert second.pins.used <= second.pins.limit
    assert "no page-locked memory is left for them" in second.streamer.explain()
    second.pins.limit = None


def test_what_is_packed_needs_no_more_room_than_in_a_process_alone(tmp_path: Path, broker: Broker) -> None:
    """Memory that it goes down to on its way is given back where it is short."""
    alone = PackingWorker(tmp_path, "")
    alone.prompt()
    worker = PackingWorker(tmp_path, broker.address, alone=True)
    worker.pins.limit = alone.packed_bytes + 1000
    worker.prompt()
    assert len(worker.packed(shared=True)) == ALL
    for each in (alone, worker):
        each.close()


def test_where_there_is_room_for_one_copy_of_each_unit_patches_come_and_go(two: Two) -> None:
    """The copy with other patches goes first, as it is read-only."""
    first, _ = two
    for worker in two:
        worker.prompt()
        worker.pins.limit = worker.pins.used + 10_000
    every = {f"{name}.weight": 2.0 for name in first.packed(shared=True)}
    for strengths in (every, None, PATCHED):
        for worker in two:
            worker.prompt(strengths)
            assert len(worker.packed(shared=True)) == ALL
            assert worker.pins.used <= worker.pins.limit
    for worker in two:
        worker.pins.limit = None


def test_packed_copies_that_are_given_up_are_taken_again(two: Two, packed_units: list[int]) -> None:
    first, _ = two
    for worker in two:
        worker.prompt()
    assert first.streamer.give_up_masters(1 << 60) > 0
    assert first.pins.shared == 0
    del packed_units[:]
    first.prompt()
    assert (packed_units, len(first.packed(shared=True))) == ([], ALL)


def test_code_that_writes_to_copies_gets_one_of_its_own(two: Two) -> None:
    """As hooks of the host do, which write to what modules hold and undo it later."""
    first, second = two
    names = {f"{QKV}.weight", f"{OUT}.weight"}
    for worker in two:
        worker.prompt(PATCHED)
    first.streamer.make_masters(names)
    before = {name: first.model.get_parameter(name).detach().clone() for name in names}
    with torch.no_grad():
        for name in names:
            first.model.get_parameter(name).mul_(0.5)
            first.plain.get_parameter(name).mul_(0.5)
    first.streamer.lend_masters()
    first.streamer.invalidate()
    first.check(2)
    assert len(first.packed(shared=True)) == ALL - 2
    assert not first.copies(QKV).is_read_only
    second.check()
    with torch.no_grad():
        for name in names:
            first.model.get_parameter(name).copy_(before[name])
            first.plain.get_parameter(name).mul_(2)
    first.streamer.take_masters_back()
    first.streamer.invalidate()
    first.check()
    first.prompt()
    assert len(first.packed(shared=True)) == ALL


def test_a_model_that_is_dropped_holds_nothing(tmp_path: Path, broker: Broker) -> None:
    worker = PackingWorker(tmp_path, broker.address, alone=True)
    worker.prompt()
    pins, share = worker.pins, worker.share
    assert status_of(broker)["copies"] > 0
    del worker
    gc.collect()
    until(lambda: (pins.used, pins.shared, pins.locked) == (0, 0, 0))
    until(lambda: status_of(broker)["copies"] == 0)
    share.give_up("it is over")


def test_what_is_checked_is_packed_by_the_worker_that_checks_it(two: Two, tmp_path: Path, broker: Broker) -> None:
    first, _ = two
    first.prompt()
    checks = PackingWorker(tmp_path, broker.address, verify=True)
    checks.prompt()
    assert len(checks.packed(shared=False)) == ALL
    assert checks.streamer.counters.corrupted == 0
    checks.close()
