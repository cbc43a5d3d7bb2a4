"""Which units are packed, and what plans and forecasts make of that."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from outlines import FULL, MB, flux, flux_profile, make_outline, make_profile
from weightstream.streaming import BudgetError, Outline, PackingMode, Profile, make_plan, minimum_bytes
from weightstream.streaming.planning.packing import Packing, Refusals, packed_outline, units_to_pack
from weightstream.streaming.planning.plan import forecast_seconds
from weightstream.streaming.planning.planner import WORTHWHILE, Planner
from weightstream.streaming.planning.spread import best_order

GB = 1_000_000_000
REASONS = ("too_large", "without_room", "written", "left")


def packing_of(outline: Outline, share: float = 0.7, speed: float = 1000e9) -> Packing:
    return Packing(tuple(int(share * nbytes) for nbytes in outline.unit_bytes), speed)


def flux_with_order() -> tuple[Outline, Profile]:
    outline, profile = flux(), flux_profile(55e9)
    return outline, replace(profile, order=best_order(outline, profile))


@pytest.mark.parametrize(
    ("budget", "raw", "packed"), [(1.3, 0.418, 0.295), (4.4, 0.360, 0.254), (6.4, 0.324, 0.229), (10.4, 0.252, 0.187)]
)
def test_flux_is_faster_by_what_is_saved_where_the_bus_is_the_limit(budget: float, raw: float, packed: float) -> None:
    outline, profile = flux_with_order()
    packing = packing_of(outline)
    plan = make_plan(outline, profile, budget * GB, FULL)
    assert forecast_seconds(plan, profile) == pytest.approx(raw, rel=0.01)
    units = units_to_pack(plan, profile, packing)
    plan = make_plan(packed_outline(outline, packing, units), profile, budget * GB, FULL)
    assert forecast_seconds(plan, profile) == pytest.approx(packed, rel=0.02)
    assert plan.device_bytes <= budget * GB
    assert plan.streamed_bytes < 0.75 * plan.streamed_weight_bytes


def test_no_more_is_packed_than_makes_the_bus_as_fast_as_compute() -> None:
    """Unpacking takes time of the device."""
    outline, profile = flux_with_order()
    packing = packing_of(outline)
    seconds = []
    for budget in (13.4, 14.4, 15.4, 18.4):
        plan = make_plan(outline, profile, budget * GB, FULL)
        units = units_to_pack(plan, profile, packing)
        assert len(units) < len(plan.streamed) / 2
        packed = make_plan(packed_outline(outline, packing, units), profile, budget * GB, FULL) if units else plan
        assert forecast_seconds(packed, profile) <= forecast_seconds(plan, profile)
        seconds.append(forecast_seconds(packed, profile))
    assert seconds == sorted(seconds, reverse=True)
    assert not units


@pytest.mark.parametrize(("budget", "gain", "packs"), [(14.1, 0.03, True), (14.4, 0.017, False)])
def test_weights_are_packed_where_that_gains_enough(budget: float, gain: float, packs: bool) -> None:
    """Compute is nearly the limit: packing a few units would make a step hardly shorter. Who asks for it gets it."""
    outline, profile = flux_with_order()
    packing = packing_of(outline)
    plans = {}
    for mode in PackingMode:
        planner = Planner(outline, replace(FULL, packing=mode))
        planner.profile, planner.packing = profile, None if mode is PackingMode.OFF else packing
        plans[mode] = planner.plan_for(budget * GB)
    raw = plans[PackingMode.OFF]
    units = units_to_pack(raw, profile, packing)
    packed = make_plan(packed_outline(outline, packing, units), profile, budget * GB, FULL)
    found = 1 - forecast_seconds(packed, profile) / forecast_seconds(raw, profile)
    assert found == pytest.approx(gain, rel=0.1)
    assert packs is (found >= WORTHWHILE)
    assert plans[PackingMode.AUTO].packed == (units if packs else frozenset())
    assert plans[PackingMode.ON].packed


def test_what_is_packed_is_spread_over_the_step() -> None:
    outline = make_outline([[10 * MB]] * 40)
    profile = make_profile(outline, [1e-3] * 40, 8.5e9)
    plan = make_plan(outline, profile, 40 * MB, FULL)
    units = sorted(units_to_pack(plan, profile, packing_of(outline, 0.5, 1e15)))
    assert 10 < len(units) < 20
    assert max(after - before for before, after in itertools.pairwise(units)) <= 4


def test_units_that_may_not_be_packed_are_not() -> None:
    outline = make_outline([[10 * MB, 3 * MB]] * 8)
    profile = make_profile(outline, [1e-6] * 8, 1e9)
    plan = make_plan(outline, profile, 40 * MB, FULL)
    packing = packing_of(outline)
    sizes = list(packing.slot_bytes)
    sizes[4] = outline.unit_bytes[4]
    packing = packing._replace(slot_bytes=tuple(sizes))
    able = plan.streamed - {2, 4}
    assert units_to_pack(plan, profile, packing, without={2}) == able
    assert units_to_pack(plan, profile, packing, without={2}, everything=True) == able
    assert units_to_pack(plan, profile, packing, without=range(16)) == frozenset()


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("shape", [[[40, 7]] * 2 + [[15]] * 3, [[10]] * 4, [[4, 4, 4], [6]], [[100, 20, 20, 20]] * 3])
def test_a_packed_plan_fits_its_budget_whatever_that_is(shape: list[list[int]], learned: bool) -> None:
    """With some units packed, of which packing saves more or less."""
    outline = make_outline(shape, rest=4)
    slots = tuple(max(1, int(nbytes * (0.5, 0.75, 1.0)[unit % 3])) for unit, nbytes in enumerate(outline.unit_bytes))
    outline = packed_outline(outline, Packing(slots, 100.0), range(len(slots)))
    profile = make_profile(outline, [1.0] * outline.blocks, 50.0, learned=learned)
    config = replace(FULL, segment_bytes=12, staging_bytes=60)
    least = minimum_bytes(outline, profile)
    with pytest.raises(BudgetError):
        make_plan(outline, profile, least - 1, config)
    for budget in range(least, outline.model_bytes + 3):
        plan = make_plan(outline, profile, budget, config)
        assert plan.device_bytes <= budget
        assert plan.packed == {unit for unit in plan.streamed if slots[unit] < outline.unit_bytes[unit]}
        unpacked = [
            sum(outline.unit_bytes[unit] for unit in segment.units if unit in plan.packed) for segment in plan.segments
        ]
        assert [segment.unpacked_bytes for segment in plan.segments] == unpacked
        assert plan.resident_bytes == sum(outline.unit_bytes[unit] for unit in plan.resident)


def test_unpacking_counts_as_compute() -> None:
    outline = make_outline([[10 * MB]] * 4)
    profile = make_profile(outline, [1e-3] * 4, 1e15)
    packed = packed_outline(outline, packing_of(outline, speed=20e9), range(4))
    plans = [make_plan(one, profile, 30 * MB, replace(FULL, stream_all=True)) for one in (outline, packed)]
    seconds = [forecast_seconds(plan, profile) for plan in plans]
    assert seconds == pytest.approx([4e-3, 6e-3])


@pytest.mark.parametrize("budget", [1.0, 4.4, 6.2, 10.4])
def test_more_memory_is_told_to_help_as_far_as_it_does(budget: float) -> None:
    """With the memory that the plan asks for a step takes as long as told, and hardly more than compute."""
    outline, profile = flux(), flux_profile()
    packing = packing_of(outline)
    plan = make_plan(outline, profile, budget * GB, FULL)
    units = units_to_pack(plan, profile, packing)
    forecast = make_plan(packed_outline(outline, packing, units), profile, budget * GB, FULL).forecast
    assert forecast.limited_by == "bus"
    if not forecast.more_bytes:
        assert forecast.seconds <= 1.05 * profile.compute_seconds
        return
    more = make_plan(outline, profile, budget * GB + forecast.more_bytes, FULL)
    units = units_to_pack(more, profile, packing)
    packed = make_plan(packed_outline(outline, packing, units), profile, budget * GB + forecast.more_bytes, FULL)
    seconds = min(forecast_seconds(plan, profile) for plan in (more, packed))
    assert seconds <= forecast.more_seconds <= 1.05 * profile.compute_seconds


def test_what_is_in_the_way_adds_up_by_reason() -> None:
    none, large, room, written, left = Refusals(), *(Refusals(**{name: frozenset([1])}) for name in REASONS)
    assert not none
    assert all((large, room, written, left))
    found = none | large | room | left | Refusals(written=frozenset([2])) | Refusals(too_large=frozenset([3]))
    assert found == Refusals(frozenset([1, 3]), frozenset([1]), frozenset([2]), frozenset([1]))
    assert found.units == {1, 2, 3}
