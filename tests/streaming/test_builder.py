"""Master copies are built behind the steps, and anything may happen meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import Doubled, PinningBackend, Stored
from reads import Reads
from weightstream.streaming import masters
from weightstream.streaming.builder import Builder

pytestmark = pytest.mark.usefixtures("watched")


def test_steps_are_right_before_while_and_after_masters_are_built(tmp_path: Path) -> None:
    backend = PinningBackend(permits=1)  # The ring.
    stored = Stored(tmp_path, backend)
    stored.empty_mapping()
    stored.streamer.load(stored.least)
    assert stored.streamer.building
    for _ in stored.streamer.blocks.units:
        backend.waits.acquire()
        assert torch.equal(stored.model(stored.x), stored.expected)
        backend.permits.release()
    stored.streamer.finish_building()
    snapshot = stored.streamer.snapshot()
    assert len(backend.registered) == len(stored.streamer.blocks.units) + 1
    assert torch.equal(stored.model(stored.x), stored.expected)
    assert (snapshot.note, snapshot.building) == ("", False)
    assert snapshot.ring_bytes > 0
    stored.streamer.load(stored.streamer.plan)
    snapshot = stored.streamer.snapshot()
    assert (snapshot.ring_bytes, snapshot.staged_bytes) == (0, 0)
    assert snapshot.explain.endswith("from page-locked memory")
    stored.close()


def test_the_ring_does_not_come_back_when_all_is_page_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the load, and no step, takes the master copies from the builder."""
    stored = Stored(tmp_path)
    stored.streamer.load(stored.least)
    stored.streamer.finish_building()
    stored.streamer.load(stored.streamer.plan)
    reads = Reads(monkeypatch)
    for _ in range(2):
        assert torch.equal(stored.model(stored.x), stored.expected)
        assert stored.streamer.reader.ring_bytes == 0
    assert reads.take() <= 2 * stored.streamer.plan.slot_bytes, "what was on its way before"
    stored.close()


def test_building_that_is_stopped_is_taken_up_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masters, "BUILD_BYTES", 512)
    stored = Stored(tmp_path)
    reads = Reads(monkeypatch)
    begun = threading.Semaphore(0)
    go_on = threading.Semaphore(0)
    read_range = masters.read_range

    def held(*arguments: object) -> None:
        begun.release()
        go_on.acquire()
        read_range(*arguments)

    monkeypatch.setattr(masters, "read_range", held)
    stored.streamer.prepare(stored.streamer.minimum_bytes)
    for _ in range(5):  # Amid the second unit at the least.
        begun.acquire()
        go_on.release()
    begun.acquire()
    halting = threading.Thread(target=stored.streamer._supply.halt)
    halting.start()
    while not stored.streamer._supply.builder._stopping.is_set():
        time.sleep(0)
    go_on.release(10_000)
    halting.join()
    assert reads.take() <= 6 * 512
    stored.streamer.prepare(stored.streamer.minimum_bytes)
    stored.streamer.finish_building()
    units = range(len(stored.streamer.blocks.units))
    assert reads.take() <= stored.tensor_bytes(list(units)) - 6 * 512 + 4 * 512
    stored.streamer.load(stored.least)
    stored.check(2)
    stored.close()


def test_a_patch_comes_while_a_master_is_half_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masters, "BUILD_BYTES", 512)
    stored = Stored(tmp_path)
    copies = stored.streamer._placement.copies(1)
    names = {spec.name for spec in copies.unit.layout.specs}
    for name in names:
        stored.plain.get_parameter(name).mul_(2)
    stopped = iter([False, False, True])
    assert copies.fill_master(stored.streamer._supply.arena, lambda: next(stopped), False)
    assert copies.master_bytes == copies.unit.nbytes
    stored.streamer.load(stored.least, Doubled(names))
    stored.streamer.finish_building()
    expected = stored.plain(stored.x)
    for _ in range(2):
        assert torch.equal(stored.model(stored.x), expected)
    units = stored.streamer.blocks.units
    assert stored.pins.used == sum(unit.nbytes for unit in units) + stored.streamer.reader.ring_bytes
    stored.close()


