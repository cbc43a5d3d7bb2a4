"""The file changes or goes, or cannot be read: the prompt fails with the reason, and the next one is right."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import pytest
import torch
from held import check_nothing_is_held, held_by_others
from sampling import MB, MODEL, Patched, sample, with_lora
from weightstream.nodes.loader import load_streamed
from weightstream.nodes.model.patcher import StreamedModelPatcher
from weightstream.streaming import CheckpointError
from weightstream.streaming.files.open_file import OpenFile

Load = Callable[..., StreamedModelPatcher]


@pytest.fixture
def own_file(models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(models / MODEL, tmp_path / "own.safetensors"))


@pytest.mark.parametrize("limit", [14 * MB, None])
@pytest.mark.parametrize("fault", ["truncated", "overwritten"])
def test_a_file_that_changes_after_loading(
    models: Path,
    own_file: Path,
    virtual_device: Callable[[int], Any],
    plain: torch.Tensor,
    fault: str,
    limit: int | None,
) -> None:
    before = held_by_others()
    memory = virtual_device(64 * MB)
    with torch.inference_mode():
        model = load_streamed(str(own_file), {}, limit)
    times = own_file.stat()
    if fault == "truncated":
        os.truncate(own_file, times.st_size // 2)
    else:
        with own_file.open("r+b") as file:
            file.seek(times.st_size - 100)
            file.write(bytes(100))
    for run in (model, with_lora(model, 0.5)):
        with pytest.raises(CheckpointError, match=r"own\.safetensors: was changed while it was in use"):
            sample(run)
        assert model.loaded_size() == 0
    # As it was, also by its time: the same model works. (Else it is loaded anew.)
    shutil.copy(models / MODEL, own_file)
    os.utime(own_file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert torch.equal(sample(model), plain)
    with torch.inference_mode():
        again = load_streamed(str(own_file), {}, limit)
    assert torch.equal(sample(again), plain)
    del model, run, again
    check_nothing_is_held(memory, before)


@pytest.mark.parametrize("fault", ["replaced", "deleted"])
def test_a_file_that_goes_after_loading_is_still_read(
    models: Path,
    own_file: Path,
    virtual_device: Callable[[int], Any],
    plain: torch.Tensor,
    plain_with_lora: Patched,
    fault: str,
) -> None:
    virtual_device(64 * MB)
    with torch.inference_mode():
        model = load_streamed(str(own_file), {}, 14 * MB)
    if fault == "replaced":
        other = own_file.with_name("other")
        other.write_bytes(b"another")
        os.replace(other, own_file)
    else:
        own_file.unlink()
    assert torch.equal(sample(with_lora(model, 0.5)), plain_with_lora(0.5))
    assert torch.equal(sample(model), plain)
    mm.unload_all_models()
    assert torch.equal(sample(model), plain)


@pytest.mark.parametrize("limit", [14 * MB, None])
@pytest.mark.parametrize("tensor", ["double_blocks.0.img_mlp.0.weight", "single_blocks.3.linear1.weight"])
def test_a_read_error_names_file_and_tensor(
    streamed: Load, plain: torch.Tensor, monkeypatch: pytest.MonkeyPatch, tensor: str, limit: int | None
) -> None:
    before = held_by_others()
    model = streamed(64 * MB, vram_limit=limit)
    model.streamer.finish_building()
    model.streamer.give_up_masters(1 << 40)
    memory = model.streamer.backend.store
    spec = next(spec for spec in model.streamer.blocks.specs if spec.name == f"diffusion_model.{tensor}")
    bad = spec.source.offset + spec.source.nbytes // 2
    with monkeypatch.context() as patch:
        read = OpenFile.read

        def fail(source: OpenFile, target: memoryview, offset: int) -> int:
            if offset <= bad < offset + target.nbytes:
                raise OSError(5, "Input/output error")
            return read(source, target, offset)

        patch.setattr(OpenFile, "read", fail)
        with pytest.raises(CheckpointError, match=re.escape(tensor)) as caught:
            sample(model)
        assert f"{MODEL}: cannot read " in str(caught.value)
        assert "Input/output error" in str(caught.value)
        mm.unload_all_models()
        assert memory.allocated == 0
    assert torch.equal(sample(model), plain)
    del model, spec, caught
    check_nothing_is_held(memory, before)
