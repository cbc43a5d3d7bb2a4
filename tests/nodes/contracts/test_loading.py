"""How the host has a model loaded and unloaded, and how it opens files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from safetensors.torch import save_file
from sampling import MODEL
from small_patcher import CPU, small_patcher
from weightstream.nodes.host import hosts
from weightstream.nodes.host.mapped import mapped_loading
from weightstream.nodes.loader import _open

MARKS_FILES = hosts.release(hosts.VERSION) >= (0, 37)


class Told(ModelPatcher):
    """Writes down what the host asks of it, as one that keeps its own books."""

    asked: list[tuple[str, Any]]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.asked = []
        self.taken = 0

    def model_size(self) -> int:
        return 100

    def loaded_size(self) -> int:
        return self.taken

    def partially_load(self, device_to: torch.device, extra_memory: float = 0, *args: Any, **options: Any) -> float:
        self.asked.append(("load", (device_to, extra_memory)))
        self.taken = 100
        return 100

    def partially_unload(self, device_to: torch.device, memory_to_free: float = 0, *args: Any, **options: Any) -> float:
        self.asked.append(("give", memory_to_free))
        freed, self.taken = min(self.taken, 60), self.taken - min(self.taken, 60)
        return freed

    def detach(self, unpatch_all: bool = True) -> Any:
        if hasattr(self, "asked"):
            self.asked.append(("detach", unpatch_all))
            self.taken = 0 if unpatch_all else self.taken
        return super().detach(unpatch_all)


@pytest.fixture
def patcher() -> Iterator[Told]:
    yield small_patcher(Told)
    mm.unload_all_models()


def test_a_model_is_loaded_by_partially_load(patcher: Told) -> None:
    mm.load_models_gpu([patcher])
    assert [what for what, _ in patcher.asked] == ["load"]
    [(_, (device, extra))] = patcher.asked
    assert device == CPU
    assert extra >= 1e32, "on a CPU all of it"
    assert [loaded.model for loaded in mm.current_loaded_models] == [patcher]


def test_a_model_that_is_loaded_is_asked_again_for_each_prompt(patcher: Told) -> None:
    mm.load_models_gpu([patcher])
    mm.load_models_gpu([patcher])
    assert [what for what, _ in patcher.asked] == ["load", "detach", "load"]
    assert patcher.asked[1] == ("detach", False), "weights stay where they are"


def test_a_clone_takes_the_place_of_the_patcher_that_is_loaded(patcher: Told) -> None:
    mm.load_models_gpu([patcher])
    clone = patcher.clone()
    mm.load_models_gpu([clone])
    assert [loaded.model for loaded in mm.current_loaded_models] == [clone]
    assert patcher.asked[-1] == ("detach", False)


def test_what_is_given_up_counts_and_a_model_that_gives_too_little_goes(patcher: Told) -> None:
    mm.load_models_gpu([patcher])
    [loaded] = mm.current_loaded_models
    assert loaded.model_unload(50) is False
    assert patcher.asked[-1] == ("give", 50)
    patcher.taken = 100
    assert loaded.model_unload(90) is True
    assert patcher.asked[-2:] == [("give", 90), ("detach", True)]
    mm.current_loaded_models.clear()


def test_models_that_are_needed_are_not_unloaded(patcher: Told) -> None:
    other = small_patcher(Told)
    mm.load_models_gpu([patcher, other])
    [kept] = [loaded for loaded in mm.current_loaded_models if loaded.model is patcher]
    mm.free_memory(1e32, CPU, keep_loaded=[kept])
    assert [loaded.model for loaded in mm.current_loaded_models] == [patcher]
    assert ("detach", True) in other.asked


def test_models_of_patches_are_loaded_with_their_model(patcher: Told) -> None:
    other = small_patcher(Told)
    patcher.model_patches_models = lambda: [other]
    mm.load_models_gpu([patcher])
    assert {loaded.model for loaded in mm.current_loaded_models} == {patcher, other}


def test_loaders_look_up_the_patchers_class_and_the_file_reader_when_they_run(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    load = comfy.utils.load_torch_file

    def reader(path: str, *args: Any, **options: Any) -> Any:
        opened.append(path)
        return load(path, *args, **options)

    class Choice(ModelPatcher):
        pass

    monkeypatch.setattr(comfy.utils, "load_torch_file", reader)
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", Choice)
    found = comfy.sd.load_diffusion_model(str(models / MODEL))
    assert opened == [str(models / MODEL)]
    assert type(found) is Choice


def test_parameters_of_a_dynamic_patcher_stay_views_of_the_file(models: Path) -> None:
    before = comfy.model_patcher.CoreModelPatcher, comfy.utils.load_torch_file
    with mapped_loading() as files:
        found = comfy.sd.load_diffusion_model(str(models / MODEL))
    assert all(files.locate(each) is not None for each in found.model.diffusion_model.double_blocks.parameters())
    assert (comfy.model_patcher.CoreModelPatcher, comfy.utils.load_torch_file) == before, "for the moment alone"


def test_a_file_gives_its_tensors_and_its_metadata(models: Path) -> None:
    path = str(models / MODEL)
    tensors = comfy.utils.load_torch_file(path, safe_load=True)
    again, metadata = comfy.utils.load_torch_file(path, return_metadata=True)
    assert tensors.keys() == again.keys()
    assert metadata is None or isinstance(metadata, dict)


@pytest.fixture
def annotating(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that leaves a file's path on the storages of its tensors, as 0.37 and newer do."""
    if not MARKS_FILES:
        monkeypatch.setitem(sys.modules, "comfy.storage", _Storage)


class _Storage:
    @staticmethod
    def annotate_state_dict(tensors: dict[str, torch.Tensor], path: str) -> None:
        for tensor in tensors.values():
            tensor.untyped_storage()._comfy_source_path = path


def _paths(tensors: dict[str, torch.Tensor]) -> dict[str, str | None]:
    return {name: getattr(each.untyped_storage(), "_comfy_source_path", None) for name, each in tensors.items()}


@pytest.mark.usefixtures("annotating")
def test_files_that_we_map_say_where_they_came_from_as_the_hosts_own_do(models: Path) -> None:
    path = str(models / MODEL)
    assert set(_paths(_open(path).tensors).values()) == {path}
    with mapped_loading():
        assert set(_paths(comfy.utils.load_torch_file(path)).values()) == {path}
    if MARKS_FILES:
        assert set(_paths(comfy.utils.load_torch_file(path)).values()) == {path}, "the host's own"


@pytest.mark.usefixtures("annotating")
def test_each_tensor_of_a_model_in_several_files_names_its_own(models: Path, tmp_path: Path) -> None:
    whole = comfy.utils.load_torch_file(str(models / MODEL))
    shards = [tmp_path / f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
    names = sorted(whole)
    for number, shard in enumerate(shards):
        save_file({name: whole[name].contiguous() for name in names[number::3]}, shard)
    weights = _open(str(shards[1]))
    found = _paths(weights.tensors)
    assert set(found.values()) == set(map(str, shards))
    for shard in shards:
        own = comfy.utils.load_torch_file(str(shard))
        assert {name for name, path in found.items() if path == str(shard)} == set(own)
