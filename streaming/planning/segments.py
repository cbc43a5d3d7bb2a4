"""Segments, which are copied at once: all streamed units of a block, or a part of them. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from .profile import Outline, Profile
from .timeline import blocks_in_order


@dataclass(frozen=True)
class Segment:
    """Streamed units of one block that share a slot.

    Attributes:
        block: number of the block.
        units: in the order in which they lie in the slot.
        nbytes: bytes in all that are copied.
        runs: how often its units run, together, in one run of the block; then the slot is free. With 0 the segment
            stays from the block's begin to its end: it is not known which units run by themselves, or one does not.
        unpacked_bytes: of those units that are packed, bytes of their weights.
        unpack_seconds: until the device has unpacked them.
    """

    block: int
    units: tuple[int, ...]
    nbytes: int
    runs: int
    unpacked_bytes: int = 0
    unpack_seconds: float = 0.0


def cut(
    outline: Outline, streamed: Collection[int], profile: Profile, target_bytes: int, unpacked_bytes: float = math.inf
) -> tuple[Segment, ...]:
    """Cut what is streamed into segments, in the order in which they are needed.

    Units that run one after another share a segment up to ``target_bytes``, and to ``unpacked_bytes`` of what is
    packed; a larger unit is a segment by itself.
    """
    order, most = blocks_in_order(outline, profile), (target_bytes, unpacked_bytes)
    return tuple(segment for block in order for segment in _cut_block(outline, block, streamed, profile, most))


def _cut_block(
    outline: Outline, block: int, streamed: Collection[int], profile: Profile, most: tuple[float, float]
) -> Iterator[Segment]:
    mine = [unit for unit in outline.block_units[block] if unit in streamed]
    runs = dict(profile.unit_runs[block]) if profile.unit_runs is not None else {}
    if any(unit not in runs for unit in mine):
        yield _segment(outline, block, mine, 0)
        return
    group: list[int] = []
    for unit in (unit for unit in runs if unit in streamed):
        larger = [*group, unit]
        if group and (_bytes(outline, larger) > most[0] or _unpacked_bytes(outline, larger) > most[1]):
            yield _segment(outline, block, group, sum(runs[unit] for unit in group))
            group = []
        group.append(unit)
    if group:
        yield _segment(outline, block, group, sum(runs[unit] for unit in group))


def _segment(outline: Outline, block: int, units: list[int], runs: int) -> Segment:
    seconds = sum(outline.seconds_to_unpack(unit) for unit in units if outline.is_packed(unit))
    return Segment(block, tuple(units), _bytes(outline, units), runs, _unpacked_bytes(outline, units), seconds)


def _bytes(outline: Outline, units: list[int]) -> int:
    return sum(outline.bytes_in_slot(unit) for unit in units)


def _unpacked_bytes(outline: Outline, units: list[int]) -> int:
    return sum(outline.unit_bytes[unit] for unit in units if outline.is_packed(unit))
