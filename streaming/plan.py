"""Who is resident, who is streamed, and what that costs. Pure: an outline, a profile and a budget in, a plan out."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

from .config import StreamingConfig, format_bytes
from .errors import BudgetError
from .pipeline import Stage, step_seconds
from .profile import Outline, Profile
from .segments import Segment, cut
from .spread import residency_order

# Streaming is free when the step would take no longer on a bus of this part of its bandwidth. The rest is for what the
# simulation does not see: the host's own copies, and kernels that take longer in one step than in another.
SPARE_BUS = 0.8
# Two forecasts that differ by less are the same.
FORECAST_TOLERANCE = 0.005
# Memory that the next unit in order does not fit into is used for later ones from this part of the model on.
WORTH_FILLING = 0.01


@dataclass(frozen=True)
class Forecast:
    """What a step will take.

    Attributes:
        seconds: the step.
        compute_seconds: the same step with everything resident.
        bus_seconds: the transfer of all that is streamed.
        more_bytes: device memory that would make it as fast as it can be; 0 when it is.
        more_seconds: the step with that.
    """

    seconds: float
    compute_seconds: float
    bus_seconds: float
    more_bytes: int = 0
    more_seconds: float = 0.0

    @property
    def limited_by(self) -> str:
        """``compute`` or ``bus``."""
        return "bus" if self.seconds > self.compute_seconds * (1 + FORECAST_TOLERANCE) else "compute"


@dataclass(frozen=True)
class Plan:
    """A placement of a model's units on one device.

    Attributes:
        outline: the model.
        segments: what is streamed, in the order of need. All other units are resident.
        slots, slot_bytes: staging memory; 0 when nothing is streamed.
        budget: bytes that it was made for.
        learned: whether it was known which units run by themselves.
        forecast: None before a step was measured.
    """

    outline: Outline = field(repr=False)
    segments: tuple[Segment, ...]
    slots: int
    slot_bytes: int
    budget: float = field(default=0.0, compare=False)
    learned: bool = field(default=False, compare=False)
    forecast: Forecast | None = field(default=None, compare=False)

    @cached_property
    def streamed(self) -> frozenset[int]:
        """Units that are streamed."""
        return frozenset(unit for segment in self.segments for unit in segment.units)

    @property
    def resident(self) -> tuple[int, ...]:
        """Units that stay on the device, ascending."""
        return tuple(unit for unit in range(len(self.outline.unit_bytes)) if unit not in self.streamed)

    @property
    def resident_blocks(self) -> int:
        """Blocks of which nothing is streamed."""
        return self.outline.blocks - len({segment.block for segment in self.segments})

    @property
    def rest_bytes(self) -> int:
        return self.outline.rest_bytes

    @property
    def staging_bytes(self) -> int:
        return self.slots * self.slot_bytes

    @cached_property
    def streamed_bytes(self) -> int:
        """Bytes that cross the bus in one step."""
        return sum(segment.nbytes for segment in self.segments)

    @property
    def resident_bytes(self) -> int:
        return self.outline.model_bytes - self.outline.rest_bytes - self.streamed_bytes

    @property
    def device_bytes(self) -> int:
        """Bytes on the device in all: rest, residents and staging."""
        return self.rest_bytes + self.resident_bytes + self.staging_bytes

    def explain(self) -> str:
        """The plan in a line, for the log and the node."""
        return "; ".join(part for part in (self._placement_text(), self._forecast_text()) if part)

    def _placement_text(self) -> str:
        blocks = self.outline.blocks
        if not self.segments:
            return f"all {blocks} blocks resident ({format_bytes(self.device_bytes)} on the device), nothing streamed"
        return (
            f"{format_bytes(self.streamed_bytes)} a step streamed in {len(self.segments)} segments, from "
            f"{blocks - self.resident_blocks} of {blocks} blocks; {format_bytes(self.device_bytes)} on the device: "
            f"{format_bytes(self.resident_bytes)} of blocks resident, {format_bytes(self.rest_bytes)} outside of "
            f"blocks, {format_bytes(self.staging_bytes)} staging"
        )

    def _forecast_text(self) -> str:
        if (forecast := self.forecast) is None:
            return ""
        text = f"a step in {forecast.seconds:.3g} s, limited by {_LIMIT_NAMES[forecast.limited_by]}"
        if forecast.limited_by == "bus":
            text += f" ({forecast.compute_seconds:.3g} s of compute)"
        elif self.segments:
            text += " (streaming is free)"
        if forecast.more_bytes:
            text += f"; {format_bytes(forecast.more_bytes)} more VRAM would make it {forecast.more_seconds:.3g} s"
        return text


_LIMIT_NAMES = {"bus": "the bus", "compute": "compute"}


def minimum_bytes(outline: Outline, profile: Profile) -> int:
    """The least device memory that a plan needs: the rest, and one slot for what cannot be cut further."""
    return outline.rest_bytes + _ladder(outline, profile)[0].piece_bytes


def make_plan(outline: Outline, profile: Profile, budget: float, config: StreamingConfig) -> Plan:
    """Keep what ``budget`` allows and what saves time, and spread what is streamed evenly.

    What is kept is a beginning of one order (spread.py), and of all beginnings and numbers of slots that fit the one
    with the shortest step is taken. So a larger budget only adds to what there is to choose from.

    Args:
        budget: bytes for everything: rest, residents and staging.
        config: how many slots, and how large. When it is thrifty and the profile measured, no more is kept than makes
            streaming free.

    Raises:
        BudgetError: the budget has no room for the rest and one slot.
    """
    if outline.model_bytes <= budget:
        best = Plan(outline, (), 0, 0)
    else:
        best = _fastest(_rings(outline, profile, config), budget)
    if best is None:
        least = minimum_bytes(outline, profile)
        raise BudgetError(
            f"{format_bytes(budget)} are too few: the largest part that is copied at once and what lies outside of "
            f"blocks need {format_bytes(least)}",
            least,
        )
    if profile.measured:
        enough = _free_streaming(outline, profile, config)
        if config.thrifty and enough.device_bytes < best.device_bytes:
            best = enough
        best = _with_forecast(best, profile, enough)
    return replace(best, budget=budget, learned=profile.learned)


def forecast_seconds(plan: Plan, profile: Profile, bus: float = 1.0) -> float:
    """The step that ``plan`` will take, with ``bus`` times the bandwidth."""
    if not plan.segments:
        return profile.compute_seconds
    stages, lead = _stages(plan, profile, profile.bandwidth * bus)
    return max(profile.compute_seconds, step_seconds(stages, plan.slots, lead))


class _Rung(NamedTuple):
    """What follows from keeping the first so many units of the order of residency.

    Attributes:
        streamed_bytes: of the others.
        piece_bytes: the largest of their segments that cannot be cut further.
    """

    streamed_bytes: int
    piece_bytes: int


@lru_cache(maxsize=16)
def _ladder(outline: Outline, profile: Profile) -> tuple[_Rung, ...]:
    """For each number of kept units, none to all but one, what is left to stream."""
    alone = {unit for runs in profile.unit_runs or () for unit, _ in runs}
    left = [set(units) for units in outline.block_units]
    pieces = [_largest_piece(outline, units, alone) for units in left]
    streamed = sum(outline.unit_bytes)
    rungs = [_Rung(streamed, max(pieces))]
    for unit in residency_order(outline, profile)[:-1]:
        block = outline.unit_block[unit]
        left[block].discard(unit)
        pieces[block] = _largest_piece(outline, left[block], alone)
        streamed -= outline.unit_bytes[unit]
        rungs.append(_Rung(streamed, max(pieces)))
    return tuple(rungs)


def _largest_piece(outline: Outline, units: Collection[int], alone: Collection[int]) -> int:
    sizes = [outline.unit_bytes[unit] for unit in units]
    return max(sizes, default=0) if all(unit in alone for unit in units) else sum(sizes)


@dataclass(frozen=True)
class _Ring:
    """A number of slots, and how large segments may get; makes plans that use it."""

    outline: Outline
    profile: Profile
    slots: int
    target_bytes: int

    def plan(self, kept: int) -> Plan:
        """The plan that keeps the first ``kept`` units of the order."""
        return self._plan_streaming(self._order[kept:])

    def best(self, budget: float, rival: float) -> tuple[float, Plan] | None:
        """The plan within ``budget`` whose step is the shortest, and that step.

        None where none fits, or none is faster than ``rival`` seconds by enough to count.
        """
        least, best = math.inf, 0
        for kept in range(len(self._rungs) - 1, -1, -1):
            if self._device_bytes(kept) > budget:
                continue
            if self._rungs[kept].streamed_bytes / self.profile.bandwidth > min(least, rival) * (
                1 - FORECAST_TOLERANCE / 4
            ):
                break  # Fewer residents stream more: nothing better follows.
            seconds = forecast_seconds(self.plan(kept), self.profile)
            if seconds < least:
                least, best = seconds, kept
            if min(least, rival) <= self.profile.compute_seconds:
                break
        if least is math.inf:
            return None
        filled = self._plan_streaming(self._without_what_fits(self._order[best:], budget - self._device_bytes(best)))
        return min(
            (forecast_seconds(filled, self.profile), filled), (least, self.plan(best)), key=lambda found: found[0]
        )

    def _without_what_fits(self, streamed: tuple[int, ...], room: float) -> list[int]:
        """Units to stream when some are kept out of order because the next in order does not fit.

        Only where that saves a part of the model that counts: every such unit moves again with the next budget.
        """
        left = list(streamed)
        if room < WORTH_FILLING * self.outline.model_bytes:
            return left
        for unit in streamed:
            if self.outline.unit_bytes[unit] <= room and len(left) > 1:
                left.remove(unit)
                room -= self.outline.unit_bytes[unit]
        return left

    def _plan_streaming(self, units: Collection[int]) -> Plan:
        streamed = frozenset(units)
        piece = self._rungs[len(self._order) - len(streamed)].piece_bytes if streamed else 0
        segments = cut(self.outline, streamed, self.profile, max(self.target_bytes, piece))
        return Plan(self.outline, segments, min(self.slots, len(segments)), max(segment.nbytes for segment in segments))

    def fewest(self, seconds: float, bus: float) -> Plan | None:
        """The plan with the fewest residents that takes at most ``seconds`` with ``bus`` times the bandwidth."""
        # Near enough, for hundreds of units.
        for kept in range(0, len(self._rungs), 1 + len(self._rungs) // 100):
            rung = self._rungs[kept]
            if rung.streamed_bytes / (self.profile.bandwidth * bus) <= seconds:
                plan = self.plan(kept)
                if forecast_seconds(plan, self.profile, bus) <= seconds:
                    return plan
        return None

    def _device_bytes(self, kept: int) -> int:
        rung = self._rungs[kept]
        staging = self.slots * max(self.target_bytes, rung.piece_bytes)
        return self.outline.model_bytes - rung.streamed_bytes + staging

    @property
    def _order(self) -> tuple[int, ...]:
        return residency_order(self.outline, self.profile)

    @property
    def _rungs(self) -> tuple[_Rung, ...]:
        return _ladder(self.outline, self.profile)


def _rings(outline: Outline, profile: Profile, config: StreamingConfig) -> Iterator[_Ring]:
    """Rings worth trying, the preferred one first: many slots, and segments of more than one unit."""
    largest = _ladder(outline, profile)[0].piece_bytes
    for slots in range(config.most_slots(largest), 0, -1):
        target = min(config.segment_bytes, config.staging_bytes // slots)
        yield _Ring(outline, profile, slots, target)
        if target > largest:
            yield _Ring(outline, profile, slots, 0)


def _fastest(rings: Iterable[_Ring], budget: float) -> Plan | None:
    """The plan with the shortest step; of those that are about equal the first."""
    found: list[tuple[float, Plan]] = []
    least = math.inf
    for ring in rings:
        if (best := ring.best(budget, least)) is not None:
            found.append(best)
            least = min(least, best[0])
    return next((plan for seconds, plan in found if seconds <= least * (1 + FORECAST_TOLERANCE)), None)


@lru_cache(maxsize=16)
def _free_streaming(outline: Outline, profile: Profile, config: StreamingConfig) -> Plan:
    """The plan of least memory whose step takes as long as with everything resident, with bandwidth to spare."""
    goal = profile.compute_seconds * (1 + FORECAST_TOLERANCE)
    ring = next(_rings(outline, profile, config))
    return ring.fewest(goal, SPARE_BUS) or Plan(outline, (), 0, 0)


def with_forecast(plan: Plan, profile: Profile, config: StreamingConfig) -> Plan:
    """``plan`` with what ``profile`` lets expect of it; as it is before anything was measured."""
    return _with_forecast(plan, profile, _free_streaming(plan.outline, profile, config)) if profile.measured else plan


def _with_forecast(plan: Plan, profile: Profile, enough: Plan) -> Plan:
    seconds = forecast_seconds(plan, profile)
    forecast = Forecast(seconds, profile.compute_seconds, plan.streamed_bytes / profile.bandwidth)
    more = enough.device_bytes - plan.device_bytes
    if forecast.limited_by == "bus" and more > 0:
        forecast = replace(forecast, more_bytes=more, more_seconds=forecast_seconds(enough, profile))
    return replace(plan, forecast=forecast)


def _stages(plan: Plan, profile: Profile, bandwidth: float) -> tuple[list[Stage], float]:
    """The plan's segments as stages. Within a block compute is divided in proportion to bytes."""
    outline = plan.outline
    segments: dict[int, list[Segment]] = {}
    for segment in plan.segments:
        segments.setdefault(segment.block, []).append(segment)
    stages: list[Stage] = []
    lead = profile.other_seconds
    waiting = 0.0  # Compute since the last need, of what is resident.
    for block in dict.fromkeys((*profile.block_order, *range(outline.blocks))):
        seconds = profile.block_seconds[block]
        mine = segments.get(block, [])
        if not mine:
            waiting += seconds
            continue
        size = max(1, sum(segment.nbytes for segment in mine))
        for segment in mine:
            if stages:
                stages[-1] = stages[-1]._replace(work=stages[-1].work + waiting)
            else:
                lead += waiting
            waiting = 0.0
            work = seconds * segment.nbytes / size
            stages.append(Stage(segment.nbytes / bandwidth, seconds if segment.runs == 0 else work, work))
    stages[-1] = stages[-1]._replace(work=stages[-1].work + waiting)
    return stages, lead
