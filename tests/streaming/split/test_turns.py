"""What is promised of a step on several devices, against the step that streamers make there in virtual time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from virtual_time import Clock, TimedBackend, TimedLayer, TimedModel
from weightstream.streaming import Group, Streamer, StreamingConfig, cut_model
from weightstream.streaming.split.assignment import HOP_SECONDS, DeviceRoom, assign
from weightstream.streaming.split.turns import Share, forecast_of_all

# A FLUX of a thousandth of its bytes, and links of a thousandth of their speed. Of a layer: bytes, seconds of the
# kernels that read it, and of all until the next begins (an H200 at 1024^2).
SCALE = 1000
MS = 1e-3
DOUBLE = [
    (113_000_000, 0.05 * MS, 0.05 * MS),
    (113_000_000, 0.05 * MS, 0.07 * MS),
    (57_000_000, 0.4 * MS, 0.42 * MS),
    (57_000_000, 0.05 * MS, 0.75 * MS),
    (19_000_000, 0.15 * MS, 0.17 * MS),
    (76_000_000, 0.5 * MS, 0.6 * MS),
    (76_000_000, 0.5 * MS, 0.55 * MS),
    (19_000_000, 0.03 * MS, 0.03 * MS),
    (76_000_000, 0.06 * MS, 0.07 * MS),
    (76_000_000, 0.06 * MS, 0.07 * MS),
]
SINGLE = [
    (57_000_000, 0.03 * MS, 0.03 * MS),
    (132_000_000, 1.1 * MS, 1.9 * MS),
    (94_000_000, 0.8 * MS, 0.85 * MS),
]
FLUX = [*[DOUBLE] * 19, *[SINGLE] * 38]
OUTSIDE = 2 * MS


class Devices:
    """FLUX on so many devices with so many bytes each, of the real model."""

    def __init__(self, devices: int, room: float, bandwidth: float) -> None:
        sizes = [sum(layer[0] for layer in block) for block in FLUX]
        seconds = sum(layer[2] for block in FLUX for layer in block)
        rooms = [DeviceRoom(room, bandwidth, seconds / sum(sizes)) for _ in range(devices)]
        self.clock = Clock()
        self.assignment = assign(sizes, rooms)
        small = [[(nbytes // SCALE, *times) for nbytes, *times in block] for block in FLUX]
        self.model = TimedModel(self.clock, small, self.assignment.devices, HOP_SECONDS, OUTSIDE)
        blocks = cut_model(self.model)
        config = StreamingConfig(
            staging_bytes=400_000_000 // SCALE,
            segment_bytes=32 * 1024**2 // SCALE,
            headroom_bytes=0,
            adaptive=False,
        )
        group = Group(self.assignment)
        self.streamers = []
        for device in range(devices):
            backend = TimedBackend(self.clock, device, bandwidth / SCALE)
            part = blocks.part(self.assignment.blocks_of(device), device == 0)
            self.streamers.append(Streamer(self.model, part, backend, config, group=group))
        self.budget = room / SCALE

    def step(self) -> float:
        """What a step takes."""
        begin = self.clock.now
        run: Callable[[], int] = self.model
        for streamer in reversed(self.streamers):
            run = lambda streamer=streamer, inner=run: streamer.run(inner)  # noqa: E731
        run()
        return self.clock.now - begin

    def settle(self) -> None:
        for streamer in self.streamers:
            streamer.load(streamer.plan_for(max(self.budget, streamer.minimum_bytes)))
        for _ in range(4):
            self.step()
        for streamer in self.streamers:
            streamer.load(streamer.next_plan(self.budget))

    @property
    def promised(self) -> float:
        return forecast_of_all([Share(one.plan, one.profile) for one in self.streamers], self.assignment)

    def close(self) -> None:
        for streamer in self.streamers:
            streamer.close()


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 3])
@pytest.mark.parametrize("late", [3, 6])
def test_times_that_are_too_long_are_measured_again(devices: int, late: int) -> None:
    """The host may be late in the step that is measured, and in the one after that."""
    placed = Devices(devices, 1e9, 54e9)
    layers = [layer for layer in placed.model.modules() if isinstance(layer, TimedLayer)]
    true_seconds = sum(layer.work for layer in layers) + OUTSIDE
    for streamer in placed.streamers:
        streamer.load(streamer.plan_for(max(placed.budget, streamer.minimum_bytes)))
    for number in range(12):
        factor = late if number in (1, 4) else 1 / late if number in (2, 5) else 1
        for layer in layers:
            layer.hold, layer.work = layer.hold * factor, layer.work * factor
        step = placed.step()
    for streamer in placed.streamers:
        assert true_seconds <= streamer.profile.compute_seconds <= true_seconds + 60 * HOP_SECONDS
        assert streamer.measuring.recorder is None
    assert placed.promised == pytest.approx(step, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "gigabytes", "bandwidth"),
    [
        (1, 0.85, 54e9),
        (1, 12, 54e9),
        (2, 0.85, 54e9),
        (2, 6, 54e9),
        (2, 11, 54e9),
        (2, 2, 25e9),
        (3, 0.85, 53e9),
        (4, 0.85, 41e9),
        (4, 2, 25e9),
        (8, 1.2, 25e9),
    ],
)
def test_a_step_takes_what_was_promised(devices: int, gigabytes: float, bandwidth: float) -> None:
    placed = Devices(devices, gigabytes * 1e9, bandwidth)
    placed.settle()
    steps = [placed.step() for _ in range(4)]
    assert sum(streamer.counters.misses for streamer in placed.streamers) == 0
    assert placed.promised == pytest.approx(steps[-1], rel=0.02)
    placed.close()
