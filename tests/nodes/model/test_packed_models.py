"""Models of all kinds that stream packed in ComfyUI: what they give is what its own MODEL or CLIP gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.sd
import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from in_half import LoadInHalf, check_packed, packed_names
from quantised import FORMATS, write_quantised
from sampling import MB, MODEL, sample, with_lora
from text_encoders import FAMILIES, PROMPTS, Family, encode, load, random_patches, write_encoder
from weightstream.nodes.model.offload import Mode, OffloadSettings
from weightstream.nodes.settings import clip_with_settings, with_settings
from weightstream.streaming import PackingMode, VirtualMemory

Device = Callable[[int], VirtualMemory]
Names = tuple[str, str]

PACKED = OffloadSettings(mode=Mode.STREAM, packing=PackingMode.ON, vram_limit=12 * MB)
IN_A_BLOCK = ("double_blocks.1.img_mlp.0", "double_blocks.1.txt_mlp.0")
BETWEEN_BLOCKS = ("single_blocks.0.linear1", "single_blocks.3.linear1")


def load_by_host(path: Path) -> Any:
    with torch.inference_mode():
        return comfy.sd.load_diffusion_model(str(path), {"dtype": torch.bfloat16})


# -- tied weights ------------------------------------------------------------------------------------------------------


def tie(model: Any, names: Names) -> None:
    """Two layers share one tensor, which neither had before."""
    layers = [model.model.diffusion_model.get_submodule(name) for name in names]
    with torch.inference_mode():
        weight = torch.nn.Parameter(layers[1].weight.clone(), requires_grad=False)
    for layer in layers:
        layer.weight = weight


@pytest.mark.parametrize("taken_over", [True, False], ids=["taken over", "while it is packed"])
@pytest.mark.parametrize("names", [IN_A_BLOCK, BETWEEN_BLOCKS], ids=["in a block", "between blocks"])
def test_tied_weights(
    models: Path,
    streamed_in_half: LoadInHalf,
    plain_in_half: torch.Tensor,
    virtual_device: Device,
    names: Names,
    taken_over: bool,
) -> None:
    """What two layers of a block share is packed once, and what blocks share stays on the device. Where they come to
    share it while the model streams, each has its own.
    """
    native = load_by_host(models / MODEL)
    tie(native, names)
    expected = sample(native)
    assert not torch.equal(expected, plain_in_half)
    mm.unload_all_models()
    if taken_over:
        virtual_device(64 * MB)
        with torch.inference_mode():
            model = with_settings(native, PACKED)
    else:
        model = streamed_in_half()
        check_packed(model, plain_in_half, times=1)
        tie(model, names)
    packed = check_packed(model, expected)
    tied = [value.names for value in model.streamer.blocks.values if len(value.names) > 1]
    layers = [f"diffusion_model.{name}" for name in names]
    assert tied == ([tuple(f"{layer}.weight" for layer in layers)] if taken_over else [])
    own = 2 if not taken_over else int(names is IN_A_BLOCK)
    assert len(packed & set(layers)) == own


# -- weights of several dtypes -----------------------------------------------------------------------------------------


def test_a_model_with_some_weights_in_fp8(
    models: Path, streamed_in_half: LoadInHalf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU the host would compute in float32, and hold in it what is not quantised."""
    monkeypatch.setattr(mm, "unet_manual_cast", lambda *args: torch.bfloat16)
    path = models / "some-fp8.safetensors"
    write_quantised(models / MODEL, path, FORMATS["fp8"], only="single_blocks.")
    native = load_by_host(path)
    plain, patched = sample(native), sample(with_lora(native, 0.7))
    model = streamed_in_half(name=path.name)
    packed = check_packed(model, plain)
    assert check_packed(model, patched, lambda: sample(with_lora(model, 0.7)), times=1) == packed
    streamer = model.streamer
    kinds: dict[str, set[str]] = {"packed": set(), "as it is": set()}
    for unit in streamer.plan.streamed:
        value = next(value for value in streamer.blocks.units[unit].layout.values if value.name.endswith(".weight"))
        kind = "fp8" if isinstance(value.original, QuantizedTensor) else str(value.dtype)
        kinds["packed" if unit in streamer.plan.packed else "as it is"].add(kind)
    assert kinds == {"packed": {"torch.bfloat16"}, "as it is": {"fp8"}}


# -- text encoders -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Path]:
    """An encoder in float16 whose matrices are large enough to be packed."""
    qwen = FAMILIES["qwen"]
    family = Family(qwen.type, qwen.name, qwen.hints, {**qwen.config, "hidden_size": 128, "intermediate_size": 320})
    path = tmp_path_factory.mktemp("encoders") / "wide.safetensors"
    write_encoder(family, path)
    return family, path


def test_a_text_encoder_streams_packed(wide: tuple[Family, Path], virtual_device: Device) -> None:
    clip = load(*wide)
    patches = random_patches(clip)
    patched = clip.clone()
    patched.add_patches(patches, 0.7)
    expected = {text: [encode(one, text) for one in (clip, patched)] for text in PROMPTS}
    mm.unload_all_models()
    virtual_device(64 * MB)
    with torch.inference_mode():
        ours = clip_with_settings(clip, replace(PACKED, vram_limit=None))
    ours_patched = ours.clone()
    ours_patched.add_patches(patches, 0.7)
    for _ in range(2):
        for text in PROMPTS:
            for one, wanted in zip((ours, ours_patched), expected[text], strict=True):
                assert all(map(torch.equal, encode(one, text), wanted))
    assert packed_names(ours.patcher)
    assert ours.patcher.status()["why_unpacked"] == ""


# -- what may not be page-locked ---------------------------------------------------------------------------------------


def test_some_weights_are_staged_and_others_packed(
    streamed_in_half: LoadInHalf, native_in_half: Any, plain_in_half: torch.Tensor
) -> None:
    patched = sample(with_lora(native_in_half, 0.7))
    model = streamed_in_half(pinned_limit=6 * MB)
    streamer = model.streamer
    for strength, expected in ((0.0, plain_in_half), (0.7, patched), (0.0, plain_in_half)):
        check_packed(model, expected, lambda strength=strength: sample(with_lora(model, strength)), times=1)
        snapshot = streamer.snapshot()
        assert snapshot.staged_bytes > MB
        assert MB < snapshot.pinned_bytes <= 6 * MB
        left, every = len(streamer.plan.streamed - streamer.plan.packed), len(streamer.plan.streamed)
        why = f"{left} of {every} layers do not stream packed: no page-locked memory is left for them"
        assert snapshot.why_unpacked == why
