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
    ModelAdd,
    ModelMergeBlocks,
    ModelMergeSimple,
    ModelSave,
    ModelSubtract,
)
from comfy_extras.nodes_model_merging_model_specific import ModelMergeFlux1
from prompts import check_streams, guided
from sampling import MB, MODEL, with_lora
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
    (path,) = (folder / "saved").glob("*.safetensors")
    return path.rename(folder / f"{len(list(folder.iterdir()))}.safetensors")


def check_same_file(ours: Path, theirs: Path) -> None:
    """The same tensors with the same bytes; their order and the header's are the host's business."""
    mine, wanted = safetensors.torch.load_file(ours), safetensors.torch.load_file(theirs)
    assert mine.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (mine[name].dtype, mine[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(mine[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
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
