"""Nodes that rebuild a model through its loader: for another device, for several of them.

A CPU host knows one device. Here it is shown two, of which torch makes no difference, with a virtual device each.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras import nodes_multigpu
from comfy_extras.nodes_multigpu import MultiGPUCFGSplitNode, SelectModelDeviceNode
from prompts import check_streams, guided, output
from quantised import FORMATS, write_quantised
from safetensors.torch import load_file
from sampling import MB, MODEL, with_lora
from weightstream.nodes.host import devices
from weightstream.nodes.loader import load_streamed
from weightstream.nodes.model.offload import Mode, OffloadSettings
from weightstream.nodes.settings import with_settings
from weightstream.streaming import VirtualMemory

import nodes as host_nodes

FIRST, SECOND = torch.device("cpu", 0), torch.device("cpu", 1)


@pytest.fixture
def memories(monkeypatch: pytest.MonkeyPatch) -> tuple[VirtualMemory, VirtualMemory]:
    devices.read_environment()
    pair = VirtualMemory(24 * MB, "gpu:0"), VirtualMemory(24 * MB, "gpu:1")
    monkeypatch.setattr(devices._virtual, "devices", pair)
    monkeypatch.setattr(mm, "get_torch_device", lambda: FIRST)
    monkeypatch.setattr(mm, "get_all_torch_devices", lambda exclude_current=False: [FIRST, SECOND][exclude_current:])
    return pair


@pytest.fixture
def loaded(models: Path, memories: Any) -> Iterator[Any]:
    with torch.inference_mode():
        yield load_streamed(str(models / MODEL), {})


def select(model: Any, device: str) -> Any:
    return output(SelectModelDeviceNode.execute(model, device))


def select_gpu(model: Any, device: torch.device) -> Any:
    """What the node does for a GPU that it finds. For a CPU, as ours are, it goes another way."""
    return nodes_multigpu._retarget_patcher(model.clone(), device, model.offload_device)


def test_a_model_selected_for_another_device_streams_there(loaded: Any, memories: Any, native: ModelPatcher) -> None:
    expected = guided(native)
    second = select_gpu(loaded, SECOND)
    assert type(second) is type(loaded)
    assert second.streamer is not loaded.streamer
    for _ in range(2):
        check_streams(lambda: guided(second), second, expected)
        assert (memories[0].allocated, memories[1].allocated > 0) == (0, True)
    backend = second.streamer.backend
    guided(second)
    assert second.streamer.backend is backend, "it was set up anew"
    back = select_gpu(second, FIRST)
    assert back.load_device == FIRST
    check_streams(lambda: guided(back), back, expected)
    check_streams(lambda: guided(loaded), loaded, expected)


@pytest.mark.parametrize("device", ["default", "gpu:0", "cpu", "gpu:7"])
def test_the_device_that_it_has_or_none_leaves_the_streaming_alone(
    loaded: Any, native: ModelPatcher, device: str
) -> None:
    selected = select(with_lora(loaded, 0.5), device)
    assert selected.streamer is loaded.streamer
    check_streams(lambda: guided(selected), selected, guided(with_lora(native, 0.5)))


def test_patches_go_along_to_another_device(loaded: Any, native: ModelPatcher) -> None:
    before = select_gpu(with_lora(loaded, 0.7), SECOND)
    after = with_lora(select_gpu(loaded, SECOND), 0.7)
    expected = guided(with_lora(native, 0.7))
    for model in (before, after):
        check_streams(lambda model=model: guided(model), model, expected)


@pytest.mark.parametrize("strength", [0.0, 0.7])
def test_both_prompts_at_once_on_two_devices(loaded: Any, memories: Any, models: Path, strength: float) -> None:
    """Each device streams its own copy of the model, on a thread of its own."""

    def split(model: Any) -> Any:
        with torch.inference_mode():
            return output(MultiGPUCFGSplitNode.execute(with_lora(model, strength), 2))

    with torch.inference_mode():
        native = host_nodes.UNETLoader().load_unet(MODEL, "default")[0]
    expected = guided(split(native))
    mm.unload_all_models()
    model = split(loaded)
    (other,) = model.get_additional_models_with_key("multigpu")
    assert type(other) is type(loaded)
    assert other.load_device == SECOND
    for _ in range(2):
        before = other.status()["counters"]["streamed_bytes"]
        check_streams(lambda: guided(model), model, expected)
        assert other.status()["counters"]["streamed_bytes"] > before
        assert all(memory.allocated > 0 for memory in memories)
    check_streams(lambda: guided(loaded), loaded, guided(native))


def test_a_split_model_that_moves_to_the_other_device(loaded: Any, native: ModelPatcher) -> None:
    with torch.inference_mode():
        moved = select(output(MultiGPUCFGSplitNode.execute(loaded, 2)), "gpu:1")
    assert moved.load_device == SECOND
    assert moved.get_additional_models_with_key("multigpu") == []
    check_streams(lambda: guided(moved), moved, guided(native))


def test_a_split_on_a_machine_with_one_device_changes_nothing(
    loaded: Any, native: ModelPatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mm, "get_all_torch_devices", lambda exclude_current=False: [FIRST])
    model = output(MultiGPUCFGSplitNode.execute(loaded, 2))
    assert model.streamer is loaded.streamer
    check_streams(lambda: guided(model), model, guided(native))


def through_settings(model: Any, mode: Mode = Mode.AUTO) -> Any:
    return with_settings(model, OffloadSettings(mode=mode))


def cfg_split(model: Any) -> Any:
    return output(MultiGPUCFGSplitNode.execute(model, 2))


@pytest.mark.parametrize("form", ["plain", "fp8", "pt"])
def test_cfg_split_behind_the_settings_of_any_model(
    models: Path, memories: Any, native: ModelPatcher, tmp_path: Path, form: str
) -> None:
    file = {"plain": models / MODEL, "fp8": tmp_path / "q.safetensors", "pt": tmp_path / "q.pt"}[form]
    if form == "fp8":
        write_quantised(models / MODEL, file, FORMATS["fp8"])
    elif form == "pt":
        torch.save(load_file(models / MODEL), file)
    with torch.inference_mode():
        foreign = comfy.sd.load_diffusion_model(str(file))
        expected = guided(cfg_split(foreign))
        model = cfg_split(through_settings(foreign))
        for _ in range(2):
            assert torch.equal(guided(model), expected)
        assert memories[1].allocated > 0


@pytest.mark.parametrize(("streams", "mode"), [(False, Mode.AUTO), (True, Mode.OFF)])
def test_settings_behind_a_cfg_split_leave_it_alone_and_say_why(
    models: Path, memories: Any, caplog: pytest.LogCaptureFixture, streams: bool, mode: Mode
) -> None:
    with torch.inference_mode():
        foreign = comfy.sd.load_diffusion_model(str(models / MODEL))
        model = cfg_split(through_settings(foreign) if streams else foreign)
        expected = guided(model)
        with caplog.at_level("INFO"):
            assert through_settings(model, mode) is model
        assert "runs on several GPUs at once" in caplog.text
        assert torch.equal(guided(model), expected)


def test_models_on_the_second_device_make_room_for_others(
    models: Path, memories: Any, loaded: Any, native: ModelPatcher
) -> None:
    expected = guided(native)
    with torch.inference_mode():
        others = [select_gpu(load_streamed(str(models / MODEL), {}), SECOND) for _ in range(3)]
    for other in (*others, *others):
        assert torch.equal(guided(other), expected)
        assert memories[1].allocated <= memories[1].budget
    assert torch.equal(guided(loaded), expected)
