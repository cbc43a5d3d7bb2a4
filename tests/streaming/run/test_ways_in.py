"""Models that enter their blocks in another way than by calling them: by methods, or not at all."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch._dynamo
from models import Transformer, X, make_streamer
from race import NumberedBlock, NumberedModel, RaceBackend
from torch import nn
from ways_in import KINDS, ByMethods, LayerByLayer, Stop, make, run
from weightstream.streaming import Streamer, StreamingConfig, cut_model
from weightstream.streaming.run.by_units import ByUnits


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks_resident", [0, 2])
def test_it_streams_in_parts_and_ahead_from_the_third_step_on(kind: str, blocks_resident: int) -> None:
    model = make(KINDS[kind])
    expected = model(X)
    streamer = make_streamer(model)
    budget = streamer.minimum_bytes + blocks_resident * streamer.outline.block_bytes(0)
    streamer.backend.store.budget = budget
    streamer.load(streamer.plan_for(budget))
    misses = []
    for _ in range(6):
        assert torch.equal(run(streamer, model), expected)
        misses.append(streamer.counters.misses)
    assert streamer.counters.hits > 0
    assert misses[2:] == [misses[2]] * 4, "copies come late"
    assert streamer.profile.learned
    assert streamer.profile.measured
    assert min(streamer.profile.block_seconds) > 0
    assert all(segment.runs > 0 for segment in streamer.plan.segments)
    assert streamer.measuring.recorder is None, "it is measured for ever"
    assert len(streamer.never_entered) == {"methods": 0, "layers": 6, "layers of some": 4}[kind]
    streamer.unload()
    assert torch.equal(model(X), expected)


class Twice(ByMethods):
    """All layers of a block run twice in a row."""

    def forward(self, x: torch.Tensor, order: list[int] | None = None) -> torch.Tensor:
        x = self.input(x)
        for index in range(len(self.blocks)) if order is None else order:
            block = self.blocks[index]
            x = block.generate(block.generate(x, block.keys(x)), block.keys(x))
        return self.output(x)


def test_a_block_that_runs_twice_in_a_row_is_copied_once() -> None:
    model = make(Twice)
    expected = model(X)
    streamer = make_streamer(model, budget=3 * 35_840)
    streamer.load(streamer.plan_for(3 * 35_840))
    copied = []
    for _ in range(6):
        before = streamer.counters.streamed_bytes
        assert torch.equal(run(streamer, model), expected)
        copied.append(streamer.counters.streamed_bytes - before)
    plan = streamer.plan
    assert plan.learned
    assert plan.segments
    assert copied[4:] == [plan.streamed_bytes] * 2, "parts are copied twice in a step"


class ReadsTables(Transformer):
    """Takes a table out of each block before any of them runs. Blocks read their layers' weights themselves."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.inner, self.outer, self.table = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 64)

        def give(self) -> torch.Tensor:
            return self.table.weight.mT

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.tanh(x @ self.inner.weight) @ self.outer.weight

    def __init__(self, depth: int = 6, width: int = 32) -> None:
        super().__init__(depth, width)
        self.blocks = nn.ModuleList(self.Block(width) for _ in range(depth))

    def forward(self, x: torch.Tensor, order: list[int] | None = None) -> torch.Tensor:
        x = self.input(x)
        tables = [block.give() for block in self.blocks]
        for block, table in zip(self.blocks, tables, strict=True):
            x = block(x + torch.tanh(x @ table @ table.mT))
        return self.output(x)


def test_weights_that_a_method_gives_are_right_when_its_slot_is_anothers() -> None:
    model = make(ReadsTables)
    expected = model(X)
    streamer = make_streamer(model)
    streamer.backend.store.budget = streamer.minimum_bytes
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    assert all(torch.equal(run(streamer, model), expected) for _ in range(6))
    assert streamer.counters.streamed_bytes > 0


