"""Weights that stream packed on several devices, or over the links of several: the bits are those of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from damage import CorruptingBackend, flip_a_bit
from models import SETTINGS, Doubled
from packed_models import BUDGET, PACKED_IN_BLOCK, X, learned, make, make_model, step
from weightstream.streaming import (
    CpuBackend,
    Group,
    Streamer,
    StreamingConfig,
    VirtualMemory,
    cut_model,
    packing_choice,
)
from weightstream.streaming.config import PackingMode
from weightstream.streaming.devices import backend as backends
from weightstream.streaming.devices.copies import Event, Pair, count_bytes
from weightstream.streaming.run.recorder import Recorder
from weightstream.streaming.split.assignment import Assignment
from weightstream.streaming.split.feeder import Feeder

# -- over several links ------------------------------------------------------------------------------------------------


class CountingBackend(CpuBackend):
    """Counts the bytes that it copies."""

    copied = 0

    def _copy_now(self, stream: object, pairs: list[Pair], waits: list[Event]) -> Event:
        self.copied += count_bytes(pairs)
        return super()._copy_now(stream, pairs, waits)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of this model are small, and are divided all the same."""
    monkeypatch.setattr(backends, "LEAST_FED_BYTES", 0)


def feed(home: CpuBackend, *helpers: CpuBackend) -> None:
    home.feeders += [Feeder(helper, chunk_bytes=8192, chunks=2) for helper in helpers]


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("helpers", [1, 2])
def test_each_link_brings_its_part_of_what_is_packed(helpers: int, verify: bool) -> None:
    model = make_model()
    expected = model(X)
    home = CpuBackend(VirtualMemory(10**9))
    others = [CountingBackend(VirtualMemory(10**6, f"gpu:{number}")) for number in range(1, helpers + 1)]
    feed(home, *others)
    streamer = make(model, home, verify=verify)
    plan = learned(streamer, model)
    assert len(plan.packed) == 4 * PACKED_IN_BLOCK
    assert home.links == 1 + helpers
    streamer.drain()
    before = [other.copied for other in others]
    for _ in range(4):
        assert torch.equal(step(streamer, model), expected)
    streamer.drain()
    for other, copied in zip(others, before, strict=True):
        assert other.copied - copied == pytest.approx(4 * plan.streamed_bytes / (1 + helpers), rel=0.1)
    assert streamer.counters.corrupted == 0
    streamer.close()
    assert all(memory.allocated == 0 for memory in (home.store, *(other.store for other in others)))


@pytest.mark.parametrize("copy", [1, 8])
def test_what_a_helper_damages_is_mended(copy: int) -> None:
    model = make_model()
    expected = model(X)
    home, helper = CpuBackend(VirtualMemory(10**9)), CorruptingBackend()
    feed(home, helper)
    streamer = make(model, home, verify=True)
    learned(streamer, model)
    streamer.drain()
    helper.damage, helper.countdown = flip_a_bit, copy
    for _ in range(3):
        assert torch.equal(step(streamer, model), expected)
    assert streamer.counters.corrupted == helper.damaged == 1
    assert len(streamer.plan.packed) == 4 * PACKED_IN_BLOCK
    assert home.links == 1, "copies are synchronous, and come over one link"
    streamer.close()


# -- blocks on several devices -----------------------------------------------------------------------------------------


class Devices:
    """The model on virtual devices, each with a streamer of its own.

    Args:
        devices: of each block.
    """

    def __init__(self, devices: tuple[int, ...], **settings: object) -> None:
        self.model = make_model()
        assignment = Assignment(devices, runs=True)
        group, blocks = Group(assignment), cut_model(self.model)
        packing = {"packing": PackingMode.ON, "stream_all": True, "adaptive": False, "segment_bytes": 200_000}
        config = StreamingConfig(**{**SETTINGS, **packing, **settings})
        self.streamers = [
            Streamer(
                self.model,
                blocks.part(assignment.blocks_of(device), device == 0),
                CpuBackend(VirtualMemory(10**9, f"gpu:{device}"), torch.device("cpu", device)),
                config,
                group=group,
            )
            for device in range(max(devices) + 1)
        ]
        self.patches = Doubled(set())

    def load(self) -> None:
        for streamer in self.streamers:
            streamer.begin_run()
            streamer.begin_prompt()
            streamer.load(streamer.plan_for(BUDGET), self.patches)

    def step(self) -> torch.Tensor:
        run: Callable[[], torch.Tensor] = lambda: self.model(X)  # noqa: E731
        for streamer in reversed(self.streamers):
            reload = lambda plan, streamer=streamer: streamer.load(plan, self.patches)  # noqa: E731
            run = lambda streamer=streamer, inner=run, reload=reload: streamer.run(inner, "x", reload)  # noqa: E731
        return run()

    def packed(self) -> list[int]:
        return [len(streamer.plan.packed) for streamer in self.streamers]


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("devices", [(0, 0, 1, 1), (0, 1, 0, 1)], ids=str)
def test_a_model_on_several_devices_packs_on_each(devices: tuple[int, ...], verify: bool) -> None:
    expected = make_model()(X)
    placed = Devices(devices, verify=verify)
    placed.load()
    for _ in range(5):
        assert torch.equal(placed.step(), expected)
    counts = [devices.count(device) * PACKED_IN_BLOCK for device in range(max(devices) + 1)]
    assert placed.packed() == counts
    assert all(streamer.snapshot().predicted_step_seconds > 0 for streamer in placed.streamers)
    name = "blocks.2.out.weight"
    reference = make_model()
    reference.get_parameter(name).mul_(2)
    placed.patches = Doubled({name})
    placed.load()
    for _ in range(2):
        assert torch.equal(placed.step(), reference(X))
    assert placed.packed() == counts
    assert placed.patches.computed == [name]
    assert [streamer.counters.corrupted for streamer in placed.streamers] == [0] * len(counts)
    for streamer in placed.streamers:
        streamer.close()
        assert streamer.backend.store.allocated == 0


@pytest.mark.parametrize("slow", [0, 1])
def test_a_device_packs_by_itself_where_that_makes_the_whole_step_faster(
    slow: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bus of one of two devices is what a step waits for."""
    monkeypatch.setattr(packing_choice, "unpacked_bytes_per_second", lambda *args: 1e15)
    monkeypatch.setattr(Recorder, "_bandwidth", lambda self: 1e6)  # So both find out what packing would bring.
    placed = Devices((0, 0, 1, 1), packing=PackingMode.AUTO)
    placed.load()
    for _ in range(3):
        placed.step()
    for device, streamer in enumerate(placed.streamers):
        planner = streamer.planner
        planner.profile = replace(planner.profile, bandwidth=1e6 if device == slow else 1e12)
    plans = [streamer.planner.plan_for(BUDGET) for streamer in placed.streamers]
    assert [bool(plan.packed) for plan in plans] == [device == slow for device in range(2)]
    for streamer, plan in zip(placed.streamers, plans, strict=True):
        streamer.load(plan)
    assert torch.equal(placed.model(X), make_model()(X))
