"""When each unit is needed in a step in which everything is resident. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from .profile import Outline, Profile, UnitTime


class Moment(NamedTuple):
    """A unit's place in a step, in seconds of compute from its begin.

    Attributes:
        begin, end: of the unit's run, which needs its weights.
        block_begin: of its block.
    """

    unit: int
    begin: float
    end: float
    block_begin: float


@lru_cache(maxsize=16)
def timeline(outline: Outline, profile: Profile) -> tuple[Moment, ...]:
    """All units in the order of need: blocks that ran in their order, then the others.

    What is computed outside of blocks comes before the block that follows it, and the rest of it first.
    """
    found: list[Moment] = []
    gaps = profile.gap_seconds or (0.0,) * outline.blocks
    now = max(0.0, profile.other_seconds - sum(gaps))
    for block in blocks_in_order(outline, profile):
        now += gaps[block]
        moments, now = block_moments(outline, profile, block, now)
        found += moments
    return tuple(found)


def block_moments(outline: Outline, profile: Profile, block: int, begin: float) -> tuple[list[Moment], float]:
    """The units of a block that begins then, in the order of their need, and when it ends."""
    head, times = _unit_times(outline, profile, block)
    found, now = [], begin + head
    for unit in units_in_order(outline, profile, block):
        found.append(Moment(unit, now, now + times[unit].hold, begin))
        now += times[unit].work
    return found, now


def blocks_in_order(outline: Outline, profile: Profile) -> Iterable[int]:
    """Every block once: those that ran, in their order, and then the others."""
    return dict.fromkeys((*profile.block_order, *range(outline.blocks)))


def units_in_order(outline: Outline, profile: Profile, block: int) -> tuple[int, ...]:
    """A block's units in the order of their need: those that it needs from its begin come first."""
    runs = [unit for unit, _ in profile.unit_runs[block]] if profile.unit_runs is not None else []
    return (*(unit for unit in outline.block_units[block] if unit not in runs), *runs)


def _unit_times(outline: Outline, profile: Profile, block: int) -> tuple[float, dict[int, UnitTime]]:
    """Compute of a block before its first unit begins, and of its units."""
    seconds, units = profile.block_seconds[block], outline.block_units[block]
    if profile.unit_times is None:
        size = max(1, outline.block_bytes(block))
        shares = {unit: seconds * outline.unit_bytes[unit] / size for unit in units}
        return 0.0, {unit: UnitTime(share, share) for unit, share in shares.items()}
    times = {unit: profile.unit_times[unit] for unit in units}
    return max(0.0, seconds - sum(time.work for time in times.values())), times
