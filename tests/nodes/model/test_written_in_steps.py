"""What blocks write to buffers and weights of their own while they run lasts as with the host, or the prompt says why.

It lasts from step to step and is there once when a step runs again, on one device and on two.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from failing import failing
from placing import Machine, place
from sampling import MB, sample
from weightstream.nodes.model.patcher import StreamedModelPatcher
from weightstream.streaming import DeviceMemoryError, StepNotRepeatedError, StreamingError

pytestmark = pytest.mark.usefixtures("one_thread")

Write = Callable[[Any, torch.Tensor], Any]
Load = Callable[..., StreamedModelPatcher]


def registered(block: Any, name: str, values: torch.Tensor) -> None:
    if name not in block._buffers:
        with torch.inference_mode(False):
            block.register_buffer(name, values, persistent=False)


def in_place(block: Any, x: torch.Tensor) -> Any:
    return block.state.add_(x.float().mean() + 1)


def exchanged(block: Any, x: torch.Tensor) -> Any:
    block.state = block.state * 0.9 + x.float().mean()
    return block.state


def by_data(block: Any, x: torch.Tensor) -> Any:
    block.state.data.add_(1)
    return block.state


def on_a_layer(block: Any, x: torch.Tensor) -> Any:
    """Of a layer whose weights stream."""
    return block.linear1.state.add_(1)


def statistics(block: Any, x: torch.Tensor) -> Any:
    block.statistics(x[0, :, :4].float())
    return block.statistics.running_mean.sum()


def weight(block: Any, x: torch.Tensor) -> Any:
    return block.linear1.weight.add_(0.001).sum()


def exchanged_weight(block: Any, x: torch.Tensor) -> Any:
    block.linear1.weight = torch.nn.Parameter(block.linear1.weight * 1.01, requires_grad=False)
    return block.linear1.weight.sum()


def large_buffer(block: Any, x: torch.Tensor) -> Any:
    return block.large.add_(1)[0]


BUFFERS: list[Write] = [in_place, exchanged, by_data, on_a_layer, statistics]
WEIGHTS: list[Write] = [weight, exchanged_weight, large_buffer]


def writing(model: Any, write: Write) -> Any:
    """Each single block writes, and computes with what it has written."""
    for block in model.model.diffusion_model.single_blocks:
        registered(block, "state", torch.zeros(1))
        registered(block.linear1, "state", torch.zeros(1))
        if write is large_buffer:
            registered(block, "large", torch.zeros(1 << 19))
        if write is statistics and not hasattr(block, "statistics"):
            with torch.inference_mode(False):
                block.statistics = torch.nn.BatchNorm1d(4, affine=False).train()

        def forward(self: Any, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
            x = type(self).forward(self, x, *args, **options)
            return x * (1 + 0.001 * write(self, x).to(x))

        block.forward = MethodType(forward, block)
    return model


@pytest.fixture
def expected(foreign: ModelPatcher) -> Callable[[Write], torch.Tensor]:
    """What the host gives in its first prompt with such blocks."""
    sample(foreign)
    return lambda write: sample(writing(foreign, write), steps=4)


@pytest.mark.parametrize("write", BUFFERS)
@pytest.mark.parametrize("calls", [(), (1,), (1, 4)])
def test_buffers(streamed: Load, expected: Any, write: Write, calls: tuple[int, ...]) -> None:
    model = writing(streamed(64 * MB, vram_limit=33 * MB), write)
    with failing(model.model.diffusion_model.single_blocks[2], *calls) as failed:
        assert torch.equal(sample(model, steps=4), expected(write))
    assert tuple(failed) == calls
    assert model.streamer.counters.streamed_bytes > 0


@pytest.mark.parametrize("write", BUFFERS)
def test_buffers_on_two_devices(streamed: Load, machine: Machine, expected: Any, write: Write) -> None:
    model = streamed(64 * MB)
    machine(2, 16 * MB)
    model = writing(place(model, split="equal")[0], write)
    with failing(model.model.diffusion_model.single_blocks[2], 1) as failed:
        assert torch.equal(sample(model, steps=4), expected(write))
    assert failed
    assert len(model.streamers) == 2


@pytest.mark.parametrize("write", [in_place, exchanged])
def test_buffers_of_a_model_that_is_unloaded_in_a_step(
    streamed: Load, expected: Any, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = writing(streamed(64 * MB, vram_limit=33 * MB), write)
    block = model.model.diffusion_model.single_blocks[2]
    left = [2]

    def unload(*_: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            model.detach(unpatch_all=False)

    handle = block.register_forward_pre_hook(unload)
    found = sample(model, steps=4)
    handle.remove()
    assert left[0] < 0
    assert torch.equal(found, expected(write))


@pytest.mark.parametrize("write", WEIGHTS)
def test_weights_that_stay_on_the_device(streamed: Load, expected: Any, write: Write) -> None:
    model = writing(streamed(64 * MB), write)
    assert torch.equal(sample(model, steps=4), expected(write))
    assert model.streamer.counters.streamed_bytes == 0


@pytest.mark.parametrize("write", WEIGHTS)
def test_a_step_that_has_written_to_weights_is_not_run_again(streamed: Load, expected: Any, write: Write) -> None:
    model = writing(streamed(64 * MB), write)
    with (
        failing(model.model.diffusion_model.single_blocks[2], 1),
        pytest.raises(StepNotRepeatedError, match=r"tiny-flux.*single_blocks\.\d\..* was written to"),
    ):
        sample(model, steps=4)


@pytest.mark.parametrize("write", WEIGHTS)
def test_weights_that_stream_say_that_it_would_be_lost(streamed: Load, plain: torch.Tensor, write: Write) -> None:
    model = writing(streamed(64 * MB, vram_limit=33 * MB), write)
    with pytest.raises(StreamingError, match=r"single_blocks\.\d.* were written to, or others put in their place"):
        sample(model, steps=4)
    for block in model.model.diffusion_model.single_blocks:
        del block.forward
    if write is large_buffer:
        assert torch.equal(sample(model), plain), "nothing of it is left"


def test_weights_that_were_written_to_do_not_make_room_silently(streamed: Load) -> None:
    """There is less memory from the second step on."""
    model = writing(streamed(64 * MB), weight)
    with (
        failing(model.model.diffusion_model.single_blocks[0], 1, 2),
        pytest.raises(StreamingError, match=r"single_blocks\.\d\.linear1\.weight.* was written to"),
    ):
        sample(model, steps=4)
    with pytest.raises(StreamingError, match=r"would be lost now that it must make room"):
        model.streamer.load(model.streamer.plan_for(model.streamer.minimum_bytes))


@pytest.mark.parametrize("write", [in_place, exchanged])
def test_buffers_go_with_blocks_that_change_devices(
    streamed: Load, machine: Machine, expected: Any, write: Write
) -> None:
    """The second device is full from the second step on."""
    model = streamed(64 * MB)
    machine(2, 40 * MB)
    model = writing(place(model, split="equal")[0], write)
    block = model.model.diffusion_model.single_blocks[2]
    runs = [0]

    def fail(*_: Any) -> None:
        runs.append(0)
        if len(runs) > 3 and any(model.streamed.shares.assignment.devices):
            raise DeviceMemoryError("gpu:1 has 0 B of 40 MB free, 1 B were asked for")

    handle = block.register_forward_pre_hook(fail)
    found = sample(model, steps=4)
    handle.remove()
    assert not any(model.streamed.shares.assignment.devices)
    assert torch.equal(found, expected(write))
