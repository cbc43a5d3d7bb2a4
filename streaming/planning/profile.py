"""How a step of a model behaves: which units run when, for how long, and what the bus carries. Pure values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from typing import NamedTuple

# Assumed until they are measured, only to decide how a first plan spreads what it streams. PCIe 4.0 x16 carries 20 to
# 25 GB/s, and blocks of large models seldom compute longer than they are copied.
ASSUMED_BANDWIDTH = 20e9
ASSUMED_COMPUTE_SHARE = 0.5


@dataclass(frozen=True)
class Outline:
    """A model as a plan sees it. Units are numbered in the order of definition, block after block.

    Attributes:
        unit_bytes: bytes of each unit.
        unit_block: the block that each unit belongs to, ascending.
        block_kind: equal numbers mark blocks of one class with like units.
        rest_bytes: bytes outside of units, which always stay on the device.
        slot_bytes: bytes of each unit as it is copied when it streams, and lies in a slot: fewer where it is packed.
            Empty where nothing is.
        unpack_seconds: for each unit seconds of the device's time for unpacking it, whenever it is needed.
    """

    unit_bytes: tuple[int, ...]
    unit_block: tuple[int, ...]
    block_kind: tuple[int, ...]
    rest_bytes: int
    slot_bytes: tuple[int, ...] = field(default=(), repr=False)
    unpack_seconds: tuple[float, ...] = field(default=(), repr=False)

    def bytes_in_slot(self, unit: int) -> int:
        return self.slot_bytes[unit] if self.slot_bytes else self.unit_bytes[unit]

    def is_packed(self, unit: int) -> bool:
        """Whether the unit is packed when it streams."""
        return self.bytes_in_slot(unit) < self.unit_bytes[unit]

    def seconds_to_unpack(self, unit: int) -> float:
        return self.unpack_seconds[unit] if self.unpack_seconds else 0.0

    @cached_property
    def block_units(self) -> tuple[tuple[int, ...], ...]:
        units: list[list[int]] = [[] for _ in self.block_kind]
        for unit, block in enumerate(self.unit_block):
            units[block].append(unit)
        return tuple(map(tuple, units))

    @property
    def blocks(self) -> int:
        return len(self.block_kind)

    @cached_property
    def model_bytes(self) -> int:
        return self.rest_bytes + sum(self.unit_bytes)

    def block_bytes(self, block: int) -> int:
        return sum(self.unit_bytes[unit] for unit in self.block_units[block])


class UnitTime(NamedTuple):
    """Compute of a unit's run, in seconds.

    Attributes:
        hold: while it runs, and needs its weights.
        work: from its begin to the begin of the next unit of its block, or the block's end.
    """

    hold: float
    work: float


@dataclass(frozen=True)
class Profile:
    """What is known of a step; assumed values before the first one has run.

    Attributes:
        block_seconds: compute of each block without waiting for copies; 0 where it did not run.
        other_seconds: compute of a step outside of blocks, on other devices too.
        bandwidth: bytes per second from the host's memory to the device.
        unit_runs: for each block the units that run by themselves, each with how often, in the order of their first
            run. Units that are not listed are needed from the begin of their block to its end; so are all units while
            this is None, which is before it is learned.
        unit_times: measured times of every unit that runs by itself, 0 for the others. None while only those of blocks
            are known: these are then divided in proportion to bytes.
        block_order: the blocks in the order in which they ran.
        gap_seconds: what of ``other_seconds`` comes right before each block; empty where nothing is known.
        order: the units in the order in which they become resident; empty for the one that fits these times best.
        measured: whether times and bandwidth were measured.
    """

    block_seconds: tuple[float, ...]
    other_seconds: float
    bandwidth: float
    unit_runs: tuple[tuple[tuple[int, int], ...], ...] | None = field(default=None, repr=False)
    unit_times: tuple[UnitTime, ...] | None = field(default=None, repr=False)
    block_order: tuple[int, ...] = field(default=(), repr=False)
    gap_seconds: tuple[float, ...] = field(default=(), repr=False)
    order: tuple[int, ...] = field(default=(), repr=False)
    measured: bool = False

    @property
    def compute_seconds(self) -> float:
        """Seconds of a step with everything resident."""
        return sum(self.block_seconds) + self.other_seconds

    @property
    def learned(self) -> bool:
        return self.unit_runs is not None


def assumed_profile(outline: Outline) -> Profile:
    """Return the profile before anything has run: every block computes for the same time."""
    seconds = ASSUMED_COMPUTE_SHARE * outline.model_bytes / ASSUMED_BANDWIDTH / max(1, outline.blocks)
    order = tuple(range(outline.blocks))
    return Profile((seconds,) * outline.blocks, 0.0, ASSUMED_BANDWIDTH, block_order=order)


def by_kind(outline: Outline, values: Sequence[float | None]) -> tuple[float, ...]:
    """Return the median of each block's kind as its value: the first run of a kernel takes longer than the others.

    None stands for a block that did not run: medians leave it out, and its value becomes 0.
    """
    kinds: dict[int, list[float]] = {}
    for kind, value in zip(outline.block_kind, values, strict=True):
        if value is not None:
            kinds.setdefault(kind, []).append(value)
    medians = {kind: median(found) for kind, found in kinds.items()}
    return tuple(
        0.0 if value is None else medians[kind] for kind, value in zip(outline.block_kind, values, strict=True)
    )
