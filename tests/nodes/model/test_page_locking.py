"""How much may be page-locked, and what becomes of models where that is too little."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import psutil
import pytest
import torch
from comfy.cli_args import args
from comfy.model_patcher import ModelPatcher
from held import held_by_others
from sampling import MB, MODEL, Patched, sample, settle, with_lora
from weightstream.nodes.host import devices
from weightstream.nodes.loader import load_streamed
from weightstream.nodes.model.patcher import StreamedModelPatcher
from weightstream.streaming.machine.host_memory import HostMemory

Load = Callable[..., StreamedModelPatcher]
GB = 1 << 30


@pytest.mark.parametrize(
    ("host", "group", "expected"),
    [
        (-1, None, None),
        (0, HostMemory(GB, GB), None),
        (57.6 * GB, None, int(57.6 * GB)),
        # The host's share of the machine is its share of the container, too.
        (57.6 * GB, HostMemory(16 * GB, 4 * GB), int(14.4 * GB)),
        (57.6 * GB, HostMemory(256 * GB, 4 * GB), int(57.6 * GB)),
    ],
)
def test_the_limit_of_page_locked_memory(
    monkeypatch: pytest.MonkeyPatch, host: float, group: HostMemory | None, expected: int | None
) -> None:
    monkeypatch.setattr(mm, "MAX_PINNED_MEMORY", host)
    monkeypatch.setattr(devices, "group_memory", lambda: group)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: HostMemory(64 * GB, 8 * GB))
    limit = devices._pin_limit()
    assert limit == (expected if expected is None else pytest.approx(expected, abs=8))


@pytest.mark.parametrize(
    ("system", "group", "expected"),
    [
        (HostMemory(64 * GB, 8 * GB), None, 6 * GB),
        (HostMemory(8 * GB, 4 * GB), None, 4 * GB - int(0.8 * GB)),
        (HostMemory(64 * GB, 40 * GB), HostMemory(16 * GB, 5 * GB), 5 * GB - int(1.6 * GB)),
        (HostMemory(64 * GB, 3 * GB), HostMemory(16 * GB, 5 * GB), GB),
        (HostMemory(64 * GB, GB), None, -GB),
    ],
)
def test_the_memory_that_may_still_be_taken(
    monkeypatch: pytest.MonkeyPatch, system: HostMemory, group: HostMemory | None, expected: int
) -> None:
    monkeypatch.setattr(devices, "group_memory", lambda: group)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: system)
    assert devices.spare_ram() == pytest.approx(expected, abs=8)


def test_without_page_locking_everything_is_staged(
    streamed: Load, plain: torch.Tensor, plain_with_lora: Patched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(args, "disable_pinned_memory", True)
    before = held_by_others()
    model = streamed(64 * MB, vram_limit=14 * MB)
    for _ in range(2):
        assert torch.equal(sample(model), plain)
        assert torch.equal(sample(with_lora(model, 0.5)), plain_with_lora(0.5))
    now = model.status()
    assert now["mode"] == "streamed"
    assert now["pinned_bytes"] == 0
    assert "page-locking is switched off" in now["explain"]
    assert devices.pins.used == before


@pytest.mark.parametrize("lora", [False, True])
def test_two_models_take_turns_with_room_for_the_copies_of_one(
    models: Path,
    virtual_device: Callable[[int], Any],
    native: ModelPatcher,
    plain: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    lora: bool,
) -> None:
    virtual_device(64 * MB)
    with torch.inference_mode():
        first = load_streamed(str(models / MODEL), {}, 14 * MB)
        gc.collect()
        settle(first)
        held = first.status()["pinned_bytes"]
        assert held > 20 * MB
        # Room for the copies of one and for a ring.
        monkeypatch.setattr(devices.pins, "limit", int(1.4 * held))
        second = load_streamed(str(models / MODEL), {}, 14 * MB)
    expected = sample(with_lora(native, 0.5) if lora else native)
    for _ in range(2):
        for model in (first, second):
            latent = sample(with_lora(model, 0.5) if lora else model)
            model.streamer.finish_building()
            assert torch.equal(latent, expected)
            assert devices.pins.used <= devices.pins.limit
    assert torch.equal(sample(first), plain)
