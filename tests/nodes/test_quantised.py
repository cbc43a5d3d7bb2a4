"""Quantised models through the real host: what streams is what the host computes, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.memory_management
import comfy.model_management as mm
import comfy.ops
import comfy.sd
import pytest
import torch
from comfy.model_patcher import LowVramPatch, ModelPatcher
from comfy.quant_ops import QuantizedTensor
from quantised import FORMATS, write_quantised, write_scaled_fp8
from sampling import MB, MODEL, sample, with_lora
from weightstream.nodes.loader import load_streamed
from weightstream.nodes.model.patcher import StreamedModelPatcher
from weightstream.nodes.model.patches import HostPatches
from weightstream.streaming import VirtualMemory

import nodes as host_nodes

NAMES = [*FORMATS, "scaled-fp8"]
KEY = "diffusion_model.single_blocks.1.linear1.weight"


@pytest.fixture(scope="module")
def folder(models: Path) -> Path:
    for name, form in FORMATS.items():
        write_quantised(models / MODEL, models / _file(name), form)
    write_scaled_fp8(models / MODEL, models / _file("scaled-fp8"))
    return models


def _file(name: str) -> str:
    return f"tiny-flux-{name}.safetensors"


Pair = Callable[[str], tuple[ModelPatcher, StreamedModelPatcher]]


@pytest.fixture
def pair(folder: Path, virtual_device: Callable[[int], VirtualMemory], native: ModelPatcher) -> Pair:
    """A file through the host's own loader, and through ours with room for little more than what runs at once."""
    assert native is not None  # The host's first sampling is over.

    def load(name: str) -> tuple[ModelPatcher, StreamedModelPatcher]:
        memory = virtual_device(64 * MB)
        with torch.inference_mode():
            theirs = host_nodes.UNETLoader().load_unet(_file(name), "default")[0]
            ours = load_streamed(str(folder / _file(name)), {})
        assert isinstance(ours, StreamedModelPatcher), "it fell back to the host's own loader"
        memory.budget = ours.streamer.minimum_bytes + MB // 4
        return theirs, ours

    return load


