"""Weights that stream packed: the same bits come out, whatever happens to copies, plans and weights meanwhile."""

from __future__ import annotations

import gc
import mmap
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from inline import InlineExecutor, LazyExecutor
from models import Doubled, PinningBackend, Transformer, budgets
from packed_models import BUDGET, PACKED_IN_BLOCK, WIDTH, X, learned, make, make_model, spread, step, why
from weightstream.streaming import CpuBackend, State, StreamingError, VirtualMemory, cut_model
from weightstream.streaming.memory import host_memory as host_memory_file
from weightstream.streaming.memory import memory_ahead
from weightstream.streaming.memory import packing as packing_file
from weightstream.streaming.memory import packing_place as place_file
from weightstream.streaming.memory.sampling import SLICES, VALUES
from weightstream.streaming.packing import unpackers
from weightstream.streaming.run import lane as lane_file


@pytest.mark.parametrize("segment_bytes", [0, 200_000])
@pytest.mark.parametrize("slots", [1, 2, 4])
def test_output_is_the_same_at_every_budget(slots: int, segment_bytes: int) -> None:
    model = make_model()
    expected = model(X)
    memory = VirtualMemory(10**9)
    streamer = make(model, CpuBackend(memory), stream_all=False, slots=slots, segment_bytes=segment_bytes)
    learned(streamer, model)
    found = set()
    for budget in budgets(streamer):
        plan = streamer.plan_for(budget)
        streamer.unload()
        streamer.site.weight_copies.clear_host()
        memory.budget = plan.device_bytes  # Packing takes no more than the plan.
        streamer.load(plan)
        found.add(len(plan.packed))
        for _ in range(3):
            assert torch.equal(step(streamer, model), expected)
        assert streamer.plan == plan
        assert memory.allocated == plan.device_bytes <= budget
        memory.budget = 10**9
    assert len(found) > 3
    streamer.close()
    assert memory.allocated == 0


def test_what_is_packed_takes_less_on_the_bus_and_in_ram() -> None:
    model = make_model()
    backend = PinningBackend()
    streamer = make(model, backend)
    plan = learned(streamer, model)
    assert len(plan.packed) == 4 * PACKED_IN_BLOCK
    assert 0.70 < plan.streamed_bytes / plan.streamed_weight_bytes < 0.72
    assert sum(backend.registered.values()) <= plan.streamed_bytes
    snapshot = streamer.snapshot()
    assert snapshot.streamed_block_bytes == plan.streamed_bytes
    assert snapshot.streamed_weight_bytes == plan.streamed_weight_bytes
    assert why(streamer) == ""
    assert snapshot.pinned_bytes == sum(backend.registered.values())
    assert snapshot.staged_bytes == 0
    assert "MiB of weights) a step streamed" in streamer.explain()
    streamer.close()
    assert backend.registered == {}


def test_blocks_may_run_twice_and_in_another_order() -> None:
    model = make_model()
    streamer = make(model, slots=2)
    learned(streamer, model)
    for order in ([0, 1, 2, 3], [3, 3, 0, 1], [2, 0, 2, 1], [1], [0, 1, 2, 3]):
        expected = make_model()(X, order=order)
        assert torch.equal(step(streamer, model, order=order), expected)


def test_a_packed_segment_may_begin_while_another_runs() -> None:
    """A layer that calls one of another block: both are unpacked then, the second in memory of its own."""
    model = make_model()
    inner = model.blocks[3].out
    model.blocks[0].qkv.register_forward_pre_hook(lambda module, args: (args[0] + inner(args[0]),))
    expected = model(X)
    memory = VirtualMemory(10**9)
    streamer = make(model, CpuBackend(memory), slots=4, segment_bytes=0)
    plan = learned(streamer, model)
    assert plan.packed
    for _ in range(3):
        assert torch.equal(step(streamer, model), expected)
    assert memory.allocated == streamer.plan.device_bytes


