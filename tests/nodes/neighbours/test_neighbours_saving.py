"""Merged and saved models: what the host reads out of a streamed model is what it would have loaded itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.sd
import folder_paths
import pytest
import safetensors.torch
import torch
from adapters import lora_file
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_model_merging import (
    CheckpointSave,
    ModelAdd,
    ModelMergeBlocks,
    ModelMergeSimple,
    ModelSave,
    ModelSubtract,
)
from comfy_extras.nodes_model_merging_model_specific import ModelMergeFlux1
from in_half import LoadInHalf, check_packed, packed_names
from prompts import check_streams, guided
from sampling import MB, MODEL, sample, with_lora
from weightstream.nodes.loader import load_streamed
from weightstream.streaming import VirtualMemory

import nodes as host_nodes
from tools.checkpoints import write_flux

OTHER = "other-flux.safetensors"
Pair = tuple[Any, Any]
Merge = Callable[[Any, Any], Any]

MERGES: dict[str, Merge] = {
    "simple": lambda one, other: ModelMergeSimple().merge(one, other, 0.3)[0],
    "blocks": lambda one, other: ModelMergeBlocks().merge(one, other, input=0.2, middle=0.6, out=0.9)[0],
    "flux": lambda one, other: ModelMergeFlux1().merge(
        one, other, **{"img_in.": 1.0, "double_blocks.0.": 0.2, "double_blocks.1.": 0.8, "single_blocks.3.": 0.0}
    )[0],
    "add": lambda one, other: ModelAdd().merge(one, other)[0],
    "subtract": lambda one, other: ModelSubtract().merge(one, other, 0.4)[0],
    "difference": lambda one, other: ModelAdd().merge(one, ModelSubtract().merge(other, one, 0.5)[0])[0],
    "with LoRA": lambda one, other: with_lora(ModelMergeSimple().merge(one, with_lora(other, 0.9), 0.3)[0], -0.4),
}


@pytest.fixture
def other(models: Path) -> Path:
    path = models / OTHER
    if not path.exists():
        write_flux(path, seed=5)
    return path


@pytest.fixture
def output_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return tmp_path


def by_host() -> Pair:
    with torch.inference_mode():
        return tuple(host_nodes.UNETLoader().load_unet(name, "default")[0] for name in (MODEL, OTHER))


def by_us(models: Path, memory: Callable[[int], VirtualMemory]) -> Pair:
    memory(24 * MB)
    with torch.inference_mode():
        return tuple(load_streamed(str(models / name), {}) for name in (MODEL, OTHER))


def save(model: Any, folder: Path) -> Path:
    """The file that the host's node writes, moved out of the way of the next one."""
    with torch.inference_mode():
        ModelSave().save(model, "saved/model")
    return moved_away(folder)


def moved_away(folder: Path) -> Path:
    (path,) = (folder / "saved").glob("*.safetensors")
    return path.rename(folder / f"{len(list(folder.iterdir()))}.safetensors")


