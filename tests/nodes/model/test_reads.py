"""What is read of a file, by which prompts, and that nobody writes to it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import comfy.hooks
import comfy.model_management as mm
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from reads import Reads
from sampling import MB, MODEL, Patched, sample, sample_with_hook, settle, with_lora
from weightstream.nodes.model.patcher import StreamedModelPatcher

Load = Callable[..., StreamedModelPatcher]


def file_bytes(model: StreamedModelPatcher, names: set[str] | None = None) -> int:
    specs = model.streamer.blocks.specs
    return sum(spec.source.nbytes for spec in specs if spec.source and (names is None or spec.name in names))


@pytest.mark.parametrize("limit", [14 * MB, 24 * MB])
def test_a_second_prompt_and_a_clone_read_nothing(streamed: Load, reads: Reads, limit: int | None) -> None:
    model = streamed(64 * MB, vram_limit=limit)
    settle(model)
    assert reads.nbytes >= file_bytes(model)
    reads.reset()
    sample(model, seed=5)
    sample(model.clone())
    assert reads.nbytes == 0


@pytest.mark.parametrize("limit", [14 * MB, None])
def test_a_lora_reads_nothing_and_what_it_changed_is_read_when_it_goes(
    streamed: Load, plain: torch.Tensor, plain_with_lora: Patched, reads: Reads, limit: int | None
) -> None:
    model = streamed(64 * MB, vram_limit=limit)
    settle(model)
    patched = with_lora(model, 0.5)
    reads.reset()
    assert torch.equal(sample(patched), plain_with_lora(0.5))
    assert reads.nbytes == 0, "it is computed from the copies that are there"
    assert torch.equal(sample(model), plain)
    model.streamer.finish_building()
    units = [
        unit for unit in model.streamer.blocks.units if any(spec.name in patched.patches for spec in unit.layout.specs)
    ]
    names = {spec.name for unit in (*units, model.streamer.blocks.rest) for spec in unit.layout.specs}
    assert {f"diffusion_model.{name}" for name in reads.tensors} <= names, "what the LoRA leaves alone"
    assert reads.nbytes <= file_bytes(model, names)


def test_after_unloading_only_what_was_resident_is_read(streamed: Load, plain: torch.Tensor, reads: Reads) -> None:
    model = streamed(64 * MB, vram_limit=28 * MB)
    settle(model)
    blocks, weights = model.streamer.blocks, model.streamer.site.weight_copies
    units = [blocks.rest, *(unit for unit in blocks.units if weights.copies(unit.index).master is None)]
    places = [spec.source for unit in units for spec in unit.layout.specs if spec.source is not None]
    without_master = {
        name
        for place in places
        for name, entry in place.file.entries.items()
        if entry.begin <= place.offset < entry.end
    }
    mm.unload_all_models()
    reads.reset()
    assert torch.equal(sample(model), plain)
    model.streamer.finish_building()
    assert reads.tensors == without_master


def written_bytes(name: str) -> int:
    """Bytes of mapped files of this name that somebody has written to: the system keeps such pages apart."""
    mapped, found = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        field, _, rest = line.partition(" ")
        if not field.endswith(":"):
            mapped = line.endswith(name)
        elif mapped and field in ("Anonymous:", "Swap:"):
            found += 1024 * int(rest.split()[0])
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")
@pytest.mark.parametrize("mode", list(comfy.hooks.EnumHookMode))
def test_weight_hooks_while_copies_are_built(
    streamed: Load, native: ModelPatcher, plain: torch.Tensor, reads: Reads, mode: comfy.hooks.EnumHookMode
) -> None:
    expected = sample_with_hook(native, mode)
    reads.seconds, reads.only = 0.05, "weightstream-build"
    model = streamed(64 * MB, vram_limit=14 * MB)
    assert torch.equal(sample_with_hook(model, mode), expected)
    assert torch.equal(sample(model), plain)
    assert written_bytes(MODEL) == 0
