"""Steps that are not like others: answered by a cache, or compiled."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._dynamo
from models import Transformer, X, make_streamer, make_transformer
from weightstream.streaming import Streamer

BLOCK = 35_840


def step(streamer: Streamer, model: Transformer) -> torch.Tensor:
    return streamer.run(lambda: model(X), shape=tuple(X.shape), reload=streamer.load)


@pytest.fixture
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_step_in_which_no_block_runs_teaches_nothing() -> None:
    """A cache answers in place of the blocks, in the first step, in the one that is measured, and later."""
    model = make_transformer()
    expected = model(X)
    streamer = make_streamer(model, adaptive=False)
    streamer.load(streamer.plan_for(streamer.minimum_bytes + BLOCK))
    for skipped in (True, False, True, True, False, False, True, False):
        order = [] if skipped else None
        output = streamer.run(lambda order=order: model(X, order), shape=tuple(X.shape), reload=streamer.load)
        assert skipped or torch.equal(output, expected)
    assert streamer.plan is not None
    assert all(segment.runs > 0 for segment in streamer.plan.segments)
    assert min(streamer.profile.block_seconds) > 0
    assert streamer.counters.misses == 0


@pytest.mark.usefixtures("compiler")
def test_a_compiled_model_streams_whole_blocks_and_no_hook_is_in_them() -> None:
    model = make_transformer()
    expected = model(X)
    streamer = make_streamer(model, adaptive=False)
    streamer.expect_compiled(True)
    streamer.load(streamer.plan_for(streamer.minimum_bytes + BLOCK))
    compiled = torch.compile(model, backend="eager")
    for _ in range(4):
        output = streamer.run(lambda: compiled(X), shape=tuple(X.shape), reload=streamer.load)
        assert torch.equal(output, expected)
        assert not any(module._forward_pre_hooks for block in model.blocks for module in block.children())
    assert streamer.plan is not None
    assert all(segment.runs == 0 for segment in streamer.plan.segments)
    assert streamer.counters.streamed_bytes > 0
    streamer.expect_compiled(False)
    for _ in range(4):
        assert torch.equal(step(streamer, model), expected)
    assert all(segment.runs > 0 for segment in streamer.plan.segments)


@pytest.mark.usefixtures("compiler")
def test_hooks_on_every_layer_are_hidden_from_the_compiler() -> None:
    """Nobody told the streamer; the images are right all the same."""
    model = make_transformer()
    expected = model(X)
    streamer = make_streamer(model, adaptive=False)
    streamer.load(streamer.plan_for(streamer.minimum_bytes + BLOCK))
    compiled = torch.compile(model, backend="eager")
    for _ in range(4):
        output = streamer.run(lambda: compiled(X), shape=tuple(X.shape), reload=streamer.load)
        assert torch.equal(output, expected)
    assert streamer.counters.misses == 0
