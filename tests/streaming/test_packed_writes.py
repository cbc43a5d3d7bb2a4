"""What other code does to weights that are packed, or about to be, has the effect that it has on others."""

from __future__ import annotations

import pytest
import torch
from models import Doubled, PinningBackend
from packed_models import BUDGET, X, learned, make, make_model, step
from weightstream.streaming import CpuBackend, Streamer, VirtualMemory, cut_model
from weightstream.streaming.config import PackingMode
from weightstream.streaming.memory.weights import Patches

MODES = [PackingMode.OFF, PackingMode.ON]
NAME = "blocks.1.mlp.0.weight"


class Prompts:
    """Prompts on a model, with patches."""

    def __init__(self, streamer: Streamer, patches: Patches) -> None:
        self.streamer = streamer
        self.patches = patches

    def begin(self) -> None:
        self.streamer.begin_run()
        self.streamer.load(self.streamer.plan_for(BUDGET), self.patches)
        self.streamer.begin_prompt()

    def step(self) -> torch.Tensor:
        root = self.streamer.root
        return self.streamer.run(lambda: root(X), shape="x", reload=lambda plan: self.streamer.load(plan, self.patches))


def output_with(factor: float) -> torch.Tensor:
    model = make_model()
    with torch.no_grad():
        model.get_parameter(NAME).mul_(factor)
    return model(X)


@pytest.mark.parametrize("mode", MODES)
def test_a_hook_writes_to_a_patched_weight_before_it_is_packed(mode: PackingMode) -> None:
    model = make_model()
    weight = model.blocks[1].mlp[0]
    prompts = Prompts(make(model, packing=mode), Doubled({NAME}))
    streamer = prompts.streamer
    prompts.begin()
    for _ in range(2):
        assert torch.equal(prompts.step(), output_with(2))
    with torch.no_grad():
        streamer.make_masters({NAME})
        kept = weight.weight.clone()
        weight.weight.mul_(4)
        streamer.invalidate()
        streamer.lend_masters()
        for _ in range(3):
            assert torch.equal(prompts.step(), output_with(8))
        weight.weight.copy_(kept)
        streamer.invalidate()
        streamer.take_masters_back()
    for _ in range(2):
        assert torch.equal(prompts.step(), output_with(2))
    assert bool(streamer.plan.packed) is (mode is PackingMode.ON)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("steps", [1, 2])
def test_what_a_node_writes_to_a_patched_weight_goes_with_the_patches(mode: PackingMode, steps: int) -> None:
    """Also if the weight was about to be packed."""
    model = make_model()
    prompts = Prompts(make(model, packing=mode), Doubled({NAME}))
    prompts.begin()
    for _ in range(steps):
        assert torch.equal(prompts.step(), output_with(2))
    with torch.no_grad():
        model.blocks[1].mlp[0].weight.mul_(4)
        prompts.streamer.invalidate()
    for _ in range(3):
        assert torch.equal(prompts.step(), output_with(8))
    prompts.streamer.unload()
    prompts.begin()
    for _ in range(2):
        assert torch.equal(prompts.step(), output_with(2))
    assert bool(prompts.streamer.plan.packed) is (mode is PackingMode.ON)
    prompts.patches = Doubled(set())
    prompts.streamer.unload()
    prompts.begin()
    assert torch.equal(prompts.step(), output_with(1))


class Filled(Doubled):
    """Values at random in place of zeros."""

    def compute(self, name: str, original: torch.Tensor) -> torch.Tensor:
        random = torch.Generator().manual_seed(1)
        return torch.randn(original.shape, generator=random).to(original.dtype)


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_is_exchanged_while_others_are_packed_with_patches(mode: PackingMode) -> None:
    """Without the patch the patched weights would take less when they are packed than they do."""
    model, reference = make_model(), make_model()
    name = "blocks.1.qkv.weight"
    with torch.no_grad():
        model.get_parameter(name).zero_()
    prompts = Prompts(make(model, PinningBackend(), packing=mode), Filled({name}))
    streamer = prompts.streamer
    prompts.begin()
    for _ in range(4):
        prompts.step()
    layer = model.blocks[3].out
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 1.5, requires_grad=False)
    changes = streamer.changes()
    streamer.show(changes)
    streamer.take_up(cut_model(model), changes)
    with torch.no_grad():
        weight = reference.get_parameter(name)
        weight.copy_(prompts.patches.compute(name, weight))
        reference.blocks[3].out.weight.mul_(1.5)
    for _ in range(2):
        prompts.begin()
        assert torch.equal(prompts.step(), reference(X))
        streamer.unload()


@pytest.mark.parametrize("slots", [1, 2, 4])
@pytest.mark.parametrize("share", [1.0, 1.5, 2.0])
def test_patches_come_to_packed_weights_where_only_the_plan_has_room(slots: int, share: float) -> None:
    model = make_model()
    memory = VirtualMemory(10**9)
    streamer = make(model, CpuBackend(memory), slots=slots, segment_bytes=0)
    learned(streamer, model)
    plan = streamer.plan_for(streamer.minimum_bytes * share + 100_000)
    assert plan.packed
    streamer.load(plan)
    step(streamer, model)
    memory.budget = plan.device_bytes
    streamer.load(plan, Doubled({"blocks.1.qkv.weight", NAME}))


def test_what_is_not_packed_any_more_is_page_locked_with_its_patches() -> None:
    """There is room for one copy of each unit."""
    model = make_model()
    backend = PinningBackend()
    limit = cut_model(model).outline.model_bytes + 10_000
    streamer = make(model, backend, pinned_limit=limit, chunk_bytes=2048, chunks=3)
    names = {f"blocks.{block}.{part}.weight" for block in range(4) for part in ("qkv", "out", "mlp.0", "mlp.2")}
    prompts = Prompts(streamer, Doubled(names))
    prompts.begin()
    for _ in range(3):
        prompts.step()
    assert len(streamer.plan.packed) == 16
    streamer.expect_writes(True)
    prompts.begin()
    prompts.step()
    assert not streamer.plan.packed
    assert streamer.snapshot().pageable_bytes == 0
