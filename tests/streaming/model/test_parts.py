"""A model of which each device streams a part: streamers whose runs are in one another, around one forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from models import SETTINGS, X, make_transformer
from torch import nn
from weightstream.streaming import CpuBackend, Streamer, StreamingConfig, VirtualMemory, cut_model
from weightstream.streaming.handoff.boundary import Boundary
from weightstream.streaming.split.assignment import DeviceRoom, assign
from weightstream.streaming.split.links import Links

DEPTH = 9


class Parts:
    def __init__(self, model: nn.Module, devices: tuple[int, ...], **settings: object) -> None:
        self.model = model
        blocks = cut_model(model, lambda module, name, tensor: tensor.dtype)
        places = [torch.device("cpu", device) for device in devices]
        self.boundary = Boundary(places[0], Links())
        self.streamers = []
        for number in sorted(set(devices)):
            mine = [block for block, device in enumerate(devices) if device == number]
            backend = CpuBackend(VirtualMemory(10**9, f"gpu:{number}"), torch.device("cpu", number))
            config = StreamingConfig(**{**SETTINGS, "adaptive": False, **settings})
            self.streamers.append(Streamer(model, blocks.part(mine, number == devices[0]), backend, config))
        self.boundary.attach(model, [(block.module, place) for block, place in zip(blocks.blocks, places, strict=True)])

    def run(self) -> torch.Tensor:
        forward: Callable[[], torch.Tensor] = lambda: self.model(X)  # noqa: E731
        for streamer in self.streamers:
            forward = lambda streamer=streamer, inner=forward: streamer.run(inner)  # noqa: E731
        return forward()


@pytest.fixture(autouse=True)
def inference_mode() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.mark.slow
@pytest.mark.parametrize("copy_streams", [0, 2])
@pytest.mark.parametrize("room", [0, 1])
@pytest.mark.parametrize("devices", [2, 3])
def test_output_is_the_same_at_every_budget(devices: int, room: int, copy_streams: int) -> None:
    model = make_transformer(depth=DEPTH)
    expected = model(X)
    sizes = [1] * DEPTH
    found = assign(sizes, [DeviceRoom(DEPTH * room)] * devices)
    parts = Parts(model, found.devices, copy_streams=copy_streams)
    assert torch.equal(model(X), expected)
    for extra in (0, 1, 100):
        for streamer in parts.streamers:
            budget = streamer.minimum_bytes + extra * streamer.outline.block_bytes(0)
            streamer.load(streamer.plan_for(budget))
        for _ in range(4):
            assert torch.equal(parts.run(), expected)
        assert [bool(streamer.plan.segments) for streamer in parts.streamers] == [extra < 100] * devices
    assert (sum(streamer.counters.misses for streamer in parts.streamers) == 0) is (copy_streams > 0)
    for streamer in parts.streamers:
        streamer.close()
        assert streamer.backend.allocated == 0
    assert torch.equal(model(X), expected)


def test_a_part_knows_its_blocks_only() -> None:
    model = make_transformer(depth=4)
    whole = cut_model(model, lambda module, name, tensor: tensor.dtype)
    first, second = whole.part([2, 0], True), whole.part([1, 3], False)
    assert [block.name for block in first.blocks] == [whole.blocks[0].name, whole.blocks[2].name]
    for part in (first, second):
        assert [block.index for block in part.blocks] == [0, 1]
        assert [unit.index for unit in part.units] == list(range(len(part.units)))
        assert {unit.block for unit in part.units} == {0, 1}
    assert second.outside == ()
    small = {item.names[0] for block in second.blocks for item in block.small}
    assert {spec.name for value in second.rest.layout.values for spec in value.specs} == small
    assert small < {spec.name for value in whole.rest.layout.values for spec in value.specs}
    names = [spec.name for part in (first, second) for spec in part.specs]
    assert sorted(names) == sorted(spec.name for spec in whole.specs)
    assert first.outline.model_bytes + second.outline.model_bytes == whole.outline.model_bytes


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_in_a_step_the_next_one_is_right(error: type[BaseException]) -> None:
    model = make_transformer(depth=6)
    expected = model(X)
    parts = Parts(model, (0, 1, 0, 1, 0, 1))
    for streamer in parts.streamers:
        streamer.load(streamer.plan_for(streamer.minimum_bytes))
    parts.run()

    def fail(*_: object) -> None:
        raise error

    handle = model.blocks[3].register_forward_pre_hook(fail)
    with pytest.raises(error):
        parts.run()
    handle.remove()
    for _ in range(2):
        assert torch.equal(parts.run(), expected)
    for streamer in parts.streamers:
        streamer.close()


TEXT = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU {} has a total capacity of 139.81 GiB of which 1 MiB is"


@pytest.mark.parametrize("full", [0, 1])
def test_the_device_that_is_full_gives_way(full: int) -> None:
    model = make_transformer(depth=6)
    expected = model(X)
    parts = Parts(model, (0, 1, 0, 1, 0, 1))
    for streamer in parts.streamers:
        streamer.load(streamer.plan_for(10**9))
    parts.run()
    before = [streamer.device_bytes for streamer in parts.streamers]
    errors = [torch.OutOfMemoryError(TEXT.format(full)) for _ in range(2)]

    def fail(*_: object) -> None:
        if errors:
            raise errors.pop()

    model.blocks[3].register_forward_pre_hook(fail)
    assert torch.equal(parts.run(), expected)
    now = [streamer.device_bytes for streamer in parts.streamers]
    assert now[full] < before[full]
    assert now[1 - full] == before[1 - full]


def test_an_error_that_names_no_device_is_everybodys() -> None:
    backend = CpuBackend(VirtualMemory(10**6, "gpu:1"), torch.device("cpu", 1))
    assert backend.is_full(torch.OutOfMemoryError("no memory"))
    assert backend.is_full(torch.OutOfMemoryError(TEXT.format(1)))
    assert not backend.is_full(torch.OutOfMemoryError(TEXT.format(0)))
    assert not backend.is_full(RuntimeError("GPU 1 has a total capacity"))
