"""One model is unloaded, or its page-locked memory freed, by route."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from placing import Machine
from sampling import MB, MODEL, sample, settle
from told import entry_of
from weightstream.nodes.host import devices
from weightstream.nodes.loader import load_streamed
from weightstream.nodes.model.patcher import StreamedModelPatcher
from weightstream.nodes.model.streamed_model import streamed_models
from weightstream.nodes.page import routes
from weightstream.nodes.page.status import full_status
from weightstream.nodes.twins.split import split_over
from weightstream.streaming import VirtualMemory

Load = Callable[..., StreamedModelPatcher]


@pytest.mark.parametrize("what", [routes.MODEL, routes.PINNED])
def test_one_model_is_unloaded_and_runs_again(machine: Machine, models: Path, what: str) -> None:
    machine(1, 48 * MB)
    with torch.inference_mode():
        one, two = (load_streamed(str(models / MODEL), {}, vram_limit=16 * MB) for _ in range(2))
    expected = sample(one)
    for model in (one, two):
        settle(model)
    before, other = entry_of(one), entry_of(two)
    freed = routes.free([one.streamed], what, nullcontext)
    after = entry_of(one)
    assert entry_of(two)["device_bytes"] == other["device_bytes"]
    assert entry_of(two)["pinned_bytes"] == other["pinned_bytes"]
    if what == routes.MODEL:
        assert freed == {"freed_device": before["device_bytes"], "freed_pinned": 0}
        assert (after["device_bytes"], after["ladder"]) == (0, "unloaded")
        assert after["pinned_bytes"] == before["pinned_bytes"]
    else:
        assert freed["freed_pinned"] == before["pinned_bytes"] > 0
        assert after["pinned_bytes"] == 0
    assert torch.equal(sample(one), expected)


def test_page_locked_memory_that_is_in_use_stays(streamed: Load) -> None:
    model = streamed(24 * MB)
    settle(model)
    model.streamer.lend_masters()
    with pytest.raises(routes.BusyError, match="it is in use"):
        routes.unlock([model.streamed], nullcontext)
    model.streamer.take_masters_back()
    routes.unlock([model.streamed], nullcontext)
    assert entry_of(model)["pinned_bytes"] == 0


def test_unlocking_ends_when_a_prompt_begins(streamed: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "UNLOCKED_AT_ONCE", 1)
    model = streamed(24 * MB)
    settle(model)
    expected, before = sample(model), entry_of(model)["pinned_bytes"]
    pauses = [True, True]

    @contextmanager
    def between_prompts() -> Iterator[None]:
        if not pauses:
            raise routes.BusyError("a prompt is running")
        pauses.pop()
        yield

    freed = routes.free([model.streamed], routes.PINNED, between_prompts)
    assert 0 < freed["freed_pinned"] < before
    with pytest.raises(routes.BusyError):
        routes.free([model.streamed], routes.PINNED, between_prompts)
    assert torch.equal(sample(model), expected)


def test_all_parts_of_a_split_model_are_unloaded(loaded: StreamedModelPatcher) -> None:
    ours = split_over(loaded, [torch.device("cpu", 0), torch.device("cpu", 1)], "equal", None, None).patcher
    expected = sample(ours)
    models = [model for model in streamed_models() if model.number == ours.streamed.number]
    routes.take_off(models)
    assert [memory.allocated for memory in devices.virtual_devices()] == [0, 0]
    assert torch.equal(sample(ours), expected)


def test_a_virtual_device_that_is_full_is_all_used(virtual_device: Callable[[int], VirtualMemory]) -> None:
    virtual_device(24 * MB).take(24 * MB)
    (device,) = full_status()["devices"]
    assert (device["free"], device["torch"]) == (0, 24 * MB)