def assert_streamed(model: StreamedModelPatcher) -> None:
    assert model.streamer.plan.segments
    assert model.status()["counters"]["streamed_bytes"] > 0
    assert model.status()["counters"]["misses"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_the_same_image_with_a_lora_and_without(pair: Pair, name: str) -> None:
    theirs, ours = pair(name)
    plain = sample(theirs)
    assert torch.equal(sample(ours), plain)
    assert_streamed(ours)
    for strength in (1.0, -0.4):
        expected = sample(with_lora(theirs, strength))
        assert not torch.equal(expected, plain)
        assert torch.equal(sample(with_lora(ours, strength)), expected)
    assert torch.equal(sample(ours), plain)
    assert_streamed(ours)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_read_from_the_file_and_stay_quantised(pair: Pair, name: str) -> None:
    _, ours = pair(name)
    value = next(value for value in ours.streamer.blocks.values if value.name == KEY)
    assert isinstance(value.original, QuantizedTensor)
    stored = next(spec for spec in value.specs if spec.name == f"{KEY}._qdata")
    assert stored.source is not None
    units = ours.streamer.blocks.units
    matrices = [value for unit in units for value in unit.layout.values if value.name.endswith(".weight")]
    assert matrices
    assert all(isinstance(value.original, QuantizedTensor) for value in matrices)
    sample(ours)
    bound = ours.model.get_parameter(KEY)
    assert isinstance(bound, QuantizedTensor)
    assert isinstance(bound, torch.nn.Parameter)
    assert bound._params.orig_dtype == value.original._params.orig_dtype


@pytest.mark.parametrize("name", NAMES)
def test_between_steps_the_state_dict_has_the_weights_in_effect(pair: Pair, name: str) -> None:
    theirs, ours = pair(name)
    for strength in (0.0, 0.7):
        if strength:
            theirs, ours = with_lora(theirs, strength), with_lora(ours, strength)
        mm.load_models_gpu([theirs], force_full_load=True)
        expected = {key: value.clone() for key, value in theirs.model.state_dict().items()}
        mm.unload_all_models()
        sample(ours)
        state = ours.model.state_dict()
        assert list(state) == list(expected)
        for key, value in expected.items():
            assert state[key].dtype == value.dtype, key
            assert state[key].shape == value.shape, key
            assert torch.equal(_bits(state[key]), _bits(value)), key


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def test_a_resident_weight_with_a_lora_becomes_streamed(pair: Pair) -> None:
    theirs, ours = pair("nvfp4")
    memory = ours.streamer.backend.store
    little, memory.budget = memory.budget, 64 * MB
    expected = sample(with_lora(theirs, 0.5))
    patched = with_lora(ours, 0.5)
    assert torch.equal(sample(patched), expected)
    assert not ours.streamer.plan.segments
    with torch.inference_mode():
        patched.partially_unload(patched.offload_device, 64 * MB)
    memory.budget = little
    assert torch.equal(sample(patched), expected)
    assert_streamed(ours)


def test_a_weight_wrapper_acts_on_a_quantised_weight(pair: Pair) -> None:
    def negated(base: ModelPatcher) -> ModelPatcher:
        clone = base.clone()
        clone.add_weight_wrapper(KEY, torch.neg)
        return clone

    theirs, ours = pair("fp8")
    expected = sample(negated(theirs))
    assert not torch.equal(expected, sample(theirs))
    assert torch.equal(sample(negated(ours)), expected)
    assert torch.equal(sample(ours), sample(theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_with_dynamic_vram_a_patched_weight_is_what_the_host_keeps(pair: Pair, name: str, dtype: torch.dtype) -> None:
    theirs, ours = (with_lora(model, 0.8) for model in pair(name))
    kept = _kept_by_the_host(theirs, dtype)
    ours.model.manual_cast_dtype = dtype
    patches = HostPatches(ours, ours.streamer.blocks.values)
    patches._dynamic = True  # As on a card; the host has nothing of it on a CPU but this cast.
    original = next(value.original for value in ours.streamer.blocks.values if value.name == KEY)
    with torch.inference_mode():
        computed = patches.compute(KEY, original)
    assert isinstance(computed, QuantizedTensor)
    assert isinstance(kept, QuantizedTensor)
    parts, context = computed.__tensor_flatten__()
    assert (parts, context) == kept.__tensor_flatten__()
    for part in parts:
        assert getattr(computed, part).shape == getattr(kept, part).shape
        assert torch.equal(_bits(getattr(computed, part)), _bits(getattr(kept, part))), part
    assert not torch.equal(_bits(computed._qdata), _bits(original._qdata))


def _kept_by_the_host(model: ModelPatcher, dtype: torch.dtype) -> torch.Tensor:
    """What stays on the card after the host's own cast of a layer's weight with patches, its transfer left out."""
    name, _, _ = KEY.rpartition(".")
    layer = model.model.get_submodule(name)
    geometry = comfy.memory_management.tensors_to_geometries([layer.weight, None])
    buffer = torch.empty(comfy.memory_management.vram_aligned_size(geometry), dtype=torch.uint8)
    comfy.memory_management.interpret_gathered_like(geometry, buffer)[0].copy_(layer.weight)
    layer.seed_key = name
    layer.weight_lowvram_function = LowVramPatch(KEY, model.patches)
    layer._prefetch = {
        "signature": "there is room for it",
        "resident": False,
        "xfer_dest": buffer,
        "needs_cast": False,
        "cast_geometry": geometry,
    }
    with torch.inference_mode():
        comfy.ops.resolve_cast_module_with_vbar(layer, dtype, torch.device("cpu"), dtype, dtype, True)
    return layer._v_weight


def test_a_full_checkpoint_with_quantised_weights(
    folder: Path, virtual_device: Callable[[int], VirtualMemory], native: ModelPatcher
) -> None:
    assert native is not None
    path = str(folder / _file("fp8"))
    memory = virtual_device(64 * MB)
    with torch.inference_mode():
        theirs: Any = comfy.sd.load_checkpoint_guess_config_model_only(path)
        ours = load_streamed(path, {}, full_checkpoint=True)
    memory.budget = ours.streamer.minimum_bytes + MB // 4
    assert torch.equal(sample(ours), sample(theirs))
    assert_streamed(ours)
