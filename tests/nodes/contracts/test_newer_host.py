"""A host that is not as we know it: said once, and models are loaded its own way."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import comfy.model_management as mm
import comfy.model_prefetch
import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.torch_helpers import torch_compile
from sampling import MB, MODEL, sample
from weightstream.nodes import contracts, hosts
from weightstream.nodes.loader import load_streamed
from weightstream.nodes.offload import OffloadSettings
from weightstream.nodes.patcher import StreamedModelPatcher
from weightstream.nodes.routes import full_status
from weightstream.nodes.settings import with_settings
from weightstream.nodes.split import split_over
from weightstream.streaming import UnsupportedModelError

ROOT = Path(contracts.__file__).parent.parent


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    contracts.broken_contracts.cache_clear()
    yield
    contracts.broken_contracts.cache_clear()


def test_nothing_is_broken_on_this_host() -> None:
    assert contracts.broken_contracts() == ()
    assert full_status()["comfyui"] == {"version": hosts.VERSION, "broken": []}


Change = Callable[[pytest.MonkeyPatch], Any]
CHANGES: dict[str, tuple[Change, str]] = {
    "a method of patchers": (
        lambda patch: patch.delattr(ModelPatcher, "use_ejected"),
        "ModelPatcher.use_ejected is gone",
    ),
    "an argument of a method": (
        lambda patch: patch.setattr(ModelPatcher, "clone", lambda self, other: self),
        "ModelPatcher.clone takes no disable_dynamic or model_override",
    ),
    "a function": (lambda patch: patch.delattr(mm, "minimum_inference_memory"), "minimum_inference_memory is gone"),
    "an argument of a loader": (
        lambda patch: patch.setattr(comfy.sd, "load_diffusion_model_state_dict", lambda sd: None),
        "sd.load_diffusion_model_state_dict takes no model_options or metadata or disable_dynamic",
    ),
    "recordings without a pause": (
        lambda patch: (
            patch.setattr(comfy.model_prefetch, "malloc_graph_begin", lambda device: None, raising=False),
            patch.delattr(comfy.model_prefetch, "pause_malloc_graph", raising=False),
        ),
        "model_prefetch.pause_malloc_graph is gone",
    ),
    "the clean-up": (
        lambda patch: patch.delattr(comfy.model_prefetch, "cleanup_prefetch_queues"),
        "model_prefetch.cleanup_prefetch_queues is gone",
    ),
}


@pytest.mark.parametrize(("change", "expected"), CHANGES.values(), ids=CHANGES)
def test_what_is_broken_is_found_and_named(monkeypatch: pytest.MonkeyPatch, change: Change, expected: str) -> None:
    with monkeypatch.context() as patch:
        change(patch)
        [found] = contracts.broken_contracts()
    assert expected in found


@pytest.fixture
def strange(monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer host, whose patchers cannot do something that is asked of them."""
    monkeypatch.setattr(hosts, "VERSION", "0.99.0")
    monkeypatch.setitem(contracts.PATCHER_METHODS, "will_be_there_no_more", ())


