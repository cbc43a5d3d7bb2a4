"""Other parts of the host that read or write a model's weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import comfy.hooks
import comfy.model_management as mm
import comfy.sd
import pytest
import safetensors.torch
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_model_merging import ModelMergeSimple
from sampling import MB, MODEL, sample, sample_with_hook, with_lora
from weightstream.nodes.loader import WEIGHT_DTYPES, load_streamed
from weightstream.streaming import VirtualMemory

import nodes as host_nodes

Device = Callable[[int], VirtualMemory]
DTYPES = ["default", "fp8_e4m3fn"]


def by_host(weight_dtype: str) -> ModelPatcher:
    with torch.inference_mode():
        return host_nodes.UNETLoader().load_unet(MODEL, weight_dtype)[0]


def by_us(models: Path, weight_dtype: str, device: Device) -> ModelPatcher:
    device(24 * MB if weight_dtype == "default" else 7 * MB)
    with torch.inference_mode():
        return load_streamed(str(models / MODEL), WEIGHT_DTYPES[weight_dtype])


@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_merging(models: Path, virtual_device: Device, native: ModelPatcher, weight_dtype: str) -> None:
    def merged(load: Callable[[], ModelPatcher]) -> torch.Tensor:
        one, other = load(), with_lora(load(), 0.7)
        with torch.inference_mode():
            return sample(ModelMergeSimple().merge(one, other, 0.3)[0])

    expected = merged(lambda: by_host(weight_dtype))
    assert not torch.equal(expected, sample(by_host(weight_dtype)))
    assert torch.equal(merged(lambda: by_us(models, weight_dtype, virtual_device)), expected)


@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_saving(models: Path, virtual_device: Device, tmp_path: Path, weight_dtype: str) -> None:
    def saved(model: ModelPatcher, name: str) -> dict[str, torch.Tensor]:
        with torch.inference_mode():
            comfy.sd.save_checkpoint(str(tmp_path / name), with_lora(model, 0.7))
        mm.unload_all_models()
        return safetensors.torch.load_file(tmp_path / name)

    theirs = saved(by_host(weight_dtype), "theirs.safetensors")
    ours = saved(by_us(models, weight_dtype, virtual_device), "ours.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name].float(), tensor.float()), name


@pytest.mark.parametrize("limit", [24 * MB, 33 * MB, None])
@pytest.mark.parametrize("mode", list(comfy.hooks.EnumHookMode))
def test_weight_hooks(
    streamed: Callable[..., ModelPatcher],
    native: ModelPatcher,
    plain: torch.Tensor,
    limit: int | None,
    mode: comfy.hooks.EnumHookMode,
) -> None:
    expected = sample_with_hook(native, mode)
    assert not torch.equal(expected, plain)
    model = streamed(64 * MB, vram_limit=limit)
    for _ in range(2):
        assert torch.equal(sample_with_hook(model, mode), expected)
        assert torch.equal(sample(model), plain)
    hooked = sample_with_hook(with_lora(model, 0.4), mode)
    assert torch.equal(hooked, sample_with_hook(with_lora(native, 0.4), mode))
    assert torch.equal(sample(model), plain)
