from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
from outlines import FULL, MB, flux, flux_profile, linear, make_outline, make_profile
from weightstream.streaming import (
    BudgetError,
    Outline,
    Plan,
    Profile,
    StreamingConfig,
    assumed_profile,
    make_plan,
    minimum_bytes,
)
from weightstream.streaming.planning.plan import FORECAST_TOLERANCE, forecast_seconds
from weightstream.streaming.planning.search import SLOT_TOLERANCE
from weightstream.streaming.planning.segments import cut
from weightstream.streaming.planning.spread import order_of_residency

# Plans whose forecasts differ by less count as equal.
ABOUT = (1 + SLOT_TOLERANCE) * (1 + FORECAST_TOLERANCE)

SHAPES = [
    [[10]] * 4,
    [[10], [30], [20]],
    [[5, 3], [5, 3], [5, 3]],
    [[40, 7]] * 2 + [[15]] * 3,
    [[7], [1], [9], [3], [3], [8], [2]],
    [[4, 4, 4], [6]],
]


def profiles(outline: Outline) -> Iterator[Profile]:
    """Bus-bound, balanced and compute-bound steps, known in parts and as whole blocks; and nothing known."""
    total = sum(outline.unit_bytes)
    for bandwidth, learned in itertools.product((total / 4, total, total * 4), (True, False)):
        yield make_profile(outline, [1 / outline.blocks] * outline.blocks, bandwidth, learned=learned)
    yield assumed_profile(outline)


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_plan_fits_its_budget_whatever_that_is(shape: list[list[int]], slots: int) -> None:
    outline = make_outline(shape, rest=4)
    config = StreamingConfig(slots=slots, segment_bytes=12)
    for profile in profiles(outline):
        least = minimum_bytes(outline, profile)
        with pytest.raises(BudgetError) as caught:
            make_plan(outline, profile, least - 1, config)
        assert caught.value.minimum == least
        for budget in range(least, outline.model_bytes + 3):
            plan = make_plan(outline, profile, budget, config)
            assert plan.device_bytes <= budget
            largest = max((segment.nbytes for segment in plan.segments), default=0)
            assert largest <= plan.staging_bytes <= slots * max(largest, config.segment_bytes)
            streamed = [unit for segment in plan.segments for unit in segment.units]
            assert sorted([*streamed, *plan.resident]) == list(range(len(outline.unit_bytes)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_more_memory_never_streams_more(shape: list[list[int]]) -> None:
    outline = make_outline(shape, rest=4)
    for profile, slots in itertools.product(profiles(outline), (1, 2)):
        config = StreamingConfig(slots=slots, segment_bytes=0)
        seconds = [
            forecast_seconds(make_plan(outline, profile, budget, config), profile)
            for budget in range(minimum_bytes(outline, profile), outline.model_bytes + 1)
        ]
        # What does not fit in order is filled up with later units; that may change by one unit.
        one = max(outline.unit_bytes) / profile.bandwidth if len(set(outline.unit_bytes)) > 1 else 0
        assert all(after <= before * ABOUT + one for before, after in itertools.pairwise(seconds))


def test_flux_gets_faster_with_every_half_gigabyte() -> None:
    outline, profile = flux(), flux_profile()
    plans = [make_plan(outline, profile, 600 * MB + step * 500 * MB, FULL) for step in range(48)]
    for before, after in itertools.pairwise(plans):
        assert after.streamed_bytes <= before.streamed_bytes
        assert after.forecast.seconds <= before.forecast.seconds * 1.001
        assert set(before.resident) <= set(after.resident), "a little more memory must not move what is there"


def best_choice(outline: Outline, profile: Profile, budget: int, config: StreamingConfig) -> float:
    """The shortest step of all sets of residents that fit, by trying every one."""
    found = []
    for kept in itertools.product((False, True), repeat=len(outline.unit_bytes)):
        streamed = frozenset(unit for unit, keep in enumerate(kept) if not keep)
        if not streamed:
            continue
        segments = cut(outline, streamed, profile, 0)
        largest = max(segment.nbytes for segment in segments)
        for slots in range(1, config.slots + 1):
            plan = Plan.streaming(outline, segments, slots * largest)
            if plan.device_bytes <= budget:
                found.append(forecast_seconds(plan, profile))
    return min(found)


@pytest.mark.parametrize("balance", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("blocks", [3, 5, 8])
def test_like_blocks_are_placed_as_well_as_possible(blocks: int, balance: float) -> None:
    """Against all choices of residents, for a bus that is too slow, just right and fast."""
    outline = make_outline([[10]] * blocks)
    profile = make_profile(outline, [1.0] * blocks, 10 * balance)
    config = StreamingConfig(slots=2, segment_bytes=0)
    for budget in range(20, 10 * blocks):
        chosen = make_plan(outline, profile, budget, config).forecast.seconds
        assert chosen <= best_choice(outline, profile, budget, config) * ABOUT


@pytest.mark.parametrize("balance", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    "shape", [[[10, 4], [10, 4], [10, 4]], [[12], [12], [5], [5], [5], [5]], [[6, 3, 3], [6, 3, 3]]], ids=str
)
def test_unlike_units_cost_at_most_the_transfer_of_one(shape: list[list[int]], balance: float) -> None:
    """What fits best is a knapsack; the one order that serves every budget may miss it by a unit."""
    outline = make_outline(shape)
    seconds = [1.0] * outline.blocks
    bandwidth = sum(outline.unit_bytes) / outline.blocks * balance
    profile = make_profile(outline, seconds, bandwidth)
    config = StreamingConfig(slots=2, segment_bytes=0)
    one = max(outline.unit_bytes) / bandwidth
    for budget in range(minimum_bytes(outline, profile), outline.model_bytes):
        chosen = make_plan(outline, profile, budget, config).forecast.seconds
        assert chosen <= best_choice(outline, profile, budget, config) * ABOUT + one


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_fits_is_not_streamed(shape: list[list[int]]) -> None:
    outline = make_outline(shape, rest=4)
    plan = make_plan(outline, assumed_profile(outline), outline.model_bytes, FULL)
    assert plan.segments == ()
    assert plan.staging_bytes == 0
    assert plan.device_bytes == outline.model_bytes


@pytest.mark.parametrize("residents", range(1, 55))
def test_like_blocks_are_spread_evenly(residents: int) -> None:
    """No part of a step has much more to stream than another."""
    blocks = 57
    outline = make_outline([[10]] * blocks)
    profile = make_profile(outline, [1.0] * blocks, 10)
    plan = make_plan(outline, profile, 10 * (residents + 2), StreamingConfig(slots=2, segment_bytes=0))
    assert len(plan.resident) == residents
    # A step follows the one before it, so the blocks lie in a circle.
    fair = len(plan.segments) / blocks
    for first, length in itertools.product(range(blocks), (10, 20, 30)):
        found = sum((first + step) % blocks in plan.streamed for step in range(length))
        assert abs(found - fair * length) <= 2


@pytest.mark.parametrize("gigabytes", [2, 5, 8, 11, 14, 17, 20])
def test_flux_is_spread_over_the_time_of_its_blocks_not_over_their_bytes(gigabytes: int) -> None:
    outline, profile = flux(), flux_profile()
    plan = make_plan(outline, profile, gigabytes * 1000 * MB, FULL)
    assert plan.forecast.seconds <= max(plan.forecast.bus_seconds, plan.forecast.compute_seconds) * 1.02


def test_flux_stages_at_most_400_mb() -> None:
    for gigabytes in (1, 6, 12, 18):
        plan = make_plan(flux(), flux_profile(), gigabytes * 1000 * MB, FULL)
        assert 0 < plan.staging_bytes <= 400 * MB
        assert min(segment.nbytes for segment in plan.segments) >= 4 * MB


@pytest.mark.parametrize("slower", [1, 10])
def test_what_has_room_stays_although_streaming_it_would_be_free(slower: int) -> None:
    """It would take page-locked RAM, of which there is less, and kernels run slower beside copies."""
    outline = flux()
    seconds = [each * slower for each in flux_profile().block_seconds]
    plan = make_plan(outline, make_profile(outline, seconds, 55.4e9), 23_000 * MB, FULL)
    assert plan.forecast.limited_by == "compute"
    assert plan.forecast.more_bytes == 0
    assert plan.device_bytes > 22_000 * MB


def test_a_ring_of_two_whole_blocks_is_no_slower_than_two_slots() -> None:
    """Blocks of which each keeps other parts resident, so what streams of them is of several sizes."""
    outline = make_outline([[linear(2048, 2048)] * 20] * 100, rest=100 * MB)
    profile = make_profile(outline, [0.006] * 100, 25e9, other=0.003, learned=False)
    plan = make_plan(outline, profile, 600 * MB, FULL)
    largest = max(segment.nbytes for segment in plan.segments)
    in_slots = replace(plan, offsets=tuple(largest * (number % 2) for number in range(len(plan.segments))))
    assert in_slots.device_bytes <= 600 * MB
    assert forecast_seconds(plan, profile) <= forecast_seconds(in_slots, profile) * ABOUT


def test_a_plan_has_a_forecast_where_units_turn_out_to_run_in_another_order() -> None:
    outline = make_outline([[10, 10, 10]] * 2)
    known = replace(make_profile(outline, [1, 1], 10), unit_runs=(((0, 1), (2, 1), (1, 1)), ((3, 1), (5, 1), (4, 1))))
    plan = Plan.streaming(outline, cut(outline, range(6), known, 20), 40)
    assert forecast_seconds(plan, known) > 0
    for other in (make_profile(outline, [1, 1], 10), make_profile(outline, [1, 1], 10, learned=False)):
        assert forecast_seconds(plan, other) >= plan.streamed_bytes / other.bandwidth


def test_more_slots_than_fit_are_not_used() -> None:
    outline = make_outline([[10]] * 4)
    plan = make_plan(outline, assumed_profile(outline), 19, StreamingConfig(slots=5, segment_bytes=0))
    assert plan.staging_bytes == 10


def test_the_order_of_residency_is_the_same_for_every_budget() -> None:
    order = order_of_residency(flux(), flux_profile())
    assert sorted(order) == list(range(len(flux().unit_bytes)))


def test_the_plan_explains_itself() -> None:
    outline = make_outline([[10 * MB]] * 5, rest=MB)
    config = StreamingConfig(slots=2, segment_bytes=0)
    profile = make_profile(outline, [0.006] * 5, 1e9)
    assert make_plan(outline, profile, 31 * MB, config).explain() == (
        "38.1 MiB a step streamed in 4 segments, from 4 of 5 blocks; 29.6 MiB on the device: 9.5 MiB of blocks "
        "stay, 977 KiB outside of blocks, 19.1 MiB staging; a step in 0.04 s, limited by the bus (0.03 s of "
        "compute); 19.1 MiB more VRAM would make it 0.03 s"
    )
    fast = make_profile(outline, [1.0] * 5, 1e9)
    text = make_plan(outline, fast, 31 * MB, config).explain()
    assert text.endswith("a step in 5 s, hardly any of it waiting for the bus")
    assert make_plan(outline, profile, 51 * MB, config).explain() == (
        "all 5 blocks stay (48.6 MiB on the device), nothing streamed; a step in 0.03 s"
    )
    assert "a step" not in make_plan(outline, assumed_profile(outline), 51 * MB, config).explain()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_everything_streams_where_that_is_asked_for(shape: list[list[int]]) -> None:
    """Whatever there is room for; and no more slots than make a step faster."""
    outline = make_outline(shape, rest=4)
    for profile in profiles(outline):
        least = minimum_bytes(outline, profile)
        for budget in (least, outline.model_bytes, 100 * outline.model_bytes):
            plan = make_plan(outline, profile, budget, StreamingConfig(segment_bytes=12, stream_all=True))
            assert plan.resident == ()
            assert plan.device_bytes <= budget
