"""A plan: which units stay on a device, how the others stream, and how long a step takes then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from ..config import count_of, format_bytes
from .needs import segment_needs, stages_of, waits_of
from .pipeline import step_seconds
from .profile import Outline, Profile
from .ring_layout import lay_out, used_bytes, waited_for
from .segments import Segment
from .timeline import timeline

# Two forecasts that differ by less are the same.
FORECAST_TOLERANCE = 0.005
# Nobody gains from less: where compute waits for a smaller part of a step, people are told of no limit.
TOLD_WAITING = 0.03


def is_bus_limited(seconds: float, compute_seconds: float) -> bool:
    """Whether a step of so many seconds takes longer than its compute."""
    return seconds > compute_seconds * (1 + FORECAST_TOLERANCE)


@dataclass(frozen=True)
class Forecast:
    """How long a step will take.

    Attributes:
        seconds: the step.
        compute_seconds: the same step with everything resident.
        bus_seconds: the transfer of all that is streamed.
        more_bytes: additional device memory with which the step is as fast as it can be; 0 if it is so already.
        more_seconds: the step with that memory.
    """

    seconds: float
    compute_seconds: float
    bus_seconds: float
    more_bytes: int = 0
    more_seconds: float = 0.0

    @property
    def limited_by(self) -> str:
        """``compute`` or ``bus``."""
        return "bus" if is_bus_limited(self.seconds, self.compute_seconds) else "compute"

    @property
    def waiting(self) -> float:
        """The part of the step in which compute waits for the bus."""
        return max(0.0, 1 - self.compute_seconds / self.seconds) if self.seconds > 0 else 0.0

    @property
    def is_worth_telling(self) -> bool:
        """Whether people are told what limits the step, and what more memory would bring."""
        return self.waiting >= TOLD_WAITING


@dataclass(frozen=True)
class Plan:
    """Which units of a model stay on one device, and how the others stream.

    Attributes:
        outline: the model.
        segments: what is streamed, in the order of need. All other units are resident.
        offsets: where in the staging memory each segment lies (ring_layout.py).
        budget: bytes of device memory that it may use.
        learned: whether it was known, when the plan was made, which units run by themselves.
        forecast: None before a step was measured.
        order: units in the order in which they become resident; they are evicted in the reverse order.
    """

    outline: Outline = field(repr=False)
    segments: tuple[Segment, ...]
    offsets: tuple[int, ...]
    budget: float = field(default=0.0, compare=False)
    learned: bool = field(default=False, compare=False)
    forecast: Forecast | None = field(default=None, compare=False)
    order: tuple[int, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def streaming(cls, outline: Outline, segments: tuple[Segment, ...], room: int) -> Plan:
        """The plan that streams ``segments`` through at most ``room`` bytes of staging memory."""
        return cls(outline, segments, lay_out([segment.nbytes for segment in segments], room))

    @cached_property
    def streamed(self) -> frozenset[int]:
        """Units that are streamed."""
        return frozenset(unit for segment in self.segments for unit in segment.units)

    @cached_property
    def waits(self) -> dict[Segment, Segment]:
        """For each segment the one whose memory it reuses."""
        waits = waited_for([segment.nbytes for segment in self.segments], self.offsets)
        return {segment: self.segments[other] for segment, other in zip(self.segments, waits, strict=True)}

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

    @cached_property
    def staging_bytes(self) -> int:
        return used_bytes([segment.nbytes for segment in self.segments], self.offsets)

    @cached_property
    def streamed_bytes(self) -> int:
        """Bytes that cross the bus in one step."""
        return sum(segment.nbytes for segment in self.segments)

    @cached_property
    def packed(self) -> frozenset[int]:
        """Units that are packed when they are copied."""
        return frozenset(unit for unit in self.streamed if self.outline.is_packed(unit))

    @cached_property
    def streamed_weight_bytes(self) -> int:
        """Bytes of the units that are streamed; more than :attr:`streamed_bytes` where some are packed."""
        return sum(self.outline.unit_bytes[unit] for unit in self.streamed)

    @cached_property
    def unpacking_bytes(self) -> int:
        """Memory into which segments are unpacked, one after another."""
        return max((segment.unpacked_bytes for segment in self.segments), default=0)

    @property
    def resident_bytes(self) -> int:
        return self.outline.model_bytes - self.outline.rest_bytes - self.streamed_weight_bytes

    @property
    def device_bytes(self) -> int:
        """Bytes on the device in all: rest, residents, staging, and what is unpacked."""
        return self.rest_bytes + self.resident_bytes + self.staging_bytes + self.unpacking_bytes

    def explain(self) -> str:
        """The plan in a line, for the log and the node."""
        return "; ".join(part for part in (self._placement_text(), self._forecast_text()) if part)

    def _placement_text(self) -> str:
        blocks = count_of(self.outline.blocks, "block")
        if not self.segments:
            return f"all {blocks} stay ({format_bytes(self.device_bytes)} on the device), nothing streamed"
        streamed = self.outline.blocks - self.resident_blocks
        text = format_bytes(self.streamed_bytes)
        if self.packed:
            text += f" (packed, {format_bytes(self.streamed_weight_bytes)} of weights)"
        text += (
            f" a step streamed in {count_of(len(self.segments), 'segment')}, from "
            f"{streamed} of {blocks}; {format_bytes(self.device_bytes)} on the device: "
            f"{format_bytes(self.resident_bytes)} of blocks stay, {format_bytes(self.rest_bytes)} outside of "
            f"blocks, {format_bytes(self.staging_bytes)} staging"
        )
        return text + (f", {format_bytes(self.unpacking_bytes)} to unpack in" if self.packed else "")

    def _forecast_text(self) -> str:
        if (forecast := self.forecast) is None:
            return ""
        text = f"a step in {forecast.seconds:.3g} s"
        if not forecast.is_worth_telling:
            return f"{text}, hardly any of it waiting for the bus" if self.segments else text
        text += f", limited by the bus ({forecast.compute_seconds:.3g} s of compute)"
        if forecast.more_bytes:
            text += f"; {format_bytes(forecast.more_bytes)} more VRAM would make it {forecast.more_seconds:.3g} s"
        return text


# Returns the seconds that a step will take under a plan, by a profile.
SecondsOf = Callable[["Plan", Profile], float]


def forecast_seconds(plan: Plan, profile: Profile) -> float:
    """Return the seconds that a step will take under ``plan``."""
    if not plan.segments:
        return profile.compute_seconds
    needs = segment_needs(plan.segments, profile, timeline(plan.outline, profile))
    stages, lead = stages_of(needs, [profile.bandwidth], profile.compute_seconds)
    return max(profile.compute_seconds, step_seconds(stages, waits_of(needs, [plan.waits]), lead))
