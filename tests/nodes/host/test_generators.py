"""The generators that a process has for everybody: our nodes leave them as the host's own nodes alone would."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.ldm.flux.model
import numpy as np
import pytest
import torch
from placing import Machine
from sampling import MB, MODEL, sample
from weightstream.nodes import loader
from weightstream.nodes.gpu_placement import GpuPlacement
from weightstream.nodes.host.generators import generators_kept
from weightstream.nodes.model.offload import OffloadSettings
from weightstream.nodes.settings import with_settings
from weightstream.nodes.twins.components import CPU, model_on
from weightstream.nodes.twins.takeover import give_back
from weightstream.streaming import UnsupportedModelError
from weightstream.streaming.split.links import Links

import nodes as host_nodes


def numbers() -> tuple[float, ...]:
    """The next numbers of all generators, which are left as they are."""
    with generators_kept():
        return random.random(), float(np.random.rand()), float(torch.rand(()))


def start() -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)


@pytest.fixture(autouse=True)
def drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that draws while it is built, as some do that the host knows."""
    build = comfy.ldm.flux.model.Flux.__init__

    def draw(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        random.random(), np.random.rand(), torch.rand(())

    monkeypatch.setattr(comfy.ldm.flux.model.Flux, "__init__", draw)
    start()


def load_native() -> Any:
    with torch.inference_mode():
        return host_nodes.UNETLoader().load_unet(MODEL, "default")[0]


@pytest.fixture
def by_host(models: Path) -> tuple[float, ...]:
    """What is drawn next when the host alone has loaded the model."""
    before = numbers()
    load_native()
    found = numbers()
    assert all(one != other for one, other in zip(before, found, strict=True))
    start()
    return found


def test_loading_draws_as_the_hosts_loader_does(streamed: Callable[..., Any], by_host: tuple[float, ...]) -> None:
    streamed()
    assert numbers() == by_host


def test_a_model_that_cannot_stream_is_built_twice_and_drawn_for_once(
    streamed: Callable[..., Any], by_host: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise UnsupportedModelError("for this test")

    monkeypatch.setattr(loader, "make_streamed", refuse)
    streamed()
    assert numbers() == by_host


def test_behind_the_hosts_loader_nothing_more_is_drawn(
    models: Path, machine: Machine, by_host: tuple[float, ...]
) -> None:
    machine(2, 24 * MB)
    model = load_native()
    with torch.inference_mode():
        behind = with_settings(model, OffloadSettings())
        assert numbers() == by_host
        split = GpuPlacement.execute(model, None, None, split="equal").result[0]
        assert split.parts
        assert numbers() == by_host
        give_back(behind)
        model_on(behind, CPU)
        assert numbers() == by_host
    ours = loader.load_streamed(str(models / MODEL), {})
    before = numbers()
    give_back(ours)
    assert numbers() == before


def test_a_step_on_two_devices_draws_as_the_host_does(models: Path, machine: Machine) -> None:
    model = load_native()
    start()
    sample(model)
    expected = numbers()
    machine(2, 24 * MB)
    with torch.inference_mode():
        split = GpuPlacement.execute(model, None, None, split="equal").result[0]
    start()
    sample(split)
    assert numbers() == expected


def test_devices_are_tried_without_a_draw() -> None:
    before = numbers()
    cpu = torch.device("cpu")
    assert Links().is_sound(cpu, cpu)
    assert numbers() == before
