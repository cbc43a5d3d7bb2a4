"""Files of loaded models that are touched, replaced, renamed or written to between prompts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import folder_paths
import pytest
import torch
from placing import Machine
from sampling import MB, MODEL, sample, with_lora
from weightstream.nodes.gpu_placement import GpuPlacement
from weightstream.nodes.loader import StreamedModelLoader
from weightstream.nodes.model.offload import OffloadSettings
from weightstream.nodes.settings import AsyncOffloadSettings, with_settings
from weightstream.streaming import CheckpointChangedError

import nodes as host_nodes
from tools.checkpoints import write_flux

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "kept.safetensors"
WAYS = ("loader", "settings", "split")


@pytest.fixture
def file(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny FLUX, which a test may do anything to."""
    shutil.copy(models / MODEL, tmp_path / NAME)
    folders, endings = folder_paths.folder_names_and_paths["diffusion_models"]
    entry = ([*folders, str(tmp_path)], endings)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", entry)
    return tmp_path / NAME


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A FLUX with other weights."""
    return write_flux(tmp_path / "other.safetensors", seed=7)


@pytest.fixture
def load(machine: Machine) -> Callable[[str], Any]:
    """Runs the nodes of one of the ways."""

    def run(way: str) -> Any:
        machine(2 if way == "split" else 1, 16 * MB)
        with torch.inference_mode():
            if way == "loader":
                return StreamedModelLoader.execute(NAME, "default").result[0]
            model = host_nodes.UNETLoader().load_unet(NAME, "default")[0]
            if way == "settings":
                return with_settings(model, OffloadSettings())
            return GpuPlacement.execute(model, None, None, split="equal").result[0]

    return run


def expected(path: Path, strength: float = 0.0) -> torch.Tensor:
    with torch.inference_mode():
        model = host_nodes.UNETLoader().load_unet(path.name, "default")[0]
    sample(model)
    return sample(with_lora(model, strength) if strength else model)


def touch(path: Path, seconds: int) -> None:
    os.utime(path, (seconds, seconds))


def write_over(path: Path, other: Path) -> None:
    """In place, as some programs that copy do."""
    with path.open("r+b") as target:
        target.write(other.read_bytes())
    touch(path, 77)


@pytest.mark.parametrize("way", WAYS)
def test_a_touched_file_changes_nothing(file: Path, load: Callable[[str], Any], way: str) -> None:
    plain, patched = expected(file), expected(file, 0.7)
    model = load(way)
    assert torch.equal(sample(model), plain)
    for seconds in (1, 2):
        touch(file, seconds)
        assert torch.equal(sample(with_lora(model, 0.7)), patched)
        touch(file, seconds + 10)
        mm.unload_all_models()
        assert torch.equal(sample(model), plain)


@pytest.mark.parametrize("way", WAYS)
def test_a_renamed_or_replaced_file_is_read_on(file: Path, other: Path, load: Callable[[str], Any], way: str) -> None:
    plain, patched = expected(file), expected(file, 0.7)
    model = load(way)
    file.rename(file.with_suffix(".old"))
    assert torch.equal(sample(model), plain)
    os.replace(other, file)
    mm.unload_all_models()
    assert torch.equal(sample(with_lora(model, 0.7)), patched)


@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_is_written_over_is_an_error_until_the_nodes_run_again(
    file: Path, other: Path, load: Callable[[str], Any], way: str
) -> None:
    new = expected(other)
    model = load(way)
    sample(model)
    write_over(file, other)
    with pytest.raises(CheckpointChangedError, match="was changed while it was in use"):
        sample(with_lora(model, 0.7))
    assert torch.equal(sample(load(way)), new)


def test_the_host_is_told_of_other_contents_and_of_nothing_else(file: Path, other: Path) -> None:
    def ask() -> str:
        return StreamedModelLoader.fingerprint_inputs(unet_name=NAME, weight_dtype="default")

    first = ask()
    assert first
    touch(file, 5)
    assert ask() == first
    copy = file.with_suffix(".copy")
    shutil.copy(file, copy)
    os.replace(copy, file)
    assert ask() == first, "the same bytes in another file"
    file.rename(copy)
    assert ask() == first, "no file is no other file"
    os.replace(other, file)
    assert ask() != first
    os.replace(copy, file)
    assert ask() == first
    file.write_bytes(b"damaged")
    assert ask() == first, "the loader says what is wrong with it"
    assert StreamedModelLoader.fingerprint_inputs(unet_name="unknown.safetensors") == ""
    assert StreamedModelLoader.fingerprint_inputs() == ""


def test_nodes_behind_other_loaders_run_again_when_a_file_was_written_over(
    file: Path, other: Path, load: Callable[[str], Any]
) -> None:
    nodes = (AsyncOffloadSettings, GpuPlacement)
    model = load("settings")
    before = [node.fingerprint_inputs(mode="auto") for node in nodes]
    touch(file, 5)
    assert [node.fingerprint_inputs(mode="auto") for node in nodes] == before
    write_over(file, other)
    after = [node.fingerprint_inputs(mode="auto") for node in nodes]
    assert all(one != two for one, two in zip(before, after, strict=True))
    assert [node.fingerprint_inputs(mode="auto") for node in nodes] == after
    del model
    assert [node.fingerprint_inputs(mode="auto") for node in nodes] == after
