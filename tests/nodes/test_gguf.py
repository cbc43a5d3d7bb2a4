"""A MODEL from a GGUF file, as the pack for such files makes it, through the settings node."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import comfy.lora
import comfy.ops
import comfy.sd
import comfy.utils
import gguf
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from gguf import GGMLQuantizationType as Kind
from placing import Machine, place
from sampling import MB, MODEL, sample, with_lora
from weightstream.nodes.offload import Mode, OffloadSettings
from weightstream.nodes.patcher import StreamedModelPatcher
from weightstream.nodes.settings import with_settings
from weightstream.streaming import VirtualMemory


class PackedTensor(torch.Tensor):
    """Packed bytes that show the shape of their values."""

    tensor_type: Kind
    tensor_shape: torch.Size
    patches: list

    @property
    def shape(self) -> torch.Size:
        return self.tensor_shape

    def to(self, *args: Any, **kwargs: Any) -> PackedTensor:
        return pack(super().to(*args, **kwargs), self.tensor_type, self.tensor_shape, self.patches)

    def detach(self) -> PackedTensor:
        return self

    def clone(self, *args: Any, **kwargs: Any) -> PackedTensor:
        return self


def pack(data: torch.Tensor, kind: Kind, shape: torch.Size, patches: list) -> PackedTensor:
    packed = data.as_subclass(PackedTensor)
    packed.tensor_type, packed.tensor_shape, packed.patches = kind, shape, list(patches)
    return packed


class PackedOps(comfy.ops.manual_cast):
    """The host's layers, but for linear ones, which take packed weights."""

    class Linear(torch.nn.Linear):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "device": "meta"})

        def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
            for name in ("weight", "bias"):
                if (value := state_dict.get(prefix + name)) is not None:
                    setattr(self, name, torch.nn.Parameter(value, requires_grad=False))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return torch.nn.functional.linear(x, unpack(self.weight, x.dtype), bias)


def unpack(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not isinstance(weight, PackedTensor):
        return weight.to(dtype)
    values = gguf.quants.dequantize(weight.as_subclass(torch.Tensor).numpy(), weight.tensor_type)
    found = torch.from_numpy(values).reshape(weight.tensor_shape).to(dtype)
    for patches, name in weight.patches:
        found = comfy.lora.calculate_weight(patches, found, name)
    return found


class PackedPatcher(ModelPatcher):
    """Leaves patches on packed weights."""

    def patch_weight_to_device(
        self, key: str, device_to: torch.device | None = None, inplace_update: bool = False, **kwargs: Any
    ) -> Any:
        weight = comfy.utils.get_attr(self.model, key)
        if not isinstance(weight, PackedTensor):
            return super().patch_weight_to_device(key, device_to, inplace_update, **kwargs)
        if key in self.patches:
            patched = weight.to(device_to)
            patched.patches = [(self.patches[key], key)]
            self.backup.setdefault(key, Kept(weight, False))
            comfy.utils.set_attr_param(self.model, key, patched)
        return None


class Kept(NamedTuple):
    """What the host restores."""

    weight: torch.Tensor
    inplace_update: bool


@pytest.fixture
def packed(models: Path, virtual_device: Callable[[int], VirtualMemory]) -> ModelPatcher:
    """The tiny FLUX with packed matrices, on a virtual device of less than its size."""
    weights = {}
    for name, weight in comfy.utils.load_torch_file(str(models / MODEL)).items():
        if weight.ndim == 2 and "_blocks." in name and name.endswith(".weight"):
            data = gguf.quants.quantize(weight.float().numpy(), Kind.Q8_0)
            weights[name] = pack(torch.from_numpy(data), Kind.Q8_0, weight.shape, [])
        else:
            weights[name] = weight
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model_state_dict(weights, model_options={"custom_operations": PackedOps})
        model = PackedPatcher(model.model, model.load_device, model.offload_device)
    virtual_device(9 * MB)
    return model


def test_a_model_of_packed_weights_streams(packed: ModelPatcher) -> None:
    assert any(isinstance(weight.data, PackedTensor) for weight in packed.model.diffusion_model.parameters())
    expected = sample(packed)
    expected_with_lora = sample(with_lora(packed, 0.7))
    assert not torch.equal(expected, expected_with_lora)
    model = with_settings(packed, OffloadSettings())
    assert isinstance(model, StreamedModelPatcher)
    for _ in range(2):
        assert torch.equal(sample(model), expected)
        assert torch.equal(sample(with_lora(model, 0.7)), expected_with_lora)
    assert torch.equal(sample(with_settings(with_lora(packed, 0.7), OffloadSettings())), expected_with_lora)
    assert torch.equal(sample(packed), expected), "what came in is as it was"
    status = model.status()
    assert status["mode"] == "streamed"
    assert status["counters"]["streamed_bytes"] > 0


@pytest.mark.parametrize("settings", [False, True], ids=["", "behind the settings"])
@pytest.mark.parametrize("devices", ["gpu:1", "gpu:0,gpu:1"])
def test_a_model_of_packed_weights_is_placed(
    packed: ModelPatcher, machine: Machine, settings: bool, devices: str
) -> None:
    """No loader of such files leaves word how to load one once more."""
    expected, expected_with_lora = sample(packed), sample(with_lora(packed, 0.7))
    memories = machine(2, 9 * MB)
    model = place(with_settings(packed, OffloadSettings()) if settings else packed, devices=devices, split="equal")[0]
    for _ in range(2):
        assert torch.equal(sample(model), expected)
        assert torch.equal(sample(with_lora(model, 0.7)), expected_with_lora)
    assert [memory.allocated > 0 for memory in memories] == [devices != "gpu:1", True]
    back = with_settings(model, OffloadSettings(Mode.OFF))
    assert torch.equal(sample(back), expected)
    assert torch.equal(sample(packed), expected), "what came in is as it was"
