"""Page-locking fails, is not allowed, or is for another model: what cannot be page-locked is staged."""

from __future__ import annotations

import gc
import threading
import time
from pathlib import Path

import pytest
import torch
from models import Doubled, PinningBackend, Stored
from reads import join_threads
from weightstream.streaming import PinBudget, State
from weightstream.streaming.memory import host_memory

pytestmark = pytest.mark.usefixtures("watched")


# -- it fails --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [*range(1, 6), 12, 20])
def test_a_refused_registration_is_no_error(tmp_path: Path, n: int) -> None:
    backend = PinningBackend(refused=[n])
    stored = Stored(tmp_path, backend, fill_threads=1)
    stored.streamer.load(stored.least)
    stored.streamer.finish_building()
    ceiling = stored.pins._ceiling
    assert stored.pins.failures == 1
    stored.check_plain()
    snapshot = stored.streamer.snapshot()
    assert "page-locking failed (error 2)" in snapshot.note
    assert snapshot.pinned_bytes == stored.pins.used == sum(backend.registered.values())
    if n > 1:
        assert ceiling is not None
        assert "staged from the file or pageable memory (page-locking failed (error 2))" in snapshot.explain
        assert snapshot.staged_bytes > 0
        assert backend.requests == n, "what was refused once is not asked for again"
    stored.close()
    stored.streamer.load(stored.least)
    stored.streamer.finish_building()
    stored.check_plain()
    snapshot = stored.streamer.snapshot()
    assert (snapshot.staged_bytes, snapshot.note) == (0, "")
    stored.close()


def test_every_registration_may_be_refused(tmp_path: Path) -> None:
    backend = PinningBackend(refused=range(10**9))
    stored = Stored(tmp_path, backend)
    for plan in (stored.half, stored.least):
        stored.streamer.load(plan)
        stored.check_plain()
        stored.streamer.finish_building()
        assert stored.streamer.snapshot().staged_bytes == plan.streamed_bytes
    stored.close()


class Broken(BaseException):
    """Something that nobody expects."""


