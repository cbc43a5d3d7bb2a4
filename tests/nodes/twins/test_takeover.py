"""What another node has loaded and somebody has changed: it streams as it is, or it passes through."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.sd
import comfy.utils
import folder_paths
import pytest
import torch
from comfy.model_patcher import LowVramPatch, ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_torch_compile import TorchCompileModel
from quantised import FORMATS, write_quantised
from safetensors.torch import load_file, save_file
from sampling import LORA, MB, MODEL, sample, with_lora
from weightstream.nodes.host import devices
from weightstream.nodes.loader import load_streamed
from weightstream.nodes.model import streamed_model
from weightstream.nodes.model.offload import Mode, OffloadSettings
from weightstream.nodes.model.patcher import StreamedModelPatcher
from weightstream.nodes.settings import with_settings
from weightstream.nodes.state.loaded_state import ON_MODELS, ON_MODULES
from weightstream.nodes.tell import messages
from weightstream.streaming import UnsupportedModelError, VirtualMemory

Load = Callable[..., StreamedModelPatcher]


@pytest.fixture
def path(models: Path, tmp_path: Path) -> Path:
    """A file of this test's own."""
    return Path(shutil.copy(models / MODEL, tmp_path / "own.safetensors"))


@pytest.fixture
def foreign(path: Path, virtual_device: Callable[[int], VirtualMemory]) -> ModelPatcher:
    """A MODEL from the host's own loader, on a device that it does not fit."""
    virtual_device(24 * MB)
    with torch.inference_mode():
        return comfy.sd.load_diffusion_model(str(path))


def stream(model: ModelPatcher, **settings: Any) -> ModelPatcher:
    with torch.inference_mode():
        return with_settings(model, OffloadSettings(**settings))


def load_pickled(path: Path, folder: Path) -> ModelPatcher:
    """The same model, from a file that cannot be mapped."""
    torch.save(load_file(path), folder / "own.pt")
    with torch.inference_mode():
        return comfy.sd.load_diffusion_model(str(folder / "own.pt"))


def move_to_and_fro(model: ModelPatcher) -> None:
    """As the host does it: to the GPU in a node's inference mode, back outside of it. torch makes no views of these."""
    for parameter in model.model.parameters():
        parameter.data = parameter.data.clone()
        with pytest.raises(RuntimeError, match="version counter"):
            parameter.detach()[:1]


def lora_bypass(model: ModelPatcher) -> ModelPatcher:
    lora = comfy.utils.load_torch_file(folder_paths.get_full_path_or_raise("loras", LORA))
    return comfy.sd.load_bypass_lora_for_models(model, None, lora, 0.8, 0)[0]


def patched_forward(model: ModelPatcher) -> ModelPatcher:
    """As nodes that skip steps do it: a wrapper that exchanges a method of the model that it was made for."""
    model = model.clone()
    inner = model.get_model_object("diffusion_model")

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        own = inner.final_layer.forward
        inner.final_layer.forward = lambda *given: 0.5 * own(*given)
        try:
            return executor(*args, **kwargs)
        finally:
            del inner.final_layer.forward

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", wrapper)
    return model


def compiled(model: ModelPatcher) -> ModelPatcher:
    return TorchCompileModel.execute(model, "eager").result[0]


@pytest.mark.parametrize("change", [lora_bypass, patched_forward, compiled])
def test_what_holds_the_loaded_model_is_passed_through(
    foreign: ModelPatcher, change: Callable[[ModelPatcher], ModelPatcher], caplog: pytest.LogCaptureFixture
) -> None:
    with torch.inference_mode():
        changed = change(foreign)
    expected = sample(changed)
    with caplog.at_level("INFO"):
        model = stream(changed)
    assert model is changed
    assert "connect this node directly behind the loader" in caplog.text
    assert torch.equal(sample(model), expected)
    with torch.inference_mode():
        behind = change(stream(foreign))
    assert isinstance(behind, StreamedModelPatcher)
    assert torch.equal(sample(behind), expected)
    assert behind.status()["counters"]["steps"] > 0


