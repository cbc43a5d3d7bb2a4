"""What is alive, counted and page-locked, on the way and at the end."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from functools import partial

import pytest
import torch
from models import X, budgets, make_streamer, make_transformer
from weightstream.streaming import (
    CpuBackend,
    PinBudget,
    Streamer,
    StreamingConfig,
    VirtualMemory,
    cut_model,
)


class Memory(bytearray):
    """Memory that can be watched: alive for as long as any tensor uses it."""

    __hash__ = object.__hash__


class WatchedBackend(CpuBackend):
    """Knows which of its memory is really alive, whatever was counted as given back."""

    def __init__(self) -> None:
        super().__init__(VirtualMemory(10**9))
        self.memories: weakref.WeakSet[Memory] = weakref.WeakSet()
        self.peak_alive = 0

    def _empty(self, nbytes: int) -> torch.Tensor:
        memory = Memory(nbytes)
        self.memories.add(memory)
        self.peak_alive = max(self.peak_alive, self.alive)
        return torch.frombuffer(memory, dtype=torch.uint8)

    @property
    def alive(self) -> int:
        return sum(len(memory) for memory in self.memories)


@pytest.mark.slow
def test_no_memory_is_kept_alive_by_what_has_moved_on() -> None:
    """Also on the way from one plan to the next no more is alive than the larger of the two asks for."""
    model = make_transformer(depth=8)
    backend = WatchedBackend()
    streamer = Streamer(model, cut_model(model), backend, StreamingConfig(slots=2))
    plans = [streamer.plan_for(budget) for budget in budgets(streamer)]
    for before, after in itertools.permutations(plans, 2):
        streamer.load(before)
        model(X)
        backend.peak_alive = 0
        streamer.load(after)
        assert backend.alive == backend.allocated == after.device_bytes
        assert backend.peak_alive <= max(before.device_bytes, after.device_bytes)
    model(X)
    streamer.unload()
    assert backend.alive == 0


def test_residents_lie_in_the_order_in_which_they_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that give way together then leave no pages to others between them."""
    model = make_transformer(depth=8)
    streamer = make_streamer(model)
    taken: list[int] = []
    allocate = streamer.backend.allocate

    def note(nbytes: int, lasting: bool = False) -> torch.Tensor:
        if lasting:
            taken.append(nbytes)
        return allocate(nbytes, lasting)

    monkeypatch.setattr(streamer.backend, "allocate", note)
    plan = streamer.plan_for(streamer.outline.model_bytes // 2)
    streamer.load(plan)
    sizes = streamer.outline.unit_bytes
    kept = [unit for unit in plan.order if unit in set(plan.resident)]
    assert kept != sorted(kept)
    assert taken == [streamer.outline.rest_bytes, *(sizes[unit] for unit in kept), plan.staging_bytes]


def test_masters_exist_for_what_is_streamed_only() -> None:
    model = make_transformer()
    streamer = make_streamer(model)
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    streamer.finish_building()
    snapshot = streamer.snapshot()
    assert snapshot.pinned_bytes - snapshot.ring_bytes == sum(streamer.outline.unit_bytes)
    streamer.load(streamer.plan_for(10**9))
    assert streamer.snapshot().pinned_bytes == 0


def test_a_model_is_freed_without_the_garbage_collector() -> None:
    model = make_transformer()
    backend = CpuBackend(VirtualMemory(10**9))
    model.streamer = Streamer(model, cut_model(model), backend, StreamingConfig())
    model.streamer.load(model.streamer.plan_for(0 + model.streamer.minimum_bytes))
    model(X)
    references = [weakref.ref(model), weakref.ref(model.streamer), weakref.ref(model.blocks[0])]
    gc.disable()
    try:
        del model
        assert [reference() for reference in references] == [None] * 3
    finally:
        gc.enable()
    assert backend.store.allocated == 0


def test_a_model_that_is_dropped_while_it_is_measured_leaves_nothing_to_the_garbage_collector() -> None:
    """The recorder of its step knows the reader, and so the page-locked ring."""
    model = make_transformer()
    backend = CpuBackend(VirtualMemory(10**9))
    model.streamer = Streamer(model, cut_model(model), backend, StreamingConfig())
    model.streamer.load(model.streamer.plan_for(model.streamer.minimum_bytes))
    model.streamer.run(partial(model, X))
    references = [weakref.ref(model.streamer), weakref.ref(model.streamer.measuring.recorder)]
    gc.collect()
    gc.disable()
    try:
        del model
        assert [reference() for reference in references] == [None] * 2
    finally:
        gc.enable()


def test_a_dropped_model_leaves_no_memory_page_locked() -> None:
    class Registering(CpuBackend):
        registered: set[int] = set()  # noqa: RUF012

        def register(self, buffer: torch.Tensor) -> str | None:
            self.registered.add(buffer.data_ptr())
            return None

        def unregister(self, address: int) -> None:
            self.registered.remove(address)

    model = make_transformer()
    pins = PinBudget()
    backend = Registering(VirtualMemory(10**9))
    streamer = Streamer(model, cut_model(model), backend, StreamingConfig(), pins)
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    model(X)
    streamer.finish_building()
    model(X)
    assert len(backend.registered) == len(streamer.blocks.units) + 1, "the master copies and the reader's ring"
    assert pins.used == sum(streamer.outline.unit_bytes) + streamer.reader.ring_bytes
    # Still looked at by somebody: the memory must stay valid, and must not stay locked.
    weight = model.blocks[0].qkv.weight
    value = weight.clone()
    del model, streamer
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("weightstream-read"):
            thread.join(10)  # The reader's threads end when they see it, and its ring goes with the last of them.
    assert backend.registered == set()
    assert pins.used == 0
    assert torch.equal(weight, value)


def test_models_share_what_may_be_page_locked() -> None:
    models = [make_transformer(), make_transformer()]
    pins = PinBudget(limit=sum(cut_model(models[0]).outline.unit_bytes) * 3 // 2)
    expected = models[0](X)
    for model in models:
        backend = CpuBackend(VirtualMemory(10**9))
        model.streamer = Streamer(model, cut_model(model), backend, StreamingConfig(chunks=2), pins)
        model.streamer.load(model.streamer.plan_for(model.streamer.minimum_bytes))
        assert torch.equal(model(X), expected)
        model.streamer.finish_building()
    first, second = (model.streamer.snapshot() for model in models)
    assert first.building is second.building is False
    assert first.pinned_bytes < pins.limit
    assert second.pinned_bytes - second.ring_bytes == sum(models[1].streamer.outline.unit_bytes)
    assert "gave up page-locked memory" in first.explain, "the model that was used last goes first"
    for model in (*models, *models):
        assert torch.equal(model.streamer.run(lambda model=model: model(X)), expected)
        model.streamer.finish_building()
    models[0].streamer.close()
    assert pins.used == models[1].streamer.snapshot().pinned_bytes


def test_the_garbage_collector_may_run_on_a_copy_thread() -> None:
    model = make_transformer()
    streamer = make_streamer(model)
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    model(X)
    worker = streamer.backend._streams[0]
    model.itself, streamer.itself = model, streamer
    reference = weakref.ref(streamer)
    del model, streamer
    worker.submit(gc.collect).result(timeout=30)
    assert reference() is None


def test_memory_that_was_given_up_is_in_no_module() -> None:
    """A module that pointed at it still would keep it."""
    model, backend = make_transformer(), WatchedBackend()
    streamer = Streamer(model, cut_model(model), backend, StreamingConfig(slots=2))
    streamer.load(streamer.plan_for(10**9))
    before = backend.alive
    assert streamer.give_way(1 << 40) > 0
    assert backend.alive == backend.allocated < before


def test_a_step_keeps_its_master_copies() -> None:
    """Also from who asks for them on the thread that runs it."""
    model = make_transformer()
    streamer = make_streamer(model)
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    streamer.finish_building()
    expected, given = model(X), []
    handle = model.blocks[2].register_forward_pre_hook(lambda *_: given.append(streamer.give_up_masters(1 << 40)))
    assert torch.equal(streamer.run(lambda: model(X)), expected)
    handle.remove()
    assert given == [0]
    assert streamer.give_up_masters(1 << 40) > 0
