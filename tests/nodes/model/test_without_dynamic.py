"""In a process with dynamic VRAM the host runs some MODELs without it, and patches their weights in another way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.model_management as mm
import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_torch_compile import TorchCompileModel
from sampling import MB, MODEL, sample, sample_with_hook, with_lora
from weightstream.nodes.loader import load_streamed
from weightstream.nodes.model import patcher as patcher_module
from weightstream.nodes.model.offload import Mode, OffloadSettings
from weightstream.nodes.model.patcher import StreamedModelPatcher
from weightstream.nodes.model.patches import HostPatches
from weightstream.nodes.settings import with_settings
from weightstream.streaming import VirtualMemory

LAYER = "diffusion_model.double_blocks.1.img_mlp.0"
IN_BFLOAT16 = {"dtype": torch.bfloat16}


class Dynamic(ModelPatcher):
    """As the host's own with dynamic VRAM, which a CPU has not."""

    def is_dynamic(self) -> bool:
        return True


@pytest.fixture
def path(models: Path, virtual_device: Callable[[int], VirtualMemory], monkeypatch: pytest.MonkeyPatch) -> str:
    """Of a model, in a process with dynamic VRAM, on a device that has room for it."""
    virtual_device(64 * MB)
    monkeypatch.setattr(patcher_module, "has_dynamic_vram", lambda device: True)
    return str(models / MODEL)


@pytest.fixture
def native(path: str) -> ModelPatcher:
    return computing_in_bfloat16(comfy.sd.load_diffusion_model(path, model_options=IN_BFLOAT16))


@pytest.fixture
def ours(path: str) -> StreamedModelPatcher:
    return computing_in_bfloat16(load_streamed(path, IN_BFLOAT16))


def computing_in_bfloat16(model: Any) -> Any:
    """In which patches are computed with dynamic VRAM. A CPU would take float32, and both ways were the same."""
    model.model.manual_cast_dtype = torch.bfloat16
    return model


def by_the_older_way(native: ModelPatcher) -> torch.Tensor:
    with torch.inference_mode():
        return with_lora(native, 0.8).patch_weight_to_device(f"{LAYER}.weight", return_weight=True)


def by_the_dynamic_way(ours: StreamedModelPatcher) -> torch.Tensor:
    values = [*ours.streamer.blocks.values]
    original = next(value.original for value in values if value.name == f"{LAYER}.weight")
    with torch.inference_mode():
        return HostPatches(with_lora(ours, 0.8), values, dynamic=True).compute(f"{LAYER}.weight", original)


def baked(model: ModelPatcher) -> torch.Tensor:
    """What a loaded MODEL computes with."""
    return model.model.get_submodule(LAYER).weight.clone()


def test_a_prompt_with_hooks_has_its_patches_in_the_older_way(ours: StreamedModelPatcher, native: ModelPatcher) -> None:
    older, dynamic = by_the_older_way(native), by_the_dynamic_way(ours)
    assert not torch.equal(older, dynamic)
    model = with_lora(ours, 0.8)
    for run, expected in (
        (sample, dynamic),
        (lambda model: sample_with_hook(model, comfy.hooks.EnumHookMode.MinVram), older),
        (sample, dynamic),
    ):
        run(model)
        assert torch.equal(baked(model), expected)


def test_hooks_of_any_kind_count(ours: StreamedModelPatcher, native: ModelPatcher) -> None:
    """The host asks whether there are hooks, not whether they change weights."""
    model = with_lora(ours, 0.8)
    hooks = comfy.hooks.HookGroup()
    hooks.add(comfy.hooks.TransformerOptionsHook())
    model.register_all_hook_patches(hooks, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model), {})
    mm.load_models_gpu([model])
    assert torch.equal(baked(model), by_the_older_way(native))


def test_a_clone_without_dynamic_vram(ours: StreamedModelPatcher, native: ModelPatcher) -> None:
    """As the host's node for torch.compile makes one; a clone of that has no dynamic VRAM either."""
    with torch.inference_mode():
        compiled = TorchCompileModel.execute(ours, "eager").args[0]
    clone = with_lora(compiled, 0.8)
    mm.load_models_gpu([clone])
    assert torch.equal(baked(clone), by_the_older_way(native))
    mm.load_models_gpu([with_lora(ours, 0.8)])
    assert torch.equal(baked(ours), by_the_dynamic_way(ours))


def test_what_came_without_dynamic_vram_streams_without(native: ModelPatcher) -> None:
    taken = with_lora(with_settings(native, OffloadSettings()), 0.8)
    mm.load_models_gpu([taken])
    assert torch.equal(baked(taken), by_the_older_way(native))


def test_what_came_with_it_is_patched_as_with_it(native: ModelPatcher, ours: StreamedModelPatcher) -> None:
    native.__class__ = Dynamic
    taken = with_settings(native, OffloadSettings())
    model = with_lora(computing_in_bfloat16(taken), 0.8)
    mm.load_models_gpu([model])
    assert torch.equal(baked(model), by_the_dynamic_way(ours))


def test_what_was_asked_for_without_dynamic_vram_is_given_back_so(native: ModelPatcher) -> None:
    native.__class__ = Dynamic
    taken = with_settings(native, OffloadSettings())
    off = OffloadSettings(mode=Mode.OFF)
    assert with_settings(taken, off).is_dynamic()
    assert not with_settings(taken.clone(disable_dynamic=True), off).is_dynamic()
