"""When each unit is needed in a step in which everything is resident. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from .profile import Outline, Profile, UnitTime


class Moment(NamedTuple):
    """When a step needs a unit, in seconds of compute from the step's begin.

    Attributes:
        begin, end: of the unit's run, in which its weights are needed.
        block_begin: begin of its block.
    """

    unit: int
    begin: float
    end: float
    block_begin: float


@lru_cache(maxsize=16)
def timeline(outline: Outline, profile: Profile) -> tuple[Moment, ...]:
    """Return the moments of all units in the order of need: blocks that ran in their order, then the others.

    Compute outside of blocks is placed before the block that follows it; what belongs before no block comes first.
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
    """Return the moments of a block's units, in the order of need, and the block's end, if it starts at ``begin``."""
    head, times = _unit_times(outline, profile, block)
    found, now = [], begin + head
    for unit in units_in_order(outline, profile, block):
        found.append(Moment(unit, now, now + times[unit].hold, begin))
        now += times[unit].work
    return found, now


def blocks_in_order(outline: Outline, profile: Profile) -> Iterable[int]:
    """Return every block once: those that ran, in their order, and then the others."""
    return dict.fromkeys((*profile.block_order, *range(outline.blocks)))


def units_in_order(outline: Outline, profile: Profile, block: int) -> tuple[int, ...]:
    """Return a block's units in the order of need: those that it needs from its begin come first."""
    runs = [unit for unit, _ in profile.unit_runs[block]] if profile.unit_runs is not None else []
    return (*(unit for unit in outline.block_units[block] if unit not in runs), *runs)


def _unit_times(outline: Outline, profile: Profile, block: int) -> tuple[float, dict[int, UnitTime]]:
    """Return the compute of a block before its first unit begins, in seconds, and that of each unit."""
    seconds, units = profile.block_seconds[block], outline.block_units[block]
    if profile.unit_times is None:
        size = max(1, outline.block_bytes(block))
        shares = {unit: seconds * outline.unit_bytes[unit] / size for unit in units}
        return 0.0, {unit: UnitTime(share, share) for unit, share in shares.items()}
    times = {unit: profile.unit_times[unit] for unit in units}
    return max(0.0, seconds - sum(time.work for time in times.values())), times
