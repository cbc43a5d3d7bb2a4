"""The order of residency, and what is left to stream: the same plans, found without the square of a model's parts."""

from __future__ import annotations

import random
import sys
from typing import Any

import pytest
from outlines import FULL, flux, flux_profile, make_outline, make_profile
from weightstream.streaming import Outline, Profile, assumed_profile, make_plan
from weightstream.streaming.planning import search, spread
from weightstream.streaming.planning.search import _ladder, _largest_piece
from weightstream.streaming.planning.spread import best_order

CHANCE = random.Random(7)
SHAPES = [
    [[CHANCE.randint(1, 30) for _ in range(CHANCE.randint(0, 5))] for _ in range(CHANCE.randint(1, 12))]
    for _ in range(60)
]


def all_profiles(outline: Outline) -> list[Profile]:
    seconds = [1 / outline.blocks] * outline.blocks
    measured = [make_profile(outline, seconds, 50.0, learned=learned) for learned in (True, False)]
    return [*measured, assumed_profile(outline)]


def rungs_one_by_one(outline: Outline, profile: Profile) -> list[tuple[int, int]]:
    """The largest piece as it is copied and as it is unpacked, for each number of kept units: looked for anew."""
    alone = {unit for runs in profile.unit_runs or () for unit, _ in runs}
    found = []
    order = best_order(outline, profile)
    for kept in range(len(order)):
        left = [[unit for unit in units if unit not in order[:kept]] for units in outline.block_units]
        pieces = [_largest_piece(outline, units, alone) for units in left]
        found.append((max(one for one, _ in pieces), max(unpacked for _, unpacked in pieces)))
    return found


def packed(outline: Outline) -> Outline:
    slots = tuple(nbytes - nbytes // 3 * (unit % 2) for unit, nbytes in enumerate(outline.unit_bytes))
    return Outline(outline.unit_bytes, outline.unit_block, outline.block_kind, outline.rest_bytes, slots)


@pytest.mark.parametrize("change", [lambda outline: outline, packed])
def test_what_is_left_is_what_a_search_through_all_blocks_finds(change: Any) -> None:
    for shape in (shape for shape in SHAPES if any(shape)):
        outline = change(make_outline(shape))
        for profile in all_profiles(outline):
            rungs = [(rung.piece_bytes, rung.unpacked_bytes) for rung in _ladder(outline, profile)]
            assert rungs == rungs_one_by_one(outline, profile)


def test_the_order_of_a_large_model_is_chosen_unit_by_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "_by_halves", None)
    outline = make_outline([[5, 4, 3, 2, 1] * 4] * 100)
    assert sorted(best_order(outline, assumed_profile(outline))) == list(range(2000))
    assert spread.MOST_CHOSEN >= 10_000


@pytest.mark.parametrize("count", [*range(1, 40), 100, 257])
def test_by_halves_every_begin_of_the_order_lies_evenly(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "MOST_CHOSEN", 0)
    outline = make_outline([[1]] * count)
    order = best_order.__wrapped__(outline, assumed_profile(outline))
    assert sorted(order) == list(range(count))
    for kept in range(1, count + 1):
        places = sorted(order[:kept])
        gaps = [after - before for before, after in zip(places, [*places[1:], places[0] + count], strict=True)]
        assert max(gaps) <= 4 * count / kept, "no stretch without residents is much longer than the others"


def test_plans_by_halves_are_nearly_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    outline, profile = flux(), flux_profile()
    for budget in (6e9, 12e9, 18e9):
        chosen = make_plan(outline, profile, budget, FULL)
        with monkeypatch.context() as patched:
            patched.setattr(search, "order_of_residency", lambda outline, profile: halves(outline, profile))
            _ladder.cache_clear()
            other = make_plan(outline, profile, budget, FULL)
        _ladder.cache_clear()
        assert chosen.forecast is not None
        assert other.forecast is not None
        assert other.forecast.seconds <= 1.1 * chosen.forecast.seconds


def halves(outline: Outline, profile: Profile) -> tuple[int, ...]:
    return spread._by_halves([moment.unit for moment in spread.timeline(outline, profile)])


def calls(blocks: int) -> int:
    """How many functions are called to find what is left to stream of so many blocks."""
    outline = make_outline([[1]] * blocks)
    profile = assumed_profile(outline)
    best_order(outline, profile)
    count = 0

    def note(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        _ladder(outline, profile)
    finally:
        sys.setprofile(before)
    return count


def test_four_times_the_blocks_are_about_four_times_the_work() -> None:
    assert calls(400) < 6 * calls(100)