def check_same_file(ours: Path, theirs: Path) -> None:
    """The same tensors with the same bytes; their order and the header's are the host's business."""
    mine, wanted = safetensors.torch.load_file(ours), safetensors.torch.load_file(theirs)
    assert mine.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (mine[name].dtype, mine[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(*(one.reshape(-1).view(torch.uint8) for one in (mine[name], tensor))), name
    assert ours.stat().st_size == theirs.stat().st_size


@pytest.mark.usefixtures("other")
@pytest.mark.parametrize("merge", MERGES)
def test_merged_models(
    models: Path, virtual_device: Callable[[int], VirtualMemory], output_folder: Path, merge: str
) -> None:
    """They give the same latents, and the same file, before and after they ran."""
    with torch.inference_mode():
        native = MERGES[merge](*by_host())
    expected, theirs = guided(native), save(native, output_folder)
    mm.unload_all_models()
    one, other = by_us(models, virtual_device)
    with torch.inference_mode():
        model = MERGES[merge](one, other)
    check_same_file(save(model, output_folder), theirs)
    check_streams(lambda: guided(model), model, expected)
    check_same_file(save(model, output_folder), theirs)
    assert torch.equal(guided(one), guided(by_host()[0]))


@pytest.mark.parametrize("kind", ["LoRA", "LoKr", "DoRA", "diff"])
def test_a_saved_model_with_adapters(
    streamed: Callable[..., Any], native: ModelPatcher, output_folder: Path, kind: str
) -> None:
    def patched(model: Any) -> Any:
        with torch.inference_mode():
            return comfy.sd.load_lora_for_models(model, None, lora_file(kind), 0.7, 0.0)[0]

    theirs = save(patched(native), output_folder)
    model = patched(streamed(64 * MB, vram_limit=28 * MB))
    check_same_file(save(model, output_folder), theirs)
    guided(model)
    check_same_file(save(model, output_folder), theirs)


def test_a_saved_model_can_be_streamed(
    models: Path, streamed: Callable[..., Any], native: ModelPatcher, output_folder: Path
) -> None:
    plain = save(native, output_folder)
    model = streamed()
    guided(with_lora(model, 0.8))
    check_same_file(save(model, output_folder), plain)
    path = save(with_lora(model, 0.8), output_folder)
    expected = guided(with_lora(native, 0.8))
    with torch.inference_mode():
        again = load_streamed(str(path), {})
    check_streams(lambda: guided(again), again, expected)


# -- packed weights ----------------------------------------------------------------------------------------------------


def test_a_saved_checkpoint_of_a_model_that_streams_packed(
    streamed_in_half: LoadInHalf,
    native_in_half: ModelPatcher,
    plain_in_half: torch.Tensor,
    output_folder: Path,
    clip: comfy.sd.CLIP,
    vae: comfy.sd.VAE,
) -> None:
    """The originals are written, also while packed copies hold a LoRA, and the LoRA only where it is asked for."""

    def write(model: Any) -> Path:
        with torch.inference_mode():
            CheckpointSave().save(model, clip, vae, "saved/model")
        return moved_away(output_folder)

    plain, patched = write(native_in_half), write(with_lora(native_in_half, 0.7))
    with_patches = sample(with_lora(native_in_half, 0.7))
    mm.unload_all_models()
    model = streamed_in_half()
    check_packed(model, plain_in_half, times=1)
    check_same_file(write(model), plain)
    check_same_file(write(with_lora(model, 0.7)), patched)
    check_packed(model, with_patches, lambda: sample(with_lora(model, 0.7)), times=1)
    check_same_file(write(model), plain)
    check_same_file(write(with_lora(model, 0.7)), patched)
    assert packed_names(model)


@pytest.mark.usefixtures("other")
def test_merged_models_that_stream_packed(models: Path, streamed_in_half: LoadInHalf, output_folder: Path) -> None:
    """Both are packed when they are merged, with a LoRA on the one and on what comes of it; that is packed too."""
    with torch.inference_mode():
        paths = [str(models / name) for name in (MODEL, OTHER)]
        natives = [comfy.sd.load_diffusion_model(path, {"dtype": torch.bfloat16}) for path in paths]
        native = MERGES["with LoRA"](*natives)
    expected, theirs, alone = sample(native), save(native, output_folder), [sample(each) for each in natives]
    mm.unload_all_models()
    one, other = (streamed_in_half(name=name) for name in (MODEL, OTHER))
    for model, plain in zip((one, other), alone, strict=True):
        check_packed(model, plain, times=1)
    with torch.inference_mode():
        model = MERGES["with LoRA"](one, other)
    check_same_file(save(model, output_folder), theirs)
    check_packed(model, expected, times=1)
    check_same_file(save(model, output_folder), theirs)
    check_packed(one, alone[0], times=1)
