"""A host that is not as we know it: said once, and models are loaded its own way."""

from __future__ import annotations

import ast
import functools
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import comfy.model_prefetch
import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import torch_compile
from recording import RecordingHost, recording_host  # noqa: F401
from sampling import MB, MODEL, sample
from weightstream.nodes.host import contracts, hosts
from weightstream.nodes.loader import load_streamed
from weightstream.nodes.model.offload import OffloadSettings
from weightstream.nodes.model.patcher import StreamedModelPatcher
from weightstream.nodes.page.status import full_status
from weightstream.nodes.settings import with_settings
from weightstream.nodes.twins.components import patcher_on
from weightstream.nodes.twins.split import split_over
from weightstream.streaming import UnsupportedModelError

ROOT = Path(contracts.__file__).parents[2]


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    contracts.broken_contracts.cache_clear()
    yield
    contracts.broken_contracts.cache_clear()


def test_nothing_is_broken_on_this_host() -> None:
    assert contracts.broken_contracts() == ()
    assert full_status()["comfyui"] == {"version": hosts.VERSION, "broken": []}


def test_every_name_of_the_host_that_we_use_is_asked_for() -> None:
    """By its full name, as ``mm.free_memory``: what is imported by name fails at the start, or is borrowed."""
    used: set[tuple[str, str]] = set()
    for path in (ROOT / "nodes").rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        imports = [each for node in ast.walk(tree) if isinstance(node, ast.Import) for each in node.names]
        modules = {each.asname or each.name: each.name for each in imports if each.name.startswith("comfy.")}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and (module := modules.get(ast.unparse(node.value))) is not None:
                used.add((module, node.attr))
    assert len(used) > 20
    assert used - {(module, name) for module, names in contracts.MODULES.items() for name in names} == set()


Change = Callable[[pytest.MonkeyPatch], Any]
CHANGES: dict[str, tuple[Change, str]] = {
    "a method of patchers": (
        lambda patch: patch.delattr(ModelPatcher, "use_ejected"),
        "ModelPatcher.use_ejected is gone",
    ),
    "an argument of a method": (
        lambda patch: patch.setattr(ModelPatcher, "clone", lambda self, other: self),
        "ModelPatcher.clone cannot be called with disable_dynamic and model_override",
    ),
    "a function": (lambda patch: patch.delattr(mm, "minimum_inference_memory"), "minimum_inference_memory is gone"),
    "an argument of a loader": (
        lambda patch: patch.setattr(comfy.sd, "load_diffusion_model_state_dict", lambda sd: None),
        "load_diffusion_model_state_dict cannot be called with 1 argument and model_options and metadata and",
    ),
    "a kind of wrappers": (
        lambda patch: patch.delattr(WrappersMP, "APPLY_MODEL"),
        "WrappersMP.APPLY_MODEL is gone",
    ),
    "what cannot even be asked": (
        lambda patch: patch.setattr(hosts, "broken_recordings", lambda: 1 / 0),
        "asking failed with ZeroDivisionError",
    ),
}


@pytest.mark.parametrize(("change", "expected"), CHANGES.values(), ids=CHANGES)
def test_what_is_broken_is_found_and_named(monkeypatch: pytest.MonkeyPatch, change: Change, expected: str) -> None:
    with monkeypatch.context() as patch:
        change(patch)
        [found] = contracts.broken_contracts()
    assert expected in found