def test_blocks_that_nobody_enters_are_told_of_and_others_are_not() -> None:
    model = make(KINDS["layers of some"])
    streamer = make_streamer(model)
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    run(streamer, model, [0, 1, 3])
    assert "nobody calls" not in streamer.explain()
    for _ in range(3):
        run(streamer, model, [0, 1, 3])
    assert streamer.never_entered == ["blocks.0", "blocks.3"]
    assert "nobody calls 2 of its blocks (blocks.0)" in streamer.explain()
    assert "nobody calls 2 of its blocks (blocks.0)" in streamer.snapshot().note
    model.whole = tuple(range(6))
    for order in (None, [5, 0, 3], None):
        run(streamer, model, order)
    assert streamer.never_entered == ["blocks.0", "blocks.3"]


@pytest.mark.parametrize("kind", [Transformer, ByMethods])
def test_a_block_that_is_left_out_is_not_called_never_entered(kind: type[Transformer]) -> None:
    model = make(kind)
    orders = [[0, 1, 2, 3], [0, 1], [], None, [5], [0, 2, 4], None, None]
    expected = [model(X, order) for order in orders]
    streamer = make_streamer(model)
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    for order, output in zip(orders, expected, strict=True):
        assert torch.equal(run(streamer, model, order), output)
    assert streamer.never_entered == []
    assert streamer.profile.learned


def test_a_block_that_begins_to_be_called_streams_as_others() -> None:
    model = make(LayerByLayer)
    expected = model(X)
    streamer = make_streamer(model)
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    for whole in ((), (), (), (), (0, 1, 2), (5,), tuple(range(6))):
        model.whole = whole
        assert torch.equal(run(streamer, model), expected)
    misses = streamer.counters.misses
    for _ in range(3):
        assert torch.equal(run(streamer, model), expected)
    assert streamer.counters.misses == misses


@pytest.mark.slow
@pytest.mark.parametrize("learned", [False, True], ids=["first step", "later"])
@pytest.mark.parametrize("fails_in", [0, 3, 5])
def test_an_interrupt_between_layers_is_settled(fails_in: int, learned: bool) -> None:
    model = make(LayerByLayer)
    expected = model(X)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    streamer = make_streamer(model)
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    for _ in range(4 if learned else 0):
        run(streamer, model)
    model.fails_in = fails_in
    with pytest.raises(Stop):
        run(streamer, model)
    model.fails_in = -1
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    for _ in range(5):
        assert torch.equal(run(streamer, model), expected)


@pytest.mark.slow
@pytest.mark.parametrize("error", [Stop, ValueError])
def test_an_error_in_a_method_is_settled(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(ByMethods)
    expected = model(X)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    streamer = make_streamer(model)
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    for step in range(6):

        def fail(x: torch.Tensor) -> torch.Tensor:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(model.blocks[step].mlp[1], "forward", fail)
            with pytest.raises(error):
                run(streamer, model)
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name])
        assert torch.equal(run(streamer, model), expected)


def test_a_method_outside_of_a_step_computes_with_its_weights_and_teaches_nothing() -> None:
    model = make(ByMethods)
    expected, keys = model(X), model.blocks[3].keys(X)
    streamer = make_streamer(model)
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    for _ in range(5):
        assert all(map(torch.equal, model.blocks[3].keys(X), keys))
        assert torch.equal(run(streamer, model), expected)
    assert set(streamer.profile.block_order) == set(range(6))
    assert streamer.profile.block_order[0] == 0
    streamer.unload()
    assert all(map(torch.equal, model.blocks[3].keys(X), keys))


