from __future__ import annotations

import gc
import itertools
import sys
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch
from models import Transformer, make_transformer
from race import NumberedModel, RaceBackend
from torch import nn
from weightstream.streaming import (
    BudgetError,
    CpuBackend,
    DeviceMemoryError,
    PinBudget,
    RingExhaustedError,
    State,
    Streamer,
    StreamingConfig,
    UnsupportedModelError,
    VirtualMemory,
    split_model,
)
from weightstream.streaming.plan import Plan

X = torch.linspace(-1, 1, 3 * 5 * 32).reshape(3, 5, 32)


def make_streamer(model: Transformer, budget: int = 10**9, **settings: int) -> Streamer:
    return Streamer(model, split_model(model), CpuBackend(VirtualMemory(budget)), StreamingConfig(**settings))


def budgets(streamer: Streamer) -> Iterator[int]:
    """From everything resident down to one slot."""
    for step in range(9):
        yield streamer.model_bytes - (streamer.model_bytes - streamer.minimum_bytes) * step // 8


@pytest.mark.parametrize("copy_streams", [0, 1, 2, 3])
@pytest.mark.parametrize("slots", [0, 1, 2, 5])
def test_output_is_the_same_at_every_budget(copy_streams: int, slots: int) -> None:
    model = make_transformer()
    expected = model(X)
    streamer = make_streamer(model, copy_streams=copy_streams, slots=slots)
    for budget in budgets(streamer):
        streamer.load(streamer.plan_for(budget))
        for _ in range(3):
            assert torch.equal(model(X), expected)
        assert streamer.backend.allocated == streamer.device_bytes <= budget
    streamer.unload()
    assert streamer.backend.allocated == 0
    assert torch.equal(model(X), expected)


def test_every_access_to_a_slot_is_ordered() -> None:
    """All sets of streamed blocks up to 5 blocks, many above, with blocks skipped, repeated and reordered."""
    checked = 0
    for blocks, slots, copy_streams in itertools.product(range(2, 10), range(1, 6), range(4)):
        everything = list(range(blocks))
        orders = [everything, everything[::2], everything[::-1], sorted(everything * 2), [0], everything]
        for streamed in range(1, 2**blocks, 1 if blocks < 6 else 7 * (blocks - 5)):
            chosen = tuple(index for index in everything if streamed >> index & 1)
            backend = RaceBackend()
            model = NumberedModel(blocks, backend)
            streamer = Streamer(model, split_model(model), backend, StreamingConfig(copy_streams, slots))
            streamer.load(Plan(streamer.blocks.sizes, 0, chosen, min(slots, len(chosen))))
            for order in orders:
                assert model(order) == order
            checked += backend.accesses
    assert checked > 50_000


def test_the_race_detector_sees_a_missing_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = RaceBackend()
    model = NumberedModel(4, backend)
    streamer = Streamer(model, split_model(model), backend, StreamingConfig())
    streamer.load(Plan(streamer.blocks.sizes, 0, (0, 1, 2, 3), 2))
    monkeypatch.setattr(backend, "wait", lambda event: lambda: 0.0)
    with pytest.raises(AssertionError, match="before the copy into it is done"):
        model([0, 1, 2, 3])


def test_the_race_detector_sees_a_slot_freed_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = RaceBackend()
    model = NumberedModel(4, backend)
    streamer = Streamer(model, split_model(model), backend, StreamingConfig())
    streamer.load(Plan(streamer.blocks.sizes, 0, (0, 1, 2, 3), 2))
    monkeypatch.setattr(backend, "mark", dict)
    with pytest.raises(AssertionError, match="may still be read"):
        model([0, 1, 2, 3])


def test_steady_steps_never_miss_and_copy_each_streamed_block_once() -> None:
    model = make_transformer(depth=8)
    streamer = make_streamer(model)
    streamer.load(streamer.plan_for(streamer.minimum_bytes + 3 * streamer.blocks.sizes[0]))
    plan = streamer.plan
    assert plan is not None
    assert plan.streamed
    assert plan.resident
    for _ in range(5):
        model(X)
    counters = streamer.counters
    assert counters.steps == 5
    assert counters.misses == 0
    assert counters.hits == 5 * len(plan.streamed)
    # The copies ahead of the sixth step are under way.
    assert counters.copies == 5 * len(plan.streamed) + plan.slots
    assert counters.streamed_bytes == counters.copies * streamer.blocks.sizes[0]