@pytest.mark.usefixtures("strange")
def test_models_are_loaded_the_hosts_own_way_with_the_reason(
    streamed: Callable[..., Any], native: ModelPatcher, models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        model = streamed(24 * MB)
    assert not isinstance(model, StreamedModelPatcher)
    found = "ModelPatcher.will_be_there_no_more is gone"
    reason = f"ComfyUI 0.99.0 is not as this version of WeightStream knows it ({found})"
    assert f"not streamed, loaded ComfyUI's own way: {reason}; update WeightStream" in caplog.text
    assert torch.equal(sample(model), sample(native))
    status = full_status()
    assert status["comfyui"]["broken"] == [found]
    assert any(reason in notice["text"] for notice in status["notices"])


@pytest.mark.usefixtures("strange")
def test_what_comes_in_is_left_as_it_is(foreign: ModelPatcher, machine: Any) -> None:
    machine(2)
    assert with_settings(foreign, OffloadSettings()) is foreign
    with pytest.raises(UnsupportedModelError, match=r"ComfyUI 0\.99\.0 is not as"):
        split_over(foreign, [torch.device("cpu", 0), torch.device("cpu", 1)], "auto", None, None)


def test_it_is_said_once_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    with caplog.at_level(logging.INFO):
        monkeypatch.setattr(hosts, "VERSION", "0.30.0")
        contracts.announce_host()
        assert caplog.text == "", "nothing of one that is known"
        monkeypatch.setattr(hosts, "VERSION", "1.2.3")
        contracts.announce_host()
    [line] = caplog.records
    assert "ComfyUI 1.2.3 is newer than those that were tried" in line.message
    caplog.clear()
    contracts.broken_contracts.cache_clear()
    request.getfixturevalue("strange")
    with caplog.at_level(logging.INFO):
        contracts.announce_host()
    [line] = caplog.records
    assert line.levelname == "WARNING"
    assert "models are loaded ComfyUI's own way: ComfyUI 0.99.0 is not as" in line.message


@pytest.mark.parametrize(
    ("version", "newer"),
    [("0.30.0", False), ("0.33.1", False), ("0.34.0", True), ("0.46", True), ("1.0.0", True), ("master", True)],
)
def test_which_versions_are_newer_than_known(monkeypatch: pytest.MonkeyPatch, version: str, newer: bool) -> None:
    monkeypatch.setattr(hosts, "VERSION", version)
    assert hosts.is_newer_than_known() is newer


@pytest.fixture
def loaded_anew(monkeypatch: pytest.MonkeyPatch) -> Callable[[], ModuleType]:
    """Loads the pack once more, as the host does when it starts, under another name."""

    def load() -> ModuleType:
        spec = importlib.util.spec_from_file_location(
            "weightstream_anew", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        pack = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "weightstream_anew", pack)
        spec.loader.exec_module(pack)
        return importlib.import_module("weightstream_anew.nodes.extension")

    yield load
    for name in [name for name in sys.modules if name.startswith("weightstream_anew")]:
        del sys.modules[name]


def test_the_pack_starts_where_a_name_that_it_borrows_is_gone(
    monkeypatch: pytest.MonkeyPatch, loaded_anew: Callable[[], ModuleType], models: Path, native: ModelPatcher
) -> None:
    """Else workflows would miss their nodes."""
    monkeypatch.delattr(torch_compile, "COMPILE_KEY")
    monkeypatch.setitem(sys.modules, "comfy_aimdo.model_vbar", None)
    extension = loaded_anew()
    loader = sys.modules["weightstream_anew.nodes.loader"]
    assert sys.modules["weightstream_anew.nodes.contracts"].broken_contracts() == (
        "comfy_api.torch_helpers.torch_compile.COMPILE_KEY is gone",
        "comfy_aimdo.model_vbar.vbars_analyze is gone",
    )
    assert extension.StreamedModelLoader.GET_SCHEMA().node_id == "WeightStreamModelLoader"
    with torch.inference_mode():
        model = loader.load_streamed(str(models / MODEL), {})
    assert not hasattr(model, "streamer")
    assert torch.equal(sample(model), sample(native))


def test_a_family_that_nobody_knows_streams_as_any_other(
    models: Path, virtual_device: Callable[[int], Any], native: ModelPatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its classes have names that no table has, in modules that no table has."""
    virtual_device(24 * MB)
    with torch.inference_mode():
        model = load_streamed(str(models / MODEL), {})
    for module in model.model.modules():
        if type(module).__module__.startswith("comfy.ldm.flux"):
            kind = type(module)
            module.__class__ = type(f"New{kind.__name__}", (kind,), {"__module__": "comfy.ldm.unheard.model"})
    assert torch.equal(sample(model), sample(native))
    assert model.status()["mode"] == "streamed"