@pytest.mark.parametrize("sampled", [True, False])
def test_what_does_not_shrink_streams_as_it_is(sampled: bool) -> None:
    """Whether that is known before it is packed, from a sample, or is seen then."""
    model = make_model()
    weight = model.blocks[1].qkv.weight
    with torch.no_grad():
        values = weight.flatten().view(SLICES, -1)
        begin = 0 if sampled else VALUES // SLICES
        values[:, begin:] = spread(values[:, begin:].shape)
        weight.copy_(values.view(weight.shape))
    expected = model(X)
    backend = PinningBackend()
    streamer = make(model, backend)
    plan = learned(streamer, model)
    names = {streamer.blocks.units[unit].name for unit in plan.streamed - plan.packed}
    assert "blocks.1.qkv" in names
    assert len(plan.packed) == 4 * PACKED_IN_BLOCK - 1
    told = "" if sampled else "1 of 16 layers do not stream packed: they take more room than was planned"
    assert why(streamer) == told
    for _ in range(2):
        assert torch.equal(step(streamer, model), expected)
    assert streamer.snapshot().pinned_bytes == sum(backend.registered.values()), "nothing is counted that is not there"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_where_no_more_may_be_page_locked_the_others_come_from_where_they_are(share: float) -> None:
    model = make_model()
    expected = model(X)
    limit = int(share * 0.73 * cut_model(model).outline.model_bytes)
    streamer = make(model, PinningBackend(), pinned_limit=limit, chunk_bytes=2048, chunks=3)
    plan = learned(streamer, model)
    left = 4 * PACKED_IN_BLOCK - len(plan.packed)
    assert why(streamer) == f"{left} of 16 layers do not stream packed: no page-locked memory is left for them"
    for _ in range(2):
        assert torch.equal(step(streamer, model), expected)


@pytest.fixture
def host_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Returns how many bytes of host memory were mapped at most since the last call. Nobody collects garbage."""
    mapped, most = {}, [0]
    own = host_memory_file._map

    def count(nbytes: int) -> mmap.mmap:
        memory = own(nbytes)
        mapped[id(memory)] = nbytes
        weakref.finalize(memory, mapped.pop, id(memory))
        most[0] = max(most[0], sum(mapped.values()))
        return memory

    def most_since() -> int:
        found, most[0] = most[0], sum(mapped.values())
        return found

    monkeypatch.setattr(host_memory_file, "_map", count)
    gc.disable()
    yield most_since
    gc.enable()


def test_host_memory_holds_hardly_more_than_one_copy_of_each_unit(
    host_memory: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Master copies go one by one, while packed ones come."""
    monkeypatch.setattr(memory_ahead, "UNITS_AHEAD", 1)
    monkeypatch.setattr(memory_ahead, "ThreadPoolExecutor", InlineExecutor)
    model = make_model()
    streamer = make(model, PinningBackend(), chunk_bytes=2048, chunks=3)
    streamer.load(streamer.plan_for(BUDGET))
    for _ in range(2):
        step(streamer, model)
    whole = sum(streamer.backend.registered.values())
    assert whole >= streamer.outline.model_bytes * 0.9
    host_memory()
    step(streamer, model)
    assert streamer.plan.packed
    largest = max(unit.nbytes for unit in streamer.blocks.units)
    assert whole < host_memory() <= whole + 2 * largest + streamer.config.chunk_bytes * streamer.config.chunks
    assert host_memory() == sum(streamer.backend.registered.values()) < 0.75 * whole


@pytest.mark.parametrize("share", [0.98, 1.0, 1.05])
def test_where_master_copies_fill_the_limit_all_is_packed(share: float) -> None:
    """A unit's own master copy goes for it, as the weights are on the device by then."""
    model = make_model()
    limit = int(share * cut_model(model).outline.model_bytes)
    streamer = make(model, PinningBackend(), pinned_limit=limit, chunk_bytes=2048, chunks=3)
    plan = learned(streamer, model)
    assert len(plan.packed) == 4 * PACKED_IN_BLOCK
    assert torch.equal(step(streamer, model), make_model()(X))
    assert streamer.snapshot().note == ""


