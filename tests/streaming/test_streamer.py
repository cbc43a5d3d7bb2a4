from __future__ import annotations

import pytest
import torch
from models import X, budgets, hand_plan, make_streamer, make_transformer
from torch import nn
from weightstream.streaming import (
    BudgetError,
)


@pytest.mark.slow
@pytest.mark.parametrize("learned", [False, True], ids=["blocks", "parts"])
@pytest.mark.parametrize("copy_streams", [0, 1, 2, 3])
@pytest.mark.parametrize("slots", [0, 1, 2, 5])
def test_output_is_the_same_at_every_budget(copy_streams: int, slots: int, learned: bool) -> None:
    model = make_transformer()
    expected = model(X)
    streamer = make_streamer(model, copy_streams=copy_streams, slots=slots, learned=learned)
    for budget in budgets(streamer):
        streamer.load(streamer.plan_for(budget))
        for _ in range(3):
            assert torch.equal(model(X), expected)
        assert streamer.backend.allocated == streamer.device_bytes <= budget
    streamer.unload()
    assert streamer.backend.allocated == 0
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("learned", [False, True], ids=["blocks", "parts"])
def test_steady_steps_never_miss_and_copy_each_segment_once(learned: bool) -> None:
    model = make_transformer(depth=8)
    streamer = make_streamer(model, learned=learned)
    streamer.load(streamer.plan_for(streamer.minimum_bytes + 3 * streamer.outline.block_bytes(0)))
    plan = streamer.plan
    assert plan is not None
    assert plan.segments
    assert plan.resident
    for _ in range(5):
        model(X)
    counters = streamer.counters
    assert counters.steps == 5
    assert counters.misses == 0
    assert counters.hits == 5 * len(plan.segments)
    # The copies ahead of the sixth step are under way: those of the first lap.
    ahead = plan.offsets.index(0, 1)
    assert counters.copies == 5 * len(plan.segments) + ahead
    assert counters.streamed_bytes == 5 * plan.streamed_bytes + sum(one.nbytes for one in plan.segments[:ahead])


@pytest.mark.parametrize("learned", [False, True], ids=["blocks", "parts"])
def test_a_changed_order_costs_copies_and_no_correctness(learned: bool) -> None:
    model = make_transformer(depth=6)
    orders = [None, [5, 4, 3, 2, 1, 0], [0, 0, 3, 3], [2], None, [1, 3, 5]]
    expected = [model(X, order) for order in orders]
    streamer = make_streamer(model, learned=learned)
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    for _ in range(3):
        for order, result in zip(orders, expected, strict=True):
            assert torch.equal(model(X, order), result)
    assert streamer.counters.misses > 0


def test_a_budget_below_one_block_names_the_minimum() -> None:
    streamer = make_streamer(make_transformer())
    with pytest.raises(BudgetError) as caught:
        streamer.plan_for(streamer.minimum_bytes - 1)
    assert caught.value.minimum == streamer.minimum_bytes


def test_the_configured_limit_holds() -> None:
    model = make_transformer()
    streamer = make_streamer(model, vram_limit=120_000)
    streamer.load(streamer.plan_for(10**9))
    assert 0 < streamer.backend.peak <= 120_000


def test_loading_twice_does_nothing() -> None:
    model = make_transformer()
    streamer = make_streamer(model)
    plan = streamer.plan_for(streamer.minimum_bytes)
    streamer.load(plan)
    copies, slots = streamer.counters.copies, streamer.backend.allocated
    streamer.load(plan)
    assert (streamer.counters.copies, streamer.backend.allocated) == (copies, slots)


def test_blocks_inside_blocks_run_whatever_room_there_is() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            handle = self.blocks[0].register_forward_pre_hook(lambda module, args: (self.blocks[1](args[0]),))
            try:
                return self.blocks[2](self.blocks[0](x))
            finally:
                handle.remove()

    model = Nested().requires_grad_(False)
    x = torch.rand(2, 8)
    expected = model(x)
    streamer = make_streamer(model, slots=2)
    for slots in (2, 1):
        streamer.load(hand_plan(streamer, (0, 1, 2), slots))
        taken = streamer.device_bytes
        assert torch.equal(model(x), expected)
        assert streamer.device_bytes == taken
    assert streamer.backend.peak > taken, "the inner block has no memory of its own"


def test_the_snapshot_is_plain_values() -> None:
    model = make_transformer()
    streamer = make_streamer(model)
    assert streamer.snapshot().mode == "off"
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    model(X)
    snapshot = streamer.snapshot().as_dict()
    assert snapshot["mode"] == "streamed"
    assert snapshot["streamed_blocks"] == 6
    assert snapshot["counters"]["steps"] == 1
    streamer.load(streamer.plan_for(10**9))
    assert streamer.snapshot().mode == "resident"