def test_a_registration_that_is_cut_short_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def register(buffer: torch.Tensor) -> str | None:
        raise Broken

    stored = Stored(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(stored.backend, "register", register)
        with pytest.raises(Broken):
            stored.streamer.load(stored.half)
    stored.close()
    stored.streamer.load(stored.half)
    stored.check(2)
    stored.close()


def test_a_refusal_keeps_nothing_that_was_filled_before(tmp_path: Path) -> None:
    """A builder is stopped with memory that it has filled and not page-locked, which is refused later."""
    backend, pins = PinningBackend(permits=0, refused=range(3, 10**9)), PinBudget()
    stored = Stored(tmp_path, backend, pins, build_threads=2)
    stored.streamer.prepare(stored.streamer.minimum_bytes)
    first, second = (unit.nbytes for unit in stored.streamer.blocks.units[:2])
    backend.waits.acquire()
    while pins.used < first + second:
        time.sleep(0.001)  # One of the first two units is being page-locked, the other waits for it.
    threading.Timer(0.05, backend.let_go_on).start()
    stored.streamer.load(stored.least)
    ring = stored.streamer.reader.ring_bytes
    assert pins.used == ring + first + second
    assert pins.locked in (ring + first, ring + second)
    stored.check()
    stored.streamer.finish_building()
    assert pins.used == pins.locked == sum(backend.registered.values())
    assert len(backend.registered) == 2, "one unit and the ring"
    stored.check(2)
    stored.close()
    assert pins.used == pins.locked == 0


# -- memory is short -------------------------------------------------------------------------------------------------


def test_full_memory_is_told_and_all_is_staged(tmp_path: Path) -> None:
    stored = Stored(tmp_path, pins=PinBudget(spare=lambda: 0))
    stored.streamer.load(stored.least)
    stored.streamer.finish_building()
    stored.check(2)
    snapshot = stored.streamer.snapshot()
    assert snapshot.note == "host memory is nearly full"
    assert "(host memory is nearly full)" in snapshot.explain
    assert snapshot.staged_bytes == stored.streamer.plan.streamed_bytes
    assert snapshot.pinned_bytes == 0
    stored.close()


def test_what_fits_into_memory_is_page_locked(tmp_path: Path) -> None:
    pins = PinBudget(spare=lambda: 150_000 - pins.used)
    stored = Stored(tmp_path, pins=pins)
    stored.streamer.load(stored.least)
    stored.streamer.finish_building()
    stored.check(2)
    snapshot = stored.streamer.snapshot()
    assert snapshot.note == "host memory is nearly full"
    assert 0 < pins.used <= 150_000
    assert 0 < snapshot.staged_bytes < stored.streamer.plan.streamed_bytes
    stored.close()


def test_what_is_spare_is_asked_again_when_it_may_have_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    now = 100.0
    spare = 10_000
    monkeypatch.setattr(host_memory.time, "monotonic", lambda: now)
    pins = PinBudget(spare=lambda: asked.append(now) or spare)
    assert [pins.take(1000) for _ in range(5)] == [None] * 5
    assert asked == [100.0]
    now += host_memory.SPARE_SECONDS / 2
    spare = 7000
    assert pins.take(5000) is None, "as much as was left of the first answer"
    assert pins.take(1000) is None, "not by that one"
    assert len(asked) == 2
    now += 2 * host_memory.SPARE_SECONDS
    spare = 500
    assert pins.take(1000) == "host memory is nearly full"
    assert len(asked) == 3


def test_the_garbage_collector_may_free_page_locked_memory_while_it_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asking for what is spare makes objects, so a model that nobody uses any more may be collected right there."""
    monkeypatch.setattr(host_memory, "SPARE_SECONDS", -1.0)
    collecting = threading.Event()
    pins = PinBudget(spare=lambda: 10**9 + (gc.collect() * 0 if collecting.is_set() else 0))
    dropped = Stored(tmp_path, pins=pins)
    dropped.streamer.load(dropped.least)
    dropped.streamer.finish_building()
    dropped.itself = dropped
    gc.disable()
    try:
        del dropped
        collecting.set()
        assert pins.take(1000) is None
        pins.give(1000)
        join_threads()
        assert pins.used == 0
    finally:
        gc.enable()


# -- models give way -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["limit", "spare"])
def test_the_least_recently_used_model_gives_way(tmp_path: Path, kind: str) -> None:
    size = sum(unit.nbytes for unit in Stored(tmp_path).streamer.blocks.units)
    limit = size * 9 // 4
    pins = PinBudget(limit=limit) if kind == "limit" else PinBudget(spare=lambda: limit - pins.used)
    models = [Stored(tmp_path, pins=pins, seed=seed) for seed in range(3)]
    for stored in models:
        stored.streamer.load(stored.least)
        stored.check(2)
        stored.streamer.finish_building()
        stored.check()
    first, second, third = (stored.streamer.snapshot() for stored in models)
    assert first.staged_bytes > 0
    assert models[0].streamer.state is State.REDUCED
    assert second.staged_bytes == third.staged_bytes == 0
    for turn in (0, 1, 2, 1, 0, 2):
        stored = models[turn]
        stored.check()
        stored.streamer.finish_building()
        stored.check()
        assert stored.streamer.snapshot().staged_bytes == 0, "it has taken its memory back"
        assert pins.used <= limit
    for stored in models:
        stored.streamer.close()
    assert pins.used == 0


def test_a_patched_model_that_gave_way_is_patched_again(tmp_path: Path) -> None:
    names = {f"blocks.{block}.mlp.0.weight" for block in range(6)}
    stored = Stored(tmp_path)
    for name in names:
        stored.plain.get_parameter(name).mul_(2)
    expected = stored.plain(stored.x)
    patches = Doubled(names)

    def run() -> torch.Tensor:
        return stored.streamer.run(
            lambda: stored.model(stored.x), reload=lambda plan: stored.streamer.load(plan, patches)
        )

    stored.streamer.load(stored.least, patches)
    assert torch.equal(run(), expected)
    for nbytes in (1, 40_000, 10**9):
        assert stored.streamer.give_up_masters(nbytes) > 0
        assert stored.streamer.state is State.REDUCED
        assert torch.equal(run(), expected)
    assert stored.streamer.give_up_masters(10**9) > 0
    stored.streamer.unload()
    assert stored.streamer.give_up_masters(10**9) == 0
    assert stored.pins.used == 0
    stored.streamer.load(stored.least)
    assert not torch.equal(stored.model(stored.x), expected)
    stored.close()