def test_weights_that_are_read_without_entering_anything_are_told_of(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU torch refuses them; the log says what it may be."""
    model = make(LayerByLayer)
    streamer = make_streamer(model)
    streamer.load(streamer.plan_for(streamer.minimum_bytes))

    def fail(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("Expected all tensors to be on the same device, but found at least two")

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(RuntimeError, match="same device"):
        streamer.run(lambda: model(X))
    assert "6 of 6 blocks had not been entered (blocks.0)" in caplog.text


@pytest.fixture
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("told", [False, True], ids=["nobody said so", "expected"])
def test_compiled_models_enter_blocks_by_methods_too(told: bool) -> None:
    model = make(ByMethods)
    expected = model(X)
    streamer = make_streamer(model, adaptive=False)
    streamer.expect_compiled(told)
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    compiled = torch.compile(model, backend="eager")
    misses = []
    for _ in range(5):
        output = streamer.run(lambda: compiled(X), shape=tuple(X.shape), reload=streamer.load)
        assert torch.equal(output, expected)
        misses.append(streamer.counters.misses)
    assert streamer.counters.hits > 0
    assert misses[2:] == [misses[2]] * 3
    assert streamer.never_entered == []


# -- what is in which slot ------------------------------------------------------------------------------------------


class RacingBlock(NumberedBlock):
    def some(self, parts: str) -> None:
        for part in parts:
            getattr(self, f"part{part}")()

    def most(self, seen: list[int], parts: str) -> list[int]:
        return NumberedBlock.forward(self, seen, parts)


class RacingModel(NumberedModel):
    """Blocks by number: each is called, entered by methods, or its parts are run alone."""

    def __init__(self, count: int, backend: RaceBackend, ways: str) -> None:
        super().__init__(count, backend)
        self.blocks = nn.ModuleList(RacingBlock(number, backend, False) for number in range(count))
        self.ways = ways

    def forward(self, order: list[int], parts: str = "012") -> list[int]:
        seen: list[int] = []
        for index in order:
            block, way = self.blocks[index], self.ways[index % len(self.ways)]
            if way == "methods":
                block.some(parts[:1])
                seen = block.most(seen, parts)
            elif way == "parts":
                for part in parts:
                    getattr(block, f"part{part}")()
                seen = [*seen, index]
            else:
                seen = block(seen, parts)
        return seen


@pytest.mark.slow
@pytest.mark.parametrize("learned", [False, True], ids=["blocks", "parts"])
@pytest.mark.parametrize("ways", [("methods",), ("parts",), ("methods", "parts", "call")], ids="-".join)
def test_every_access_to_a_slot_is_ordered(ways: tuple[str, ...], learned: bool) -> None:
    checked = 0
    everything = list(range(4))
    for slots, copy_streams in itertools.product((1, 2, 3), (0, 2)):
        backend = RaceBackend()
        model = RacingModel(4, backend, ways)
        config = StreamingConfig(copy_streams, slots, segment_bytes=0, adaptive=False)
        streamer = Streamer(model, cut_model(model), backend, config)
        streamer.load(streamer.plan_for(streamer.minimum_bytes))
        for _ in range(4 if learned else 0):
            streamer.run(lambda model=model: model(everything))
        assert streamer.profile.learned == learned
        for order in (everything, everything[::-1], [0, 0, 3], [2], [], everything):
            for parts in ("012", "210", "1", "0011"):
                assert streamer.run(lambda model=model, order=order, parts=parts: model(order, parts)) == order
        checked += backend.accesses
        streamer.unload()
    assert checked > 1000


# -- several devices -------------------------------------------------------------------------------------------------


def test_a_block_begins_with_its_first_unit_and_ends_with_anothers() -> None:
    blocks = ByUnits({1, 2})
    assert not blocks.begin_unit(0)
    assert blocks.ended_by(1) == []
    assert blocks.begin_unit(1)
    blocks.end_unit(1)
    assert blocks.ended_by(1) == []
    assert not blocks.begin_unit(1)
    assert blocks.ended_by(2) == [], "a unit of the first is running"
    assert blocks.begin_unit(2)
    blocks.end_unit(2)
    blocks.end_unit(1)
    assert blocks.ended_by(0) == [1, 2]
    blocks.begin_block(1)
    assert not blocks.begin_unit(1), "somebody has entered it"
    blocks.end_block(1)
    assert blocks.begin_unit(1)
    assert blocks.ended_by(None) == [1]
    assert blocks.ended_by(None) == []