def test_preparing_twice_builds_once(tmp_path: Path) -> None:
    backend = PinningBackend(permits=0)
    stored = Stored(tmp_path, backend, build_threads=2)
    stored.streamer.prepare(stored.streamer.minimum_bytes)
    backend.waits.acquire()
    threading.Timer(0.05, backend.let_go_on).start()
    stored.streamer.prepare(stored.streamer.minimum_bytes)
    stored.streamer.finish_building()
    stored.streamer.prepare(stored.streamer.minimum_bytes)
    stored.streamer.finish_building()
    units = stored.streamer.blocks.units
    assert stored.pins.used == sum(backend.registered.values()) == sum(unit.nbytes for unit in units)
    assert stored.streamer.snapshot().pinned_bytes == stored.pins.used
    stored.streamer.load(stored.least)
    stored.check(2)
    stored.close()


def test_prepared_master_copies_are_used_by_the_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = Stored(tmp_path)
    stored.streamer.prepare(stored.streamer.minimum_bytes)
    stored.streamer.finish_building()
    reads = Reads(monkeypatch)
    stored.streamer.load(stored.least)
    assert torch.equal(stored.model(stored.x), stored.expected)
    assert reads.take() == stored.tensor_bytes([])
    assert stored.streamer.snapshot().staged_bytes == 0
    stored.close()


def test_a_model_that_fits_needs_no_preparation(tmp_path: Path) -> None:
    stored = Stored(tmp_path)
    stored.streamer.prepare(10**9)
    assert not stored.streamer.building
    assert stored.pins.used == 0


# -- at any time -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["waiting", "free"])
def building(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stored]:
    """A loaded model, whose builder waits until it is told to stop, or is somewhere."""
    backend = PinningBackend(permits=3 if request.param == "waiting" else 10_000)
    stored = Stored(tmp_path, backend)
    stop = Builder.stop

    def let_go_on(builder: Builder) -> None:
        threading.Timer(0.02, backend.let_go_on).start()
        stop(builder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Builder, "stop", let_go_on)
        stored.streamer.load(stored.half)
        stored.streamer._supply.builder.release()  # As after the first step.
        if request.param == "waiting":
            for _ in range(4):
                backend.waits.acquire()
        yield stored
    backend.let_go_on()


def test_closing_while_building(building: Stored) -> None:
    building.check()
    building.close()
    building.streamer.load(building.least)
    building.check(2)
    building.close()


def test_loading_another_plan_while_building(building: Stored) -> None:
    for plan in (building.least, building.streamer.plan_for(10**9), building.half):
        building.streamer.load(plan)
        building.check(2)
    building.close()


def test_giving_masters_up_while_building(building: Stored) -> None:
    building.check()
    building.streamer.give_up_masters(1)
    building.check(2)
    building.streamer.give_up_masters(10**9)
    assert building.pins.used == 0
    building.check(2)
    building.close()


def test_giving_residents_up_while_building(building: Stored) -> None:
    building.check()
    assert building.streamer.give_way(10_000) >= 10_000
    building.check(2)
    building.close()


def test_writing_to_weights_while_building(building: Stored) -> None:
    """What somebody writes to a module goes into the next steps, and not into the file's weights."""
    streamer = building.streamer
    names = {"blocks.0.qkv.weight", "blocks.5.qkv.weight"}
    building.check()
    streamer.make_masters(names)
    for name in names:
        building.model.get_parameter(name).mul_(2)
        building.plain.get_parameter(name).mul_(2)
    streamer.invalidate()
    expected = building.plain(building.x)
    for _ in range(2):
        assert torch.equal(building.model(building.x), expected)
    building.backend.let_go_on()
    streamer.finish_building()
    for _ in range(2):
        assert torch.equal(building.model(building.x), expected)
    building.close()


def test_moving_while_building(building: Stored) -> None:
    building.check()
    before = building.backend
    building.streamer.move_to(PinningBackend())
    assert before.store.allocated == building.pins.used == 0
    assert before.registered == {}
    building.backend = building.streamer.backend
    building.streamer.load(building.least)
    building.check(2)
    building.close()