@pytest.mark.parametrize("executor", [ThreadPoolExecutor, LazyExecutor])
@pytest.mark.parametrize("share", [0.8, 1.1])
def test_room_for_all_packed_copies_is_enough(executor: type, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where not all units have master copies, whenever those give their memory back."""
    monkeypatch.setattr(memory_ahead, "ThreadPoolExecutor", executor)
    model = make_model()
    expected = model(X)
    limit = int(share * cut_model(model).outline.model_bytes)
    streamer = make(model, PinningBackend(), pinned_limit=limit, chunk_bytes=2048, chunks=3)
    plan = learned(streamer, model)
    assert len(plan.packed) == 4 * PACKED_IN_BLOCK
    assert torch.equal(step(streamer, model), expected)


class DoubledAnew(Doubled):
    """As others double, but others do not know."""

    def signature(self, name: str) -> object | None:
        return (self, name) if super().signature(name) is not None else None


def test_patches_are_written_into_what_is_packed_and_the_file_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the memory where it is packed. What had patches in it before comes from where it was loaded from."""
    model, reference = make_model(), make_model()
    names = {"blocks.0.qkv.weight", "blocks.2.out.weight"}
    with torch.no_grad():
        for name in names:
            reference.get_parameter(name).mul_(2)
    loads: list[object] = []
    own = place_file.Load
    monkeypatch.setattr(place_file, "Load", lambda *args: loads.append(args) or own(*args))
    backend = PinningBackend()
    streamer = make(model, backend)
    learned(streamer, model)
    del loads[:]
    locked = dict(backend.registered)
    streamer.load(streamer.plan, Doubled(names))
    assert loads == []
    assert backend.registered == locked
    assert torch.equal(model(X), reference(X))
    streamer.load(streamer.plan, DoubledAnew(names))
    assert len(loads) == 2
    assert backend.registered == locked
    assert torch.equal(model(X), reference(X))


@pytest.mark.parametrize("in_first_step", [False, True], ids=["packed before", "not yet"])
def test_weights_with_patches_are_packed_too(packed_units: list[int], in_first_step: bool) -> None:
    model, reference = make_model(), make_model()
    plain = reference(X)
    names = {"blocks.0.qkv.weight", "blocks.2.out.weight"}
    with torch.no_grad():
        for name in names:
            reference.get_parameter(name).mul_(2)
    patched = reference(X)
    streamer = make(model)
    if not in_first_step:
        learned(streamer, model)
    for _ in range(2):
        patches = Doubled(names)
        streamer.begin_run()
        streamer.begin_prompt()
        streamer.load(streamer.plan_for(BUDGET), patches)
        for _ in range(4):
            output = streamer.run(
                lambda: model(X), shape="x", reload=lambda plan, patches=patches: streamer.load(plan, patches)
            )
            assert torch.equal(output, patched)
        assert len(streamer.plan.packed) == 4 * PACKED_IN_BLOCK
        assert sorted(patches.computed) == sorted(names), "each is computed once"
        del packed_units[:]
        streamer.begin_run()
        streamer.begin_prompt()
        streamer.load(streamer.plan_for(BUDGET))
        for _ in range(2):
            assert torch.equal(step(streamer, model), plain)
        assert len(streamer.plan.packed) == 4 * PACKED_IN_BLOCK
        assert len(packed_units) == 2, "nothing but what was patched is packed anew"
    with streamer.originals():
        assert torch.equal(model.blocks[0].qkv.weight, make_model().blocks[0].qkv.weight)


class Longer(Doubled):
    """Makes weights longer."""

    def compute(self, name: str, original: torch.Tensor) -> torch.Tensor:
        return torch.cat([super().compute(name, original), original[:1]])


def test_a_patch_that_changes_a_shape_is_not_packed() -> None:
    model = make_model()
    streamer = make(model)
    learned(streamer, model)
    layer, seen = model.blocks[1].qkv, []
    streamer.begin_run()
    streamer.begin_prompt()
    streamer.load(streamer.plan_for(BUDGET), Longer({"blocks.1.qkv.weight"}))
    handle = layer.register_forward_pre_hook(lambda *_: seen.append(layer.weight.shape))
    with torch.no_grad(), pytest.raises(RuntimeError):
        model(X)  # The layer itself cannot run: what it would run with is what counts.
    handle.remove()
    assert seen == [(3 * WIDTH + 1, WIDTH)]
    assert why(streamer) == "1 of 16 layers do not stream packed: they take more room than was planned"
    assert len(streamer.plan.packed) == 4 * PACKED_IN_BLOCK - 1


@pytest.mark.parametrize("packed_before", [True, False])
def test_what_others_write_to_master_copies_is_what_runs(packed_before: bool) -> None:
    """As the host's hooks do: they ask for copies, write to what modules hold, and undo it later."""
    model, reference = make_model(), make_model()
    plain = reference(X)
    name = "blocks.1.mlp.0.weight"
    with torch.no_grad():
        reference.get_parameter(name).mul_(2)
    doubled = reference(X)
    streamer = make(model)
    if packed_before:
        learned(streamer, model)
    else:
        streamer.load(streamer.plan_for(BUDGET))
        assert torch.equal(step(streamer, model), plain)
        assert torch.equal(step(streamer, model), plain)
        assert not streamer.plan.packed
    with torch.no_grad():
        streamer.make_masters({name})
        model.blocks[1].mlp[0].weight.mul_(2)
        streamer.invalidate()
        streamer.lend_masters()
        for _ in range(2):
            assert torch.equal(step(streamer, model), doubled)
        assert len(streamer.plan.packed) == 4 * PACKED_IN_BLOCK - 1
        assert why(streamer) == "1 of 16 layers do not stream packed: other code writes to them"
        model.blocks[1].mlp[0].weight.div_(2)
        streamer.invalidate()
        streamer.take_masters_back()
    assert torch.equal(step(streamer, model), plain)
    streamer.begin_run()
    streamer.begin_prompt()
    streamer.load(streamer.plan_for(BUDGET))
    assert torch.equal(step(streamer, model), plain)
    assert len(streamer.plan.packed) == 4 * PACKED_IN_BLOCK


def test_others_write_to_patched_weights_as_they_are_patched() -> None:
    """A hook and a LoRA on one weight: what the host keeps of it, and writes back, has the LoRA in it."""
    model, reference = make_model(), make_model()
    name = "blocks.1.mlp.0.weight"
    with torch.no_grad():
        reference.get_parameter(name).mul_(2)
    patched = reference(X)
    with torch.no_grad():
        reference.get_parameter(name).mul_(4)
    both = reference(X)
    patches = Doubled({name})
    streamer = make(model)
    learned(streamer, model)

    def run() -> torch.Tensor:
        return streamer.run(lambda: model(X), shape="x", reload=lambda plan: streamer.load(plan, patches))

    streamer.begin_run()
    streamer.begin_prompt()
    streamer.load(streamer.plan_for(BUDGET), patches)
    assert torch.equal(run(), patched)
    with torch.no_grad():
        streamer.make_masters({name})
        weight = model.blocks[1].mlp[0].weight
        kept = weight.clone()
        weight.mul_(4)
        streamer.invalidate()
        streamer.lend_masters()
        for _ in range(2):
            assert torch.equal(run(), both)
        model.blocks[1].mlp[0].weight.copy_(kept)
        streamer.invalidate()
        streamer.take_masters_back()
    for _ in range(2):
        assert torch.equal(run(), patched)
        streamer.begin_run()
        streamer.begin_prompt()
        streamer.load(streamer.plan_for(BUDGET), patches)
    assert len(streamer.plan.packed) == 4 * PACKED_IN_BLOCK
    assert torch.equal(run(), patched)


def test_where_no_memory_may_be_page_locked_nothing_is_packed_in_any_prompt(packed_units: list[int]) -> None:
    model = make_model()
    expected = model(X)
    limit = int(0.4 * 0.73 * cut_model(model).outline.model_bytes)
    for setting in ({"pin_memory": False}, {"pinned_limit": limit}):
        streamer = make(model, PinningBackend(), **setting)
        learned(streamer, model)
        for _ in range(3):
            del packed_units[:]
            streamer.begin_run()
            streamer.begin_prompt()
            streamer.load(streamer.next_plan(BUDGET))
            assert torch.equal(step(streamer, model), expected)
            assert len(packed_units) <= 1, "it stops at the first that has no room"


def in_float16(model: Transformer) -> None:
    """Exchange weights for those of another dtype, of as many bytes."""
    for block in model.blocks:
        for layer in (block.qkv, block.out):
            layer.weight = torch.nn.Parameter(layer.weight.to(torch.float16), requires_grad=False)
            layer.forward = lambda x, layer=layer: torch.nn.functional.linear(x, layer.weight.to(x.dtype), layer.bias)


def test_weights_of_another_dtype_are_planned_anew() -> None:
    model, reference = make_model(), make_model()
    in_float16(reference)
    streamer = make(model)
    before = learned(streamer, model)
    in_float16(model)
    changes = streamer.changes()
    assert len(changes) == 8
    streamer.show(changes)
    streamer.take_up(cut_model(model), changes)
    assert len(streamer.plan_for(BUDGET).packed) == len(before.packed), "at once, as the device is known"
    plan = learned(streamer, model)
    assert len(plan.packed) == len(before.packed)
    assert plan.streamed_bytes > before.streamed_bytes * 1.1
    for _ in range(3):
        assert torch.equal(step(streamer, model), reference(X))


def test_where_others_are_expected_to_write_nothing_is_packed() -> None:
    model = make_model()
    expected = model(X)
    streamer = make(model)
    everything = learned(streamer, model).packed
    for writes in (True, False):
        streamer.expect_writes(writes)
        streamer.begin_run()
        streamer.begin_prompt()
        streamer.load(streamer.next_plan(BUDGET))
        for _ in range(2):
            assert torch.equal(step(streamer, model), expected)
        assert streamer.plan.packed == (set() if writes else everything)
        assert why(streamer) == ("weights do not stream packed: hooks change them in this prompt" if writes else "")


def test_what_others_write_to_what_modules_show_is_noticed() -> None:
    model = make_model()
    streamer = make(model)
    learned(streamer, model)
    assert not streamer.changes()
    with torch.no_grad():
        model.blocks[2].qkv.weight[0, 0] = 3.0
    assert [change.value.name for change in streamer.changes()] == ["blocks.2.qkv.weight"]


def test_writes_of_a_block_to_its_unpacked_weights_are_an_error() -> None:
    model = make_model()
    streamer = make(model)
    learned(streamer, model)

    def double(module: torch.nn.Module, *_: object) -> None:
        module.weight.mul_(2)

    handle = model.blocks[1].out.register_forward_hook(double)
    with torch.no_grad(), pytest.raises(StreamingError, match=r"blocks\.1\.out were written to"):
        step(streamer, model)
    handle.remove()
    assert torch.equal(step(streamer, model), make_model()(X))


def test_packed_copies_stay_until_they_are_given_up(packed_units: list[int]) -> None:
    model = make_model()
    expected = model(X)
    streamer = make(model, PinningBackend())
    plan = learned(streamer, model)
    assert len(packed_units) == len(plan.packed)
    for _ in range(2):
        streamer.unload()
        assert torch.equal(model(X), expected)
        streamer.load(streamer.plan_for(BUDGET))
        assert torch.equal(step(streamer, model), expected)
    assert len(packed_units) == len(plan.packed)
    assert streamer.give_up_masters(streamer.reader.ring_bytes + 1) > 0
    assert streamer.state is State.REDUCED
    assert torch.equal(step(streamer, model), expected)
    assert len(packed_units) == len(plan.packed) + 1
    taken = sum(streamer.backend.registered.values())
    assert streamer.give_up_masters(1 << 40) >= taken > 0
    assert streamer.backend.registered == {}
    assert torch.equal(step(streamer, model), expected)
    assert len(packed_units) == 2 * len(plan.packed) + 1


def test_a_resident_needs_no_packed_copy(packed_units: list[int]) -> None:
    model = make_model()
    backend = PinningBackend()
    streamer = make(model, backend, stream_all=False)
    assert learned(streamer, model).packed
    streamer.load(streamer.plan_for(10**9))
    assert torch.equal(step(streamer, model), make_model()(X))
    assert backend.registered == {}


def test_unpacking_is_not_measured_as_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of a second shape are measured while weights are packed."""
    slow = 0.02

    class Slow:
        reason = ""

        def prepare(self, packed: torch.Tensor, out: torch.Tensor) -> Callable[[], None]:
            run = unpackers.TorchUnpacker("").prepare(packed, out)
            return lambda: (time.sleep(slow), run())

    monkeypatch.setattr(lane_file, "unpacker_of", lambda device: Slow())
    model = make_model()
    streamer = make(model)
    assert len(learned(streamer, model).packed) == 4 * PACKED_IN_BLOCK
    for _ in range(3):
        streamer.run(lambda: model(X), shape="another", reload=streamer.load)
        assert len(streamer.plan.packed) == 4 * PACKED_IN_BLOCK, "also while nothing is known of the shape"
    streamer.learn()
    assert streamer.profile.measured
    assert len(streamer.plan.packed) == 4 * PACKED_IN_BLOCK
    assert streamer.snapshot().step_seconds > 4 * PACKED_IN_BLOCK * slow
    assert streamer.profile.compute_seconds < 4 * PACKED_IN_BLOCK * slow / 2


def fails(calls: Callable[[int], bool]) -> Callable[..., object]:
    own, count = packing_file.measure_unit, [0]

    def measure_unit(*args: object) -> object:
        count[0] += 1
        if calls(count[0]):
            raise RuntimeError("the device has failed")
        return own(*args)

    return measure_unit


def test_an_error_while_weights_are_packed_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    backend = PinningBackend()
    streamer = make(model, backend)
    streamer.load(streamer.plan_for(BUDGET))
    step(streamer, model)
    step(streamer, model)
    monkeypatch.setattr(packing_file, "measure_unit", fails(lambda call: call == 3))
    with pytest.raises(RuntimeError, match="the device has failed"):
        step(streamer, model)
    assert streamer.state is State.UNLOADED
    assert backend.allocated == 0
    streamer.load(streamer.plan_for(BUDGET))
    assert torch.equal(step(streamer, model), make_model()(X))
    streamer.close()
    assert backend.registered == {}
    assert backend.allocated == 0
