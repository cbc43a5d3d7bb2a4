"""A MODEL that one device computes while others bring weights to it, through ComfyUI's own sampling."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from placing import Machine, place
from sampling import LORA, MB, sample
from weightstream.nodes.model import streamed_model
from weightstream.nodes.model.offload import Mode, OffloadSettings
from weightstream.nodes.settings import with_settings
from weightstream.nodes.twins import feeding
from weightstream.streaming import Feeder, VirtualMemory
from weightstream.streaming.devices import backend as backends
from weightstream.streaming.split.assignment import DeviceRoom


@pytest.fixture
def memories(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> tuple[VirtualMemory, ...]:
    """Three virtual devices, of which the others can bring weights to the first, as GPUs with NVLink can."""
    monkeypatch.setattr(backends, "LEAST_FED_BYTES", 0)
    monkeypatch.setattr(streamed_model, "Feeder", partial(Feeder, chunk_bytes=MB))
    monkeypatch.setattr(
        feeding, "helpers_of", lambda devices: feeding.Helpers([*devices[1:]], 1.0, float(len(devices)))
    )
    # Of virtual devices nobody knows how fast they are.
    monkeypatch.setattr(feeding, "feeding_is_faster", lambda sizes, rooms, _: total(rooms) < sum(sizes))
    memories = machine(3, 5 * MB)
    memories[0].budget = 13 * MB
    return memories


def total(rooms: list[DeviceRoom]) -> float:
    return sum(room.nbytes for room in rooms)


def brought_by(model: Any) -> list[str]:
    return [feeder.helper.name for feeder in model.streamer.backend.feeders if feeder.is_open]


def test_one_device_computes_and_all_links_bring_weights(
    loaded: Any, native: ModelPatcher, said: list[str], memories: tuple[VirtualMemory, ...], models: Path
) -> None:
    model = place(loaded)[0]
    assert said == ["MODEL on gpu:0, weights over gpu:0, gpu:1, gpu:2"]
    assert model.streamer.backend.name == "gpu:0"
    assert [feeder.helper.name for feeder in model.streamer.backend.feeders] == ["gpu:1", "gpu:2"]
    assert model.parts == []
    tensors = comfy.utils.load_torch_file(str(models / LORA))
    patched = [comfy.sd.load_lora_for_models(one, None, tensors, 0.7, 0)[0] for one in (model, native)]
    for _ in range(2):
        for ours, theirs in ((model, native), patched):
            assert torch.equal(sample(ours), sample(theirs))
            assert [memory.allocated for memory in memories[1:]] == [4 * MB, 4 * MB]
    assert "from page-locked memory over 3 links" in model.streamer.explain()
    mm.unload_all_models()
    assert all(memory.allocated == 0 for memory in memories)
    assert torch.equal(sample(model), sample(native))
    again = place(loaded)[0]
    assert again.streamer is model.streamer


def test_a_device_that_fills_up_brings_no_more(
    loaded: Any, native: ModelPatcher, memories: tuple[VirtualMemory, ...]
) -> None:
    model = place(loaded)[0]
    memories[2].budget = 3 * MB
    assert torch.equal(sample(model), sample(native))
    assert brought_by(model) == ["gpu:1"]


@pytest.mark.parametrize(
    "inputs", [{"split": "equal"}, {"split": "ratio", "ratio": "1,1,1"}], ids=lambda one: one["split"]
)
def test_who_says_how_much_each_gets_has_blocks_on_each(
    loaded: Any, native: ModelPatcher, memories: tuple[VirtualMemory, ...], inputs: dict[str, str]
) -> None:
    for memory in memories:
        memory.budget = 13 * MB
    model = place(loaded, **inputs)[0]
    assert len(model.streamers) == 3
    assert torch.equal(sample(model), sample(native))


def test_what_fits_on_all_devices_streams_on_none(
    loaded: Any, native: ModelPatcher, memories: tuple[VirtualMemory, ...]
) -> None:
    for memory in memories:
        memory.budget = 20 * MB
    model = place(loaded)[0]
    assert len(model.streamers) == 3
    assert torch.equal(sample(model), sample(native))


def test_virtual_devices_are_not_tried(loaded: Any, machine: Machine) -> None:
    machine(2, 13 * MB)
    assert len(place(loaded)[0].streamers) == 2


@pytest.mark.parametrize(
    "settings", [OffloadSettings(mode=Mode.SYNC), OffloadSettings(pin_memory=False), OffloadSettings(pinned_limit=MB)]
)
def test_what_does_not_stream_from_page_locked_memory_is_brought_by_nobody(
    loaded: Any, native: ModelPatcher, memories: tuple[VirtualMemory, ...], settings: OffloadSettings
) -> None:
    for memory in memories:
        memory.budget = 13 * MB
    model = place(with_settings(loaded, settings))[0]
    assert len(model.streamers) == 3
    assert torch.equal(sample(model), sample(native))


def test_who_moves_away_and_back_is_fed_again(
    loaded: Any, native: ModelPatcher, memories: tuple[VirtualMemory, ...]
) -> None:
    model = place(loaded)[0]
    expected = sample(native)
    assert torch.equal(sample(model), expected)
    memories[1].budget = 24 * MB
    elsewhere = place(model, devices="gpu:1")[0]
    assert torch.equal(sample(elsewhere), expected)
    assert torch.equal(sample(model), expected)
    assert model.streamer.backend.name == "gpu:0"
    assert brought_by(model) == ["gpu:1", "gpu:2"]
