"""Which of the units that stream are packed: as many as make the bus as fast as compute, and no more. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import NamedTuple

from .plan import Plan
from .profile import Outline, Profile
from .timeline import timeline

# So many more bytes are packed than would make the bus just as fast as compute.
MARGIN = 0.1


class Packing(NamedTuple):
    """What packing would save, and cost.

    Attributes:
        slot_bytes: of each unit when it is packed, as it is copied; its own bytes where it cannot be.
        bytes_per_second: of weights, with which the device unpacks.
    """

    slot_bytes: tuple[int, ...]
    bytes_per_second: float


@dataclass(frozen=True)
class Refusals:
    """Units that stream as they are although weights are packed, by what is in the way; false where there are none.

    Attributes:
        too_large: they take more than was planned, or a patch gives a value another shape.
        without_room: no more memory may be page-locked for them.
        written: other code writes to them.
        left: other processes pack them for all.
    """

    too_large: frozenset[int] = frozenset()
    without_room: frozenset[int] = frozenset()
    written: frozenset[int] = frozenset()
    left: frozenset[int] = frozenset()

    @property
    def units(self) -> frozenset[int]:
        """All of them."""
        return self.too_large | self.without_room | self.written | self.left

    def __bool__(self) -> bool:
        return bool(self.units)

    def __or__(self, other: Refusals) -> Refusals:
        return Refusals(
            self.too_large | other.too_large,
            self.without_room | other.without_room,
            self.written | other.written,
            self.left | other.left,
        )


def packed_outline(outline: Outline, packing: Packing, units: Collection[int]) -> Outline:
    """Return ``outline`` with these units packed, as far as they can be."""
    sizes = [packing.slot_bytes[unit] if unit in units else nbytes for unit, nbytes in enumerate(outline.unit_bytes)]
    seconds = [nbytes / packing.bytes_per_second for nbytes in outline.unit_bytes]
    return replace(outline, slot_bytes=tuple(sizes), unpack_seconds=tuple(seconds))


def units_to_pack(
    plan: Plan, profile: Profile, packing: Packing, without: Collection[int] = (), everything: bool = False
) -> frozenset[int]:
    """Return the units to pack of those that ``plan`` streams, which packs none; ``everything`` that can be packed.

    With the share s of B bytes packed, of which that saves the part r, the bus needs (A - B s r) / b seconds, and the
    device C + B s / u; they are equal for s = (A / b - C) / (B (r / b + 1 / u)). (A: all bytes that stream, B: those of
    units that can be packed, b: bytes a second of the bus, u: of the device that unpacks, C: seconds of compute.)
    """
    sizes = plan.outline.unit_bytes
    order = [moment.unit for moment in timeline(plan.outline, profile) if moment.unit in plan.streamed]
    able = [unit for unit in order if packing.slot_bytes[unit] < sizes[unit] and unit not in without]
    total = sum(sizes[unit] for unit in able)
    if not total or everything:
        return frozenset(able)
    saved = 1 - sum(packing.slot_bytes[unit] for unit in able) / total
    too_long = plan.streamed_weight_bytes / profile.bandwidth - profile.compute_seconds
    share = too_long / (total * (saved / profile.bandwidth + 1 / packing.bytes_per_second)) * (1 + MARGIN)
    if share >= 1:
        return frozenset(able)
    found, due = set(), 0.0
    for unit in able:  # Spread evenly over the step.
        due += share * sizes[unit]
        if due >= sizes[unit] / 2:
            due -= sizes[unit]
            found.add(unit)
    return frozenset(found)
