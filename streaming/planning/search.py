"""Finds the plan for a budget: rings of several sizes are tried, each with as many units on the device as fit."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

from ..collector import uncollected
from ..config import StreamingConfig, format_bytes
from ..errors import BudgetError
from .plan import FORECAST_TOLERANCE, Forecast, Plan, SecondsOf, forecast_seconds
from .profile import Outline, Profile
from .segments import cut
from .spread import order_of_residency

# More memory is told to be of no use to a step of packed weights that takes no more longer than compute than this.
UNPACKING = 0.05
# Slots absorb delays that no forecast knows of, so a plan with fewer slots than usual must gain more than this.
SLOT_TOLERANCE = 0.02
# At most this many additional units are streamed so that the ring can be larger.
MOST_IN_EXCHANGE = 2
# Memory into which the next unit in order does not fit goes to later units if it is at least this part of the model.
WORTH_FILLING = 0.01


def minimum_bytes(outline: Outline, profile: Profile) -> int:
    """Return the least bytes of device memory for a plan: the rest, and one slot for what cannot be cut further."""
    rung = _ladder(outline, profile)[0]
    return outline.rest_bytes + rung.piece_bytes + rung.unpacked_bytes


@uncollected()
def make_plan(
    outline: Outline,
    profile: Profile,
    budget: float,
    config: StreamingConfig,
    seconds_of: SecondsOf | None = None,
) -> Plan:
    """Keep what ``budget`` allows and what saves time, and spread what is streamed evenly.

    Resident units are the first of one order (spread.py), as many as the budget allows, and later ones where they fill
    memory too small for the next. Of the possible numbers of slots, the one with the shortest step is taken.

    Args:
        budget: bytes for everything: rest, residents and staging.
        config: how many slots, and how large.
        seconds_of: forecasts a step in which other devices take part (turns.py); None is :func:`forecast_seconds`.

    Raises:
        BudgetError: the budget has no room for the rest and one slot.
    """
    if not outline.unit_bytes or (outline.model_bytes <= budget and not config.stream_all):
        best = Plan(outline, (), ())
    else:
        best = _fastest(_rings(outline, profile, config), budget, seconds_of)
    if best is None:
        least = minimum_bytes(outline, profile)
        raise BudgetError(
            f"{format_bytes(budget)} are too few: the largest part that is copied at once and what lies outside of "
            f"blocks need {format_bytes(least)}",
            least,
        )
    order = order_of_residency(outline, profile)
    best = replace(best, budget=budget, learned=profile.learned, order=order)
    return with_forecast(best, profile, config, seconds_of)


@uncollected()
def with_forecast(plan: Plan, profile: Profile, config: StreamingConfig, seconds_of: SecondsOf | None = None) -> Plan:
    """Return ``plan`` with the forecast that ``profile`` gives; unchanged before anything was measured."""
    if not profile.measured:
        return plan
    seconds = (seconds_of or forecast_seconds)(plan, profile)
    forecast = Forecast(seconds, profile.compute_seconds, plan.streamed_bytes / profile.bandwidth)
    if forecast.limited_by == "bus":
        enough = _least_within(plan.outline, profile, config, _short_enough(plan, profile))
        more = max(0, enough.device_bytes - plan.device_bytes)
        forecast = replace(forecast, more_bytes=more, more_seconds=forecast_seconds(enough, profile))
    return replace(plan, forecast=forecast)


def _short_enough(plan: Plan, profile: Profile) -> float:
    """Seconds of a step that more memory would hardly make shorter. (Without packing less memory would be needed.)"""
    return profile.compute_seconds * (1 + UNPACKING) if plan.packed else _resident_seconds(profile)


class _Rung(NamedTuple):
    """What is left to stream when a number of units, the first of the order of residency, is kept.

    Attributes:
        weight_bytes: bytes of the other units.
        streamed_bytes: those that are copied: fewer where units are packed.
        piece_bytes: the largest segment of theirs that cannot be cut further, as it is copied.
        unpacked_bytes: the most that such a segment takes when it is unpacked.
    """

    weight_bytes: int
    streamed_bytes: int
    piece_bytes: int
    unpacked_bytes: int


@lru_cache(maxsize=16)
def _ladder(outline: Outline, profile: Profile) -> tuple[_Rung, ...]:
    """For each number of kept units, none to all but one, what is left to stream."""
    alone = {unit for runs in profile.unit_runs or () for unit, _ in runs}
    if not outline.unit_bytes:
        return (_Rung(0, 0, 0, 0),)  # One of several devices may have no block.
    left = [set(units) for units in outline.block_units]
    pieces = [_largest_piece(outline, units, alone) for units in left]
    copied, unpacked = (_Largest(part) for part in zip(*pieces, strict=True))
    weights = sum(outline.unit_bytes)
    streamed = sum(map(outline.bytes_in_slot, range(len(outline.unit_bytes))))

    def rung() -> _Rung:
        return _Rung(weights, streamed, copied.value, unpacked.value)

    rungs = [rung()]
    for unit in order_of_residency(outline, profile)[:-1]:
        block = outline.unit_block[unit]
        left[block].discard(unit)
        copied[block], unpacked[block] = _largest_piece(outline, left[block], alone)
        weights -= outline.unit_bytes[unit]
        streamed -= outline.bytes_in_slot(unit)
        rungs.append(rung())
    return tuple(rungs)


class _Largest:
    """The largest of values of which each may become smaller, and none larger."""

    def __init__(self, values: Iterable[int]) -> None:
        self._values = list(values)
        self._heap = [(-value, place) for place, value in enumerate(self._values)]
        heapq.heapify(self._heap)

    def __setitem__(self, place: int, value: int) -> None:
        if value != self._values[place]:
            self._values[place] = value
            heapq.heappush(self._heap, (-value, place))

    @property
    def value(self) -> int:
        while -self._heap[0][0] != self._values[self._heap[0][1]]:
            heapq.heappop(self._heap)  # It was this value once.
        return -self._heap[0][0]


def _largest_piece(outline: Outline, units: Collection[int], alone: Collection[int]) -> tuple[int, int]:
    """The most bytes of these units that are copied at once, and the most that are unpacked at once."""
    sizes = [outline.bytes_in_slot(unit) for unit in units]
    unpacked = [outline.unit_bytes[unit] for unit in units if outline.is_packed(unit)]
    if all(unit in alone for unit in units):
        return max(sizes, default=0), max(unpacked, default=0)
    return sum(sizes), sum(unpacked)


@dataclass(frozen=True)
class _Ring:
    """A size of the staging memory and a way of using it; makes plans with such a ring.

    Attributes:
        slots: how many of the largest segments it holds.
        segment_bytes: parts of a block share a segment up to this size, or up to the largest part's if that is more.
        fine: parts share a segment up to ``segment_bytes`` in any case, so that segments differ in size.
        grows: it may be larger, by memory that no unit fits into, or by that of the last units that would stay.
        most_kept: the most units that may stay.
    """

    outline: Outline
    profile: Profile
    slots: int
    segment_bytes: int
    fine: bool
    grows: bool
    most_kept: int

    def plan(self, kept: int) -> Plan:
        """The plan that keeps the first ``kept`` units of the order."""
        return self._plan_streaming(self._order[kept:])

    def best(self, budget: float, below: float = math.inf) -> tuple[float, Plan] | None:
        """Return the seconds of a step and its plan, which keeps the most within ``budget`` or is a faster variant of
        that; None if no plan fits, or none can take less than ``below`` seconds."""
        fitting = (kept for kept in range(self.most_kept, -1, -1) if self._device_bytes(kept) <= budget)
        if (kept := next(fitting, None)) is None:
            return None
        room = budget - self._device_bytes(kept)
        if self._least_seconds(kept, room) >= below:
            return None
        plan = self.plan(kept)
        found = forecast_seconds(plan, self.profile), plan
        if self._least_seconds(kept) < found[0] * (1 - FORECAST_TOLERANCE):
            found = self._better_of(found, self._in_slots(plan))
        left = self._without_what_fits(self._order[kept:], room)
        if len(left) < len(plan.streamed) and (fuller := self._plan_streaming(left)).device_bytes <= budget:
            found = self._better_of(found, fuller)
        for fewer in range(kept, max(-1, kept - MOST_IN_EXCHANGE - 1), -1) if self.grows else ():
            if self._least_seconds(fewer) < found[0] * (1 - FORECAST_TOLERANCE):
                more = min(budget - self._device_bytes(fewer), self._slot_bytes(fewer))  # More is another ring.
                found = self._better_of(found, self._plan_streaming(self._order[fewer:], int(more)))
        return found

    def _in_slots(self, plan: Plan) -> Plan:
        """Return the same plan with slots as large as the largest segment, which segments use in turn.

        Where segments differ in size and only two or three lie in the ring at once, a segment in the place of two
        others would wait for both.
        """
        largest = max(segment.nbytes for segment in plan.segments)
        return replace(plan, offsets=tuple(largest * (number % self.slots) for number in range(len(plan.segments))))

    def _least_seconds(self, kept: int, room: float = 0.0) -> float:
        """A lower bound on the step of plans that keep ``kept`` units, and further units in ``room`` bytes."""
        streamed = max(0.0, self._rungs[kept].streamed_bytes - room)
        return max(self.profile.compute_seconds, streamed / self.profile.bandwidth)

    def _better_of(self, one: tuple[float, Plan], other: Plan) -> tuple[float, Plan]:
        """Return ``other`` if its step is shorter by more than the tolerance, else ``one``."""
        seconds = forecast_seconds(other, self.profile)
        return (seconds, other) if seconds < one[0] * (1 - FORECAST_TOLERANCE) else one

    def _without_what_fits(self, streamed: tuple[int, ...], room: float) -> list[int]:
        """Return what is still streamed when later units stay in ``room`` bytes, too few for the next one in order.

        This is done only for a part of the model that counts, because such units move again with the next budget.
        """
        left = list(streamed)
        if room < WORTH_FILLING * self.outline.model_bytes or self.most_kept == 0:
            return left
        for unit in streamed:
            if self.outline.unit_bytes[unit] <= room and len(left) > 1:
                left.remove(unit)
                room -= self.outline.unit_bytes[unit]
        return left

    def _plan_streaming(self, units: Collection[int], more: int = 0) -> Plan:
        """Return the plan that streams ``units`` through this ring, enlarged by ``more`` bytes."""
        streamed = frozenset(units)
        kept = len(self._order) - len(streamed)
        slot = self._slot_bytes(kept)
        target = self.segment_bytes if self.fine else slot
        segments = cut(self.outline, streamed, self.profile, target, self._unpacking_bytes(kept))
        return Plan.streaming(self.outline, segments, self.slots * slot + more)

    def fewest(self, seconds: float, below: float) -> Plan | None:
        """Return the plan with the fewest residents whose step takes at most ``seconds``; None if there is
        none, or if it needs ``below`` bytes of device memory or more.

        The search assumes that more residents make a step shorter, which is not always so. The plan that it finds is
        fast enough, but a smaller one may exist (FLUX: by up to 340 MB, in 22 of 144 cases).
        """
        smaller = [kept for kept in range(len(self._rungs)) if self._device_bytes(kept) < below]
        if not smaller or (found := self._within(seconds, smaller[-1])) is None:
            return None
        # Tried directly: more residents move segments to other places, and the step may take a little longer again.
        if (plan := self._within(seconds, smaller[0])) is not None:
            return plan
        low, high = 1, len(smaller) - 2
        while low <= high:
            middle = (low + high) // 2
            if (plan := self._within(seconds, smaller[middle])) is not None:
                found, high = plan, middle - 1
            else:
                low = middle + 1
        return found

    def _within(self, seconds: float, kept: int) -> Plan | None:
        """Return the plan that keeps ``kept`` units, if its step takes at most ``seconds``."""
        if self._rungs[kept].streamed_bytes / self.profile.bandwidth > seconds:
            return None
        plan = self.plan(kept)
        return plan if forecast_seconds(plan, self.profile) <= seconds else None

    def _device_bytes(self, kept: int) -> int:
        staying = self.outline.model_bytes - self._rungs[kept].weight_bytes
        return staying + self.slots * self._slot_bytes(kept) + self._unpacking_bytes(kept)

    def _unpacking_bytes(self, kept: int) -> int:
        """The most that a segment may take when it is unpacked: as much more than its largest part as a slot has."""
        rung = self._rungs[kept]
        return rung.unpacked_bytes * self._slot_bytes(kept) // max(1, rung.piece_bytes)

    def _slot_bytes(self, kept: int) -> int:
        return max(self.segment_bytes, self._rungs[kept].piece_bytes)

    # Cached here, because a look-up by outline and profile would hash both for each number of units that is tried.
    @cached_property
    def _order(self) -> tuple[int, ...]:
        return order_of_residency(self.outline, self.profile)

    @cached_property
    def _rungs(self) -> tuple[_Rung, ...]:
        return _ladder(self.outline, self.profile)


def _rings(outline: Outline, profile: Profile, config: StreamingConfig) -> Iterator[_Ring]:
    """Rings worth trying, the preferred one first; also with smaller segments where that makes a difference."""
    rungs = _ladder(outline, profile)
    largest, most = rungs[0].piece_bytes, 0 if config.stream_all else len(rungs) - 1
    for slots in config.slot_counts(largest):
        grows = not config.synchronous and slots != config.slots
        target = min(config.segment_bytes, config.staging_bytes // slots)
        yield _Ring(outline, profile, slots, target, False, grows, most)
        if target > largest:
            yield _Ring(outline, profile, slots, 0, False, grows, most)
        elif profile.learned:
            yield _Ring(outline, profile, slots, target, True, grows, most)


def _fastest(rings: Iterable[_Ring], budget: float, seconds_of: SecondsOf | None) -> Plan | None:
    """Return the plan with the shortest step, the first of those that are about equal."""
    usual = 0
    chosen, least = None, math.inf
    for ring in rings:
        usual = usual or ring.slots
        enough = SLOT_TOLERANCE if ring.slots < usual else FORECAST_TOLERANCE
        if (best := ring.best(budget, least * (1 - enough))) is None:
            continue
        seconds, plan = best
        if seconds_of is not None:
            seconds = seconds_of(plan, ring.profile)
        if seconds < least * (1 - enough):
            least, chosen = seconds, plan
    return chosen


@lru_cache(maxsize=16)
def _least_within(outline: Outline, profile: Profile, config: StreamingConfig, goal: float) -> Plan:
    """Return the plan of least memory whose step takes ``goal`` seconds at most."""
    least = Plan(outline, (), ())
    for ring in _rings(outline, profile, config):
        least = ring.fewest(goal, least.device_bytes) or least
    return least


def _resident_seconds(profile: Profile) -> float:
    return profile.compute_seconds * (1 + FORECAST_TOLERANCE)