def test_a_changed_order_costs_copies_and_no_correctness() -> None:
    model = make_transformer(depth=6)
    orders = [None, [5, 4, 3, 2, 1, 0], [0, 0, 3, 3], [2], None, [1, 3, 5]]
    expected = [model(X, order) for order in orders]
    streamer = make_streamer(model)
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    for _ in range(3):
        for order, result in zip(orders, expected, strict=True):
            assert torch.equal(model(X, order), result)
    assert streamer.counters.misses > 0


class Stop(BaseException):
    """Like the host's interrupt: no ``Exception``, so torch runs no hooks for it."""


@pytest.mark.parametrize("kind", [Stop, ValueError])
@pytest.mark.parametrize("block", range(6))
def test_an_interrupted_block_is_let_go_of(
    block: int, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_transformer()
    expected = model(X)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    streamer = make_streamer(model)
    streamer.load(streamer.plan_for(streamer.minimum_bytes))

    def interrupt(x: torch.Tensor) -> torch.Tensor:
        raise kind

    with monkeypatch.context() as patch:
        patch.setattr(model.blocks[block].mlp[1], "forward", interrupt)
        with pytest.raises(kind):
            model(X)
    streamer.settle()
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    assert torch.equal(model(X), expected)
    assert torch.equal(model(X), expected)


def test_an_interrupt_without_settling_heals_with_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_transformer()
    expected = model(X)
    streamer = make_streamer(model)
    streamer.load(streamer.plan_for(streamer.minimum_bytes))

    def interrupt(x: torch.Tensor) -> torch.Tensor:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(model.blocks[3].out, "forward", interrupt)
        with pytest.raises(Stop):
            model(X)
    assert torch.equal(model(X), expected)


class FailingBackend(CpuBackend):
    """The n-th copy fails: ``at_once`` when it is queued, else later, on its worker."""

    def __init__(self, failing_copy: int, at_once: bool) -> None:
        super().__init__(VirtualMemory(10**9))
        self.copies = 0
        self.failing_copy = failing_copy
        self.at_once = at_once

    def _copy_piece(self, stream, target, source, waits):
        self.copies += 1
        if self.copies != self.failing_copy:
            return super()._copy_piece(stream, target, source, waits)
        target.fill_(255)  # A slot that was half written must never be taken for a block.
        if self.at_once:
            raise OSError("the copy failed")
        return stream.submit(self._fail)

    @staticmethod
    def _fail() -> None:
        raise OSError("the copy failed")


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("failing_copy", range(3, 12))
def test_a_failed_copy_is_an_error_and_never_a_wrong_weight(failing_copy: int, at_once: bool) -> None:
    model = make_transformer()
    expected = model(X)
    backend = FailingBackend(failing_copy, at_once)
    streamer = Streamer(model, split_model(model), backend, StreamingConfig())
    streamer.load(streamer.plan_for(streamer.minimum_bytes + streamer.blocks.sizes[0]))
    errors = 0
    for _ in range(4):
        try:
            assert torch.equal(model(X), expected)
        except OSError:
            errors += 1
    assert errors == 1


def test_a_failed_first_copy_unloads_the_model() -> None:
    model = make_transformer()
    expected = model(X)
    backend = FailingBackend(1, at_once=True)
    streamer = Streamer(model, split_model(model), backend, StreamingConfig())
    with pytest.raises(OSError, match="the copy failed"):
        streamer.load(streamer.plan_for(streamer.minimum_bytes))
    assert streamer.state is State.UNLOADED
    assert backend.allocated == 0
    assert torch.equal(model(X), expected)


def test_a_failed_load_gives_everything_back() -> None:
    model = make_transformer()
    expected = model(X)
    streamer = make_streamer(model, budget=200_000)
    plan = streamer.plan_for(10**9)
    assert plan.device_bytes > 200_000
    with pytest.raises(DeviceMemoryError, match="virtual:0 has"):
        streamer.load(plan)
    assert streamer.state is State.UNLOADED
    assert streamer.backend.allocated == 0
    assert torch.equal(model(X), expected)


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


def test_no_memory_is_kept_alive_by_what_has_moved_on() -> None:
    """Also on the way from one plan to the next no more is alive than the larger of the two asks for."""
    model = make_transformer(depth=8)
    backend = WatchedBackend()
    streamer = Streamer(model, split_model(model), backend, StreamingConfig())
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


def test_a_budget_below_one_block_names_the_minimum() -> None:
    streamer = make_streamer(make_transformer())
    with pytest.raises(BudgetError) as caught:
        streamer.plan_for(streamer.minimum_bytes - 1)
    assert caught.value.minimum == streamer.minimum_bytes


def test_the_configured_limit_holds() -> None:
    model = make_transformer()
    streamer = make_streamer(model, vram_limit=120_000)
    streamer.load(streamer.plan_for(10**9))
    assert 0 < streamer.backend.peak <= 120_000


def test_loading_twice_does_nothing() -> None:
    model = make_transformer()
    streamer = make_streamer(model)
    plan = streamer.plan_for(streamer.minimum_bytes)
    streamer.load(plan)
    copies, slots = streamer.counters.copies, streamer.backend.allocated
    streamer.load(plan)
    assert (streamer.counters.copies, streamer.backend.allocated) == (copies, slots)


def test_masters_exist_for_streamed_blocks_only() -> None:
    model = make_transformer()
    streamer = make_streamer(model)
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    assert streamer.snapshot().pinned_bytes == sum(streamer.blocks.sizes)
    streamer.load(streamer.plan_for(10**9))
    assert streamer.snapshot().pinned_bytes == 0


def test_a_model_is_freed_without_the_garbage_collector() -> None:
    model = make_transformer()
    backend = CpuBackend(VirtualMemory(10**9))
    model.streamer = Streamer(model, split_model(model), backend, StreamingConfig())
    model.streamer.load(model.streamer.plan_for(0 + model.streamer.minimum_bytes))
    model(X)
    references = [weakref.ref(model), weakref.ref(model.streamer), weakref.ref(model.blocks[0])]
    gc.disable()
    try:
        del model
        assert [reference() for reference in references] == [None] * 3
    finally:
        gc.enable()
    assert backend.memory.allocated == 0


def test_weights_written_in_place_are_copied_anew() -> None:
    model = make_transformer()
    streamer = make_streamer(model)
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    model(X)
    for block in model.blocks:
        block.out.weight.mul_(0.5)
    streamer.invalidate()
    result = model(X)
    reference = make_transformer()
    for block in reference.blocks:
        block.out.weight.mul_(0.5)
    assert torch.equal(result, reference(X))


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
    streamer = Streamer(model, split_model(model), backend, StreamingConfig(), pins)
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    model(X)
    assert len(backend.registered) == 6
    assert pins.used == sum(streamer.blocks.sizes)
    # Still looked at by somebody: the memory must stay valid, and must not stay locked.
    weight = model.blocks[0].qkv.weight
    value = weight.clone()
    del model, streamer
    gc.collect()
    assert backend.registered == set()
    assert pins.used == 0
    assert torch.equal(weight, value)


def test_models_share_what_may_be_page_locked() -> None:
    models = [make_transformer(), make_transformer()]
    pins = PinBudget(limit=sum(split_model(models[0]).sizes) * 3 // 2)
    expected = models[0](X)
    for model in models:
        backend = CpuBackend(VirtualMemory(10**9))
        model.streamer = Streamer(model, split_model(model), backend, StreamingConfig(), pins)
        model.streamer.load(model.streamer.plan_for(model.streamer.minimum_bytes))
        assert torch.equal(model(X), expected)
    first, second = (model.streamer.snapshot() for model in models)
    assert first.pageable_bytes == 0
    assert second.pageable_bytes > 0
    assert "page-locked memory is reached" in second.note
    models[0].streamer.close()
    assert pins.used == second.pinned_bytes


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


def test_a_status_may_be_asked_for_at_any_time() -> None:
    model = make_transformer()
    streamer = make_streamer(model)
    errors: list[Exception] = []
    stop = threading.Event()

    def ask() -> None:
        try:
            while not stop.is_set():
                streamer.snapshot().as_dict()
        except Exception as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=ask)
    thread.start()
    try:
        for _ in range(100):
            streamer.load(streamer.plan_for(streamer.minimum_bytes))
            model(X)
            streamer.unload()
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert errors == []


def test_an_interrupt_in_a_resident_block_teaches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_transformer()
    streamer = make_streamer(model)
    streamer.load(Plan(streamer.blocks.sizes, streamer.blocks.rest.nbytes, (0, 1, 3, 5), 2))

    def interrupt(x: torch.Tensor) -> torch.Tensor:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(model.blocks[4].out, "forward", interrupt)
        with pytest.raises(Stop):
            model(X)
    for _ in range(3):
        model(X)
    assert streamer._schedule is not None
    assert streamer._schedule.order == [0, 1, 3, 5]


class Doubled:
    """A patch that doubles some weights."""

    def __init__(self, names: set[str]) -> None:
        self.names = names
        self.computed: list[str] = []

    def signature(self, name: str) -> object | None:
        return "doubled" if name in self.names else None

    def compute(self, name: str, original: torch.Tensor) -> torch.Tensor:
        self.computed.append(name)
        return original * 2


def test_patches_are_baked_once_and_taken_out_again() -> None:
    model = make_transformer()
    plain = model(X)
    names = {f"blocks.{index}.qkv.weight" for index in range(6)} | {"input.weight"}
    reference = make_transformer()
    for name in names:
        reference.get_parameter(name).mul_(2)
    patched = reference(X)
    streamer = make_streamer(model)
    for budget in budgets(streamer):
        plan = streamer.plan_for(budget)
        patches = Doubled(names)
        streamer.load(plan, patches)
        assert torch.equal(model(X), patched)
        streamer.load(plan, patches)
        assert sorted(patches.computed) == sorted(set(patches.computed))
        one_less = Doubled(names - {"blocks.3.qkv.weight"})
        streamer.load(plan, one_less)
        assert one_less.computed == []
        with streamer.originals():
            assert torch.equal(model.blocks[0].qkv.weight, make_transformer().blocks[0].qkv.weight)
        streamer.load(plan)
        assert torch.equal(model(X), plain)


def test_an_unloaded_model_shows_its_originals() -> None:
    model = make_transformer()
    original = model.blocks[2].out.weight.clone()
    streamer = make_streamer(model)
    streamer.load(streamer.plan_for(streamer.minimum_bytes), Doubled({"blocks.2.out.weight"}))
    assert torch.equal(model.blocks[2].out.weight, original * 2)
    streamer.unload()
    assert torch.equal(model.blocks[2].out.weight, original)
    with streamer.originals():
        assert torch.equal(model.blocks[2].out.weight, original)
    assert torch.equal(model.blocks[2].out.weight, original)


def test_patched_residents_stay_patched_when_they_become_streamed() -> None:
    model = make_transformer()
    patches = Doubled({"blocks.2.out.weight"})
    streamer = make_streamer(model)
    streamer.load(streamer.plan_for(10**9), patches)
    expected = model(X)
    streamer.load(streamer.plan_for(streamer.minimum_bytes), patches)
    assert torch.equal(model(X), expected)
    assert patches.computed == ["blocks.2.out.weight"]


def test_a_failed_patch_leaves_a_clean_model() -> None:
    model = make_transformer()
    plain = model(X)

    class Broken(Doubled):
        def compute(self, name: str, original: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no such adapter")

    streamer = make_streamer(model)
    plan = streamer.plan_for(streamer.minimum_bytes)
    with pytest.raises(RuntimeError, match="no such adapter"):
        streamer.load(plan, Broken({"blocks.2.out.weight"}))
    assert streamer.backend.allocated == 0
    streamer.load(plan)
    assert torch.equal(model(X), plain)


def test_a_patch_that_changes_a_shape_is_refused() -> None:
    model = make_transformer()

    class Wider(Doubled):
        def compute(self, name: str, original: torch.Tensor) -> torch.Tensor:
            return torch.cat([original, original])

    streamer = make_streamer(model)
    with pytest.raises(UnsupportedModelError, match=r"blocks\.2\.out\.weight from \(32, 32\) to \(64, 32\)"):
        streamer.load(streamer.plan_for(streamer.minimum_bytes), Wider({"blocks.2.out.weight"}))


def test_blocks_inside_blocks_are_refused_with_one_slot_and_run_with_two() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            handle = self.blocks[0].register_forward_pre_hook(lambda module, args: (self.blocks[1](args[0]),))
            try:
                return self.blocks[2](self.blocks[0](x))
            finally:
                handle.remove()

    model = Nested().requires_grad_(False)
    x = torch.rand(2, 8)
    expected = model(x)
    streamer = make_streamer(model, slots=2)
    streamer.load(Plan(streamer.blocks.sizes, 0, (0, 1, 2), 2))
    assert torch.equal(model(x), expected)
    streamer.load(Plan(streamer.blocks.sizes, 0, (0, 1, 2), 1))
    with pytest.raises(RingExhaustedError):
        model(x)


def test_the_snapshot_is_plain_values() -> None:
    model = make_transformer()
    streamer = make_streamer(model)
    assert streamer.snapshot().mode == "off"
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    model(X)
    snapshot = streamer.snapshot().as_dict()
    assert snapshot["mode"] == "streamed"
    assert snapshot["streamed_blocks"] == 6
    assert snapshot["counters"]["steps"] == 1
    streamer.load(streamer.plan_for(10**9))
    assert streamer.snapshot().mode == "resident"
