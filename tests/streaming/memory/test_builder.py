"""Master copies are built before the second step, or behind other work, and anything may happen meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import Doubled, PinningBackend, Stored
from reads import Reads
from weightstream.streaming.memory import master_copy as masters
from weightstream.streaming.memory.builder import Builder

pytestmark = pytest.mark.usefixtures("watched")


def test_masters_are_built_before_the_second_step(tmp_path: Path) -> None:
    backend = PinningBackend()
    stored = Stored(tmp_path, backend)
    stored.empty_mapping()
    stored.streamer.load(stored.least)
    stored.check()
    assert len(backend.registered) == 1, "the ring"
    assert stored.streamer.snapshot().staged_bytes == stored.least.streamed_bytes
    stored.check()
    assert len(backend.registered) == len(stored.streamer.plan.streamed) + 1
    snapshot = stored.streamer.snapshot()
    assert (snapshot.note, snapshot.building, snapshot.staged_bytes) == ("", False, 0)
    stored.streamer.load(stored.streamer.plan)
    snapshot = stored.streamer.snapshot()
    assert (snapshot.ring_bytes, snapshot.staged_bytes) == (0, 0)
    assert snapshot.explain.endswith("from page-locked memory")
    stored.check()
    stored.close()


def test_masters_are_built_also_where_the_plan_stays(tmp_path: Path) -> None:
    """A model that was measured before keeps its plan for the second step."""
    stored = Stored(tmp_path)
    stored.streamer.load(stored.least)
    stored.check(3)
    plan = stored.streamer.plan
    stored.streamer.unload()
    assert stored.streamer.give_up_masters(10**9) > 0
    stored.streamer.load(plan)
    stored.check()
    assert stored.streamer.snapshot().staged_bytes == plan.streamed_bytes
    stored.check()
    assert stored.streamer.plan == plan
    assert stored.streamer.snapshot().staged_bytes == 0
    stored.check()
    stored.close()


def test_building_that_is_cancelled_is_taken_up_before_the_next_step(tmp_path: Path) -> None:
    """Also where the plan stays, so that nothing is loaded again."""

    class Cancelled(BaseException):
        """As the host's interrupt."""

    cancelling = [False]

    def watch(progress: object) -> None:
        if cancelling[0]:
            raise Cancelled

    backend = PinningBackend(permits=0)
    backend.permits.release(10_000)
    stored = Stored(tmp_path, backend, watch=watch)
    stored.streamer.load(stored.least)
    stored.check(3)
    plan = stored.streamer.plan
    stored.streamer.unload()
    stored.streamer.give_up_masters(10**9)
    stored.streamer.load(plan)
    stored.check()
    while backend.permits.acquire(blocking=False):
        """No registration may go on."""
    threading.Timer(0.3, backend.let_go_on).start()
    cancelling[0] = True
    with pytest.raises(Cancelled):
        stored.run()
    cancelling[0] = False
    assert stored.streamer.building
    stored.check()
    assert stored.streamer.plan == plan
    assert not stored.streamer.building
    assert stored.streamer.snapshot().staged_bytes == 0
    stored.check(2)
    stored.close()


def test_threads_that_do_not_start_leave_no_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = Stored(tmp_path)
    stored.streamer.load(stored.least)
    stored.check()
    start = threading.Thread.start

    def fail(thread: threading.Thread) -> None:
        if thread.name.startswith("weightstream-build"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="can't start"):
            stored.run()
    stored.streamer.load(stored.least)
    stored.check(2)
    assert stored.streamer.snapshot().staged_bytes == 0
    stored.close()


@pytest.mark.slow
def test_steps_are_right_between_and_after_what_is_built_behind_them(tmp_path: Path) -> None:
    """What was built behind other work when the model is loaded is used, and what was begun is built later."""
    units = len(Stored(tmp_path).streamer.blocks.units)
    for built in range(units):
        backend = PinningBackend(permits=built)
        stored = Stored(tmp_path, backend)
        stored.streamer.prepare(stored.streamer.minimum_bytes)
        for _ in range(built + 1):
            backend.waits.acquire()
        threading.Timer(0.01, backend.let_go_on).start()
        stored.streamer.load(stored.least)
        assert built <= len(backend.registered) - 1 <= built + 1, "the ring, and one that was under way"
        stored.check(3)
        assert stored.streamer.snapshot().staged_bytes == 0
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
    assert reads.take() <= stored.streamer.plan.staging_bytes, "what was on its way before"
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
    halting = threading.Thread(target=stored.streamer.site.supply.halt)
    halting.start()
    while not stored.streamer.site.supply.builder._stopping.is_set():
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
    copies = stored.streamer.site.weight_copies.copies(1)
    names = {spec.name for spec in copies.unit.layout.specs}
    for name in names:
        stored.plain.get_parameter(name).mul_(2)
    stopped = iter([False, False, True])
    assert copies.master_copy.fill(stored.streamer.site.supply.arena, lambda: next(stopped), False)
    assert copies.master_copy.nbytes == copies.unit.nbytes
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


