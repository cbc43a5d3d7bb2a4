"""What the host says of memory, and takes when it is asked to."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import comfy.model_management as mm
import psutil
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from sampling import MB
from small_patcher import CPU, small_patcher
from weightstream.nodes.host import devices, hosts
from weightstream.streaming import State, group_memory
from weightstream.streaming.machine.host_memory import HostMemory

GB = 1 << 30


def test_ram_is_counted_as_a_whole_or_by_its_control_group() -> None:
    group = group_memory()
    machine = psutil.virtual_memory().total
    assert hosts.counted_ram() in {machine, min(machine, group.total) if group is not None else machine}


@pytest.mark.parametrize(
    ("counted", "group", "expected"),
    [
        # A host that counts the machine, in a container with a quarter of it.
        (64 * GB, HostMemory(16 * GB, 4 * GB), 0.9 * 16 * GB),
        # One that has counted the container already: the limit is a share of that, and not a share of a share.
        (16 * GB, HostMemory(16 * GB, 4 * GB), 0.9 * 16 * GB),
        (64 * GB, HostMemory(256 * GB, 4 * GB), 0.9 * 64 * GB),
        (64 * GB, None, 0.9 * 64 * GB),
    ],
)
def test_the_limit_of_page_locked_memory_is_a_share_of_what_was_counted(
    monkeypatch: pytest.MonkeyPatch, counted: int, group: HostMemory | None, expected: float
) -> None:
    monkeypatch.setattr(mm, "MAX_PINNED_MEMORY", 0.9 * counted)
    monkeypatch.setattr(mm, "get_total_memory", lambda *_: counted)
    monkeypatch.setattr(devices, "group_memory", lambda: group)
    assert devices._pin_limit() == pytest.approx(expected, abs=8)


def test_page_locked_memory_is_counted_and_given_up_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mm.TOTAL_PINNED_MEMORY == 0
    assert mm.MAX_PINNED_MEMORY <= 0, "none is page-locked on a CPU"
    asked: list[float] = []

    class Pinned(ModelPatcher):
        """Holds page-locked memory, as one with dynamic VRAM does."""

        def is_dynamic(self) -> bool:
            return True

        def partially_unload_ram(self, size: float, **_: Any) -> float:
            asked.append(size)
            return size

    model = small_patcher(Pinned)
    model.model.dynamic_pins = {CPU: {"active": False, "current_prompt": False}}
    monkeypatch.setattr(mm, "current_loaded_models", [mm.LoadedModel(model)])
    mm.free_pins(50)
    assert asked
    assert asked[0] >= 50


def test_free_memory_is_in_bytes_and_of_the_device_that_is_asked_for() -> None:
    assert 0 < mm.get_free_memory(CPU) <= mm.get_total_memory(CPU)
    assert small_patcher().get_free_memory(CPU) == pytest.approx(mm.get_free_memory(CPU), abs=GB)
    assert 0 < mm.minimum_inference_memory() < 64 * GB


def test_the_state_of_vram_tells_of_the_command_line() -> None:
    assert mm.vram_state == mm.VRAMState.DISABLED, "--cpu"
    assert {"NO_VRAM", "LOW_VRAM", "NORMAL_VRAM", "HIGH_VRAM"} <= {state.name for state in mm.VRAMState}


def test_loaded_models_are_in_a_list_the_last_one_first() -> None:
    first, second = small_patcher(), small_patcher()
    mm.load_models_gpu([first])
    mm.load_models_gpu([second])
    assert [loaded.model for loaded in mm.current_loaded_models] == [second, first]
    [newest, _] = mm.current_loaded_models
    assert (newest.device, newest.currently_used) == (CPU, True)
    assert newest.model_loaded_memory() == second.loaded_size()


def test_unloading_all_models_unloads_ours(streamed: Callable[..., Any]) -> None:
    model = streamed(24 * MB)
    mm.load_models_gpu([model])
    assert model.streamer.state is not State.UNLOADED
    mm.unload_all_models()
    assert model.streamer.state is State.UNLOADED


def test_a_dtype_for_computing_can_be_asked_for() -> None:
    assert "supported_dtypes" in inspect.signature(mm.unet_manual_cast).parameters
    assert mm.unet_manual_cast(torch.float32, CPU) in (None, torch.float32, torch.float16, torch.bfloat16)