class Louder(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.5 * self.inner(x)


def exchange_module(model: torch.nn.Module) -> None:
    model.img_in = Louder(model.img_in)


def exchange_method(model: torch.nn.Module) -> None:
    model.final_layer.forward = lambda *args: 0.5 * type(model.final_layer).forward(HELD[0], *args)
    HELD[0] = model.final_layer


def exchange_weight(model: torch.nn.Module) -> None:
    model.img_in.weight = torch.nn.Parameter(model.img_in.weight * 1.5, requires_grad=False)


HELD: list[Any] = [None]


@pytest.mark.parametrize("before", [False, True], ids=["streamed first", "changed first"])
@pytest.mark.parametrize("exchange", [exchange_module, exchange_method, exchange_weight])
def test_what_somebody_has_exchanged_is_not_lost(
    foreign: ModelPatcher, exchange: Callable[[torch.nn.Module], None], before: bool
) -> None:
    plain = sample(foreign)
    if not before:
        assert torch.equal(sample(stream(foreign)), plain)
    mm.unload_all_models()
    exchange(foreign.model.diffusion_model)
    expected = sample(foreign)
    assert not torch.equal(expected, plain)
    assert torch.equal(sample(stream(foreign)), expected)


@pytest.mark.parametrize("pickled", [False, True], ids=["by the factory", "by a copy"])
def test_patches_that_a_clone_has_left_in_the_weights(
    path: Path, foreign: ModelPatcher, tmp_path: Path, pickled: bool
) -> None:
    """The host forgets a clone that is gone, and restores the weights when another one is loaded."""
    if pickled:
        foreign = load_pickled(path, tmp_path)
    expected = sample(foreign)
    sample(with_lora(foreign, 0.8))
    mm.cleanup_models_gc()
    assert foreign.backup
    model = stream(foreign)
    assert torch.equal(sample(model), expected)
    assert torch.equal(sample(foreign), expected)


CHANGES: dict[str, Callable[[ModelPatcher], None]] = {
    "number": lambda model: setattr(model.model.diffusion_model.double_blocks[0].img_norm1, "eps", 0.5),
    "list": lambda model: model.model.diffusion_model.pe_embedder.axes_dim.__setitem__(slice(None), [32, 48, 48]),
    "buffer": lambda model: model.model.model_sampling.set_parameters(shift=3.0),
    "weight": lambda model: model.model.diffusion_model.double_blocks[0].img_mlp[0].weight.data[5:].mul_(2),
    "end of a weight": lambda model: model.model.diffusion_model.double_blocks[0].img_mlp[0].weight.data[-3:].mul_(9),
}


@pytest.mark.parametrize("before", [False, True], ids=["", "streamed before"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_somebody_has_changed_in_place_is_not_lost(foreign: ModelPatcher, change: str, before: bool) -> None:
    plain = sample(foreign)
    if before:
        stream(foreign)
    mm.unload_all_models()
    with torch.inference_mode():
        CHANGES[change](foreign)
    expected = sample(foreign)
    assert not torch.equal(expected, plain)
    model = stream(foreign)
    assert model.status()["mode"] == "off"
    assert torch.equal(sample(model), expected)


def own_function(patcher: ModelPatcher) -> ModelPatcher:
    """As some models have it from their constructor: a function on one module that knows another one."""
    transformer = patcher.model.diffusion_model

    def known() -> torch.nn.Module:
        return transformer

    transformer.double_blocks[0].owner_of_all = known
    return patcher


def load_with_own_function(path: str, disable_dynamic: bool = False) -> ModelPatcher:
    return own_function(comfy.sd.load_diffusion_model(path, disable_dynamic=disable_dynamic))


def test_functions_that_every_such_model_has_are_made_anew(foreign: ModelPatcher, path: Path) -> None:
    foreign = own_function(foreign)
    assert stream(foreign) is foreign, "no loader makes it anew"
    foreign.cached_patcher_init = (load_with_own_function, (str(path),))
    model = stream(foreign)
    assert model.model.diffusion_model.double_blocks[0].owner_of_all() is model.model.diffusion_model
    assert torch.equal(sample(model), sample(foreign))
    assert torch.equal(sample(stream(model, mode=Mode.OFF)), sample(foreign))


@pytest.mark.parametrize("form", ["fp8", "int8", "nvfp4", "pt"])
def test_quantised_models_and_such_that_cannot_be_mapped_can_be_loaded_anew(
    path: Path, tmp_path: Path, virtual_device: Callable[[int], VirtualMemory], form: str
) -> None:
    """For nodes that want them on another device."""
    virtual_device(24 * MB)
    file = tmp_path / ("other.pt" if form == "pt" else "other.safetensors")
    if form == "pt":
        torch.save(load_file(path), file)
    else:
        write_quantised(path, file, FORMATS[form])
    with torch.inference_mode():
        foreign = comfy.sd.load_diffusion_model(str(file))
    expected = sample(foreign)
    model = stream(foreign)
    assert torch.equal(sample(model), expected)
    mapped = [spec.source is not None for spec in model.streamer.blocks.specs]
    assert (sum(mapped) > len(mapped) / 2) is (form != "pt")
    with torch.inference_mode():
        again = model.deepclone_multigpu(foreign.load_device)
    assert again.model is not model.model
    assert torch.equal(sample(again), expected)
    del foreign
    assert torch.equal(sample(stream(model, mode=Mode.OFF)), expected)


def test_handles_of_dynamic_vram_are_not_copied(path: Path, foreign: ModelPatcher, tmp_path: Path) -> None:
    """Each frees its memory when it dies, and a copy would do so again."""

    class Handle:
        __module__ = "comfy_aimdo.model_vbar"

        def __deepcopy__(self, memo: dict) -> None:
            pytest.fail("it was copied")

    foreign = load_pickled(path, tmp_path)
    layer = foreign.model.diffusion_model.double_blocks[0].img_mlp[0]
    pins = {"weights": (Handle(), [], [-1])}
    foreign.model.dynamic_pins = {torch.device("cuda"): pins}
    foreign.model.dynamic_vbars, foreign.model.dynamic_patchers = {torch.device("cuda"): Handle()}, {1}
    layer._v, layer._pin_state, layer._v_signature = (Handle(), 0, 1), pins, None
    layer.weight_lowvram_function, layer.comfy_cast_weights = LowVramPatch("", {}), True
    foreign.model.diffusion_model.double_blocks[0]._v_block = (Handle(), 0, 2)
    foreign.model.diffusion_model._comfy_cross_step_state = {"key": (1,), "static": [torch.zeros(1)]}
    model = stream(foreign)
    ours = model.model.diffusion_model.double_blocks[0].img_mlp[0]
    assert not (vars(ours).keys() | vars(model.model).keys()) & (ON_MODELS | ON_MODULES | {"comfy_cast_weights"})
    assert layer._pin_state is pins
    again = load_pickled(path, tmp_path)
    again.model.diffusion_model.double_blocks[0].img_mlp[0].another = [Handle()]
    assert stream(again) is again


def test_what_the_host_has_moved_to_and_fro_is_taken_over_again(foreign: ModelPatcher) -> None:
    before = sample(foreign)
    model = stream(foreign)
    move_to_and_fro(foreign)
    assert stream(foreign).model is model.model
    assert torch.equal(sample(stream(foreign)), before)


def test_a_file_that_was_replaced_since(foreign: ModelPatcher, path: Path) -> None:
    expected = sample(foreign)
    other = {name: weight * 1.25 for name, weight in load_file(path).items()}
    save_file(other, f"{path}.new")
    os.replace(f"{path}.new", path)
    assert torch.equal(sample(stream(foreign)), expected)


def test_a_file_that_is_gone(foreign: ModelPatcher, path: Path) -> None:
    expected = sample(foreign)
    path.unlink()
    model = stream(foreign)
    assert torch.equal(sample(model), expected)
    assert model.status()["mode"] == "streamed"


@pytest.mark.parametrize("moved", [False, True])
def test_weights_of_a_file_that_cannot_be_mapped_are_shared(
    path: Path, foreign: ModelPatcher, tmp_path: Path, moved: bool
) -> None:
    pickled = load_pickled(path, tmp_path)
    if moved:
        move_to_and_fro(pickled)
    model = stream(pickled)
    theirs = {weight.data_ptr() for weight in pickled.model.parameters()}
    specs = [spec for unit in model.streamer.blocks.units for spec in unit.layout.specs]
    assert all(spec.original.data_ptr() in theirs for spec in specs)
    assert torch.equal(sample(model), sample(foreign))


def test_our_own_loader_as_the_factory(path: Path, foreign: ModelPatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model in several files that could not stream when it was loaded; the host has no way of its own for it."""

    def refuse(*_: object, **__: object) -> None:
        raise UnsupportedModelError("not now")

    names = ("own-00001-of-00002.safetensors", "own-00002-of-00002.safetensors")
    tensors = list(load_file(path).items())
    for name, part in zip(names, (tensors[::2], tensors[1::2]), strict=True):
        save_file(dict(part), path.parent / name)
    with monkeypatch.context() as patch, torch.inference_mode():
        patch.setattr(streamed_model, "cut_model", refuse)
        model = load_streamed(str(path.parent / names[0]), {})
        assert not isinstance(model, StreamedModelPatcher)
    assert torch.equal(sample(stream(model)), sample(foreign))


def test_without_a_device_nothing_is_loaded(foreign: ModelPatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices._virtual, "devices", ())

    def build(*args: object, **kwargs: object) -> None:
        raise AssertionError("it was loaded")

    foreign.cached_patcher_init = (build, ())
    assert stream(foreign) is foreign


def test_plan_and_reasons_are_shown_on_the_node_that_asks(
    streamed: Load, foreign: ModelPatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[str, str]] = []
    monkeypatch.setattr(messages, "show", lambda text, node_id: shown.append((node_id, text)))
    loader = streamed(24 * MB, node_id="loader")
    with torch.inference_mode():
        first = with_settings(loader, OffloadSettings(), "first")
        second = with_settings(loader, OffloadSettings(mode=Mode.STREAM), "second")
    for model, node in ((first, "first"), (second, "second"), (first, "first"), (loader, "loader")):
        shown.clear()
        sample(model)
        assert {node_id for node_id, _ in shown} == {node}
    shown.clear()
    with torch.inference_mode():
        with_settings(foreign, OffloadSettings(mode=Mode.OFF), "off")
    assert shown == [("off", "its weights are moved ComfyUI's own way")]