def test_a_limit_below_the_offer_is_prepared_for(tmp_path: Path) -> None:
    stored = Stored(tmp_path)
    limited = Stored(tmp_path, vram_limit=stored.streamer.minimum_bytes)
    limited.streamer.prepare(10**9)
    limited.streamer.finish_building()
    assert limited.pins.used == sum(unit.nbytes for unit in limited.streamer.blocks.units)
    limited.streamer.load(limited.streamer.plan_for(10**9))
    limited.check(2)
    limited.close()


@pytest.mark.parametrize("failures", [1, 2, 100])
def test_units_that_cannot_be_copied_are_named_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    """One that fails does not keep the others from being built; after some nobody tries."""
    stored = Stored(tmp_path)
    stored.streamer.load(stored.least)
    stored.check()
    left = [failures]
    read_range = masters.read_range

    def failing(*args: object) -> None:
        if left[0] > 0:
            left[0] -= 1
            raise OSError(5, "Input/output error")
        read_range(*args)

    with monkeypatch.context() as patch:
        patch.setattr(masters, "read_range", failing)
        stored.check(2)
    missing = len(stored.streamer.site.weight_copies.unbuilt(stored.streamer.plan))
    assert (missing >= 3) if failures == 100 else (missing <= failures)
    note = stored.streamer.snapshot().note
    assert ("could not be copied ([Errno 5] Input/output error)" in note) is (missing > 0)
    stored.streamer.begin_prompt()
    stored.check(2)
    snapshot = stored.streamer.snapshot()
    assert (snapshot.note, snapshot.staged_bytes) == ("", 0)
    stored.close()


def test_a_model_that_fits_needs_no_preparation(tmp_path: Path) -> None:
    stored = Stored(tmp_path)
    stored.streamer.prepare(10**9)
    assert not stored.streamer.building
    assert stored.pins.used == 0


# -- at any time -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["waiting", "free"])
def building(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stored]:
    """A model that is prepared, whose builder waits until it is told to stop, or is somewhere."""
    backend = PinningBackend(permits=3 if request.param == "waiting" else 10_000)
    stored = Stored(tmp_path, backend)
    stop = Builder.stop

    def let_go_on(builder: Builder) -> None:
        threading.Timer(0.02, backend.let_go_on).start()
        stop(builder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Builder, "stop", let_go_on)
        stored.streamer.prepare(stored.streamer.minimum_bytes)
        if request.param == "waiting":
            for _ in range(4):
                backend.waits.acquire()
        yield stored
    backend.let_go_on()


def test_closing_while_building(building: Stored) -> None:
    building.close()
    building.streamer.load(building.least)
    building.check(2)
    building.close()


def test_loading_while_building(building: Stored) -> None:
    for plan in (building.half, building.streamer.plan_for(10**9), building.least):
        building.streamer.load(plan)
        building.check(2)
    building.close()


@pytest.mark.parametrize("nbytes", [1, 10**9])
def test_giving_masters_up_while_building(building: Stored, nbytes: int) -> None:
    building.streamer.give_up_masters(nbytes)
    if nbytes > 1:
        assert building.pins.used == 0
    building.streamer.load(building.half)
    building.check(2)
    building.streamer.give_up_masters(nbytes)
    building.check(2)
    building.close()


def test_writing_to_weights_before_masters_are_built(building: Stored) -> None:
    """What somebody writes to a module goes into the next steps, and not into the file's weights."""
    streamer = building.streamer
    names = {"blocks.0.qkv.weight", "blocks.5.qkv.weight"}
    streamer.load(building.half)
    building.check()
    streamer.make_masters(names)
    for name in names:
        building.model.get_parameter(name).mul_(2)
        building.plain.get_parameter(name).mul_(2)
    streamer.invalidate()
    expected = building.plain(building.x)
    for _ in range(2):
        assert torch.equal(building.model(building.x), expected)
    streamer.finish_building()
    for _ in range(2):
        assert torch.equal(building.model(building.x), expected)
    building.close()


def test_moving_while_building(building: Stored) -> None:
    before = building.backend
    building.streamer.move_to(PinningBackend())
    assert before.store.allocated == building.pins.used == 0
    assert before.registered == {}
    building.backend = building.streamer.backend
    building.streamer.load(building.least)
    building.check(2)
    building.close()