def _plainly(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **options: function(*args, **options)


def _by_place(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: function(*args)


WRAPPED: dict[str, tuple[Any, str, Callable[[Callable[..., Any]], Any]]] = {
    "a method": (ModelPatcher, "clone", _plainly),
    "by functools.wraps": (
        ModelPatcher,
        "unpatch_model",
        lambda function: functools.wraps(function)(_plainly(function)),
    ),
    "by place, as we call it": (mm, "get_free_memory", _by_place),
    "with other names": (mm, "is_device_cpu", lambda function: lambda dev: function(dev)),
    "by a partial": (mm, "free_pins", functools.partial),
    "a constructor": (ModelPatcher, "__init__", _plainly),
}


@pytest.mark.parametrize(("holder", "name", "wrap"), WRAPPED.values(), ids=WRAPPED)
def test_what_other_packs_have_wrapped_is_not_broken(
    streamed: Callable[..., Any],
    native: ModelPatcher,
    monkeypatch: pytest.MonkeyPatch,
    holder: Any,
    name: str,
    wrap: Callable[[Callable[..., Any]], Any],
) -> None:
    expected = sample(native)
    monkeypatch.setattr(holder, name, wrap(getattr(holder, name)))
    assert contracts.broken_contracts() == ()
    model = streamed(24 * MB)
    assert isinstance(model, StreamedModelPatcher)
    assert torch.equal(sample(with_settings(model, OffloadSettings(vram_limit=14 * MB)).clone()), expected)


@pytest.mark.parametrize(
    ("gone", "expected"),
    [
        (["malloc_graph_begin"], ("model_prefetch.malloc_graph_begin is gone",)),
        (["pause_malloc_graph"], ("model_prefetch.pause_malloc_graph is gone",)),
        (["cleanup_malloc_graph", "cleanup_prefetch_queues"], ("model_prefetch.cleanup_malloc_graph is gone",)),
        (["cleanup_malloc_graph"], ()),
        (["MALLOC_GRAPHS"], ()),
    ],
)
def test_a_host_of_that_age_must_keep_its_records_as_we_know_them(
    recording_host: RecordingHost,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    gone: list[str],
    expected: tuple[str, ...],
) -> None:
    """Else they would be kept under other names, with what is ours in them."""
    monkeypatch.setattr(hosts, "VERSION", "0.36.0")
    assert contracts.broken_contracts() == ()
    contracts.broken_contracts.cache_clear()
    with monkeypatch.context() as patch:
        for name in gone:
            patch.delattr(comfy.model_prefetch, name)
        assert contracts.broken_contracts() == expected
        contracts.broken_contracts.cache_clear()
        patch.setattr(hosts, "VERSION", "0.33.0")
        # An older one keeps none.
        assert contracts.broken_contracts() == (() if gone == ["malloc_graph_begin"] else expected)


def test_files_are_loaded_where_nobody_marks_them_any_more(
    streamed: Callable[..., Any], native: ModelPatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The marks are for the host's own way of loading: without them models stream."""
    monkeypatch.setitem(sys.modules, "comfy.storage", ModuleType("comfy.storage"))
    expected = sample(native)
    model = streamed(24 * MB)
    assert isinstance(model, StreamedModelPatcher)
    assert torch.equal(sample(model), expected)


@pytest.fixture
def strange(monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer host, whose patchers cannot do something that is asked of them."""
    monkeypatch.setattr(hosts, "VERSION", "0.99.0")
    monkeypatch.setitem(contracts.PATCHER_METHODS, "will_be_there_no_more", ())
    monkeypatch.setattr(hosts, "broken_recordings", lambda: iter(()))


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
        patcher_on(foreign, torch.device("cpu", 1))
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
    monkeypatch.delattr(torch_compile, "COMPILE_KEY")  # Without this one models stream.
    monkeypatch.delattr(comfy.model_patcher, "LazyCastingParam")
    monkeypatch.setitem(sys.modules, "comfy_aimdo.model_vbar", None)
    monkeypatch.setitem(sys.modules, "comfyui_version", None)
    with monkeypatch.context() as patch:
        patch.delattr(mm, "MAX_PINNED_MEMORY")
        extension = loaded_anew()
    loader, found = (sys.modules[f"weightstream_anew.nodes.{name}"] for name in ("loader", "host.hosts"))
    assert found.VERSION == "unknown"
    monkeypatch.setattr(found, "broken_recordings", lambda: iter(()))
    assert sys.modules["weightstream_anew.nodes.host.contracts"].broken_contracts() == (
        "comfy.model_patcher.LazyCastingParam is gone",
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
