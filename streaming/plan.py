"""Who is resident and who is streamed. Pure: sizes and a budget in, a plan out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .config import format_bytes
from .errors import BudgetError


@dataclass(frozen=True)
class Plan:
    """A placement of a model's blocks on one device.

    Attributes:
        sizes: bytes of each block.
        rest_bytes: bytes outside of blocks; always on the device.
        streamed: indices of the blocks that are streamed, ascending; all others are resident.
        slots: staging slots; 0 when nothing is streamed.
    """

    sizes: tuple[int, ...]
    rest_bytes: int
    streamed: tuple[int, ...]
    slots: int

    @property
    def resident(self) -> tuple[int, ...]:
        streamed = set(self.streamed)
        return tuple(index for index in range(len(self.sizes)) if index not in streamed)

    @property
    def slot_bytes(self) -> int:
        return max((self.sizes[index] for index in self.streamed), default=0)

    @property
    def staging_bytes(self) -> int:
        return self.slots * self.slot_bytes

    @property
    def streamed_bytes(self) -> int:
        """Bytes that cross the bus in one step."""
        return sum(self.sizes[index] for index in self.streamed)

    @property
    def resident_bytes(self) -> int:
        return sum(self.sizes) - self.streamed_bytes

    @property
    def device_bytes(self) -> int:
        """Bytes on the device in all: rest, residents and staging."""
        return self.rest_bytes + self.resident_bytes + self.staging_bytes

    def explain(self) -> str:
        """The plan in a line, for the log and the node."""
        blocks = len(self.sizes)
        if not self.streamed:
            return f"all {blocks} blocks resident ({format_bytes(self.device_bytes)} on the device), nothing streamed"
        return (
            f"{len(self.streamed)} of {blocks} blocks streamed ({format_bytes(self.streamed_bytes)} a step), "
            f"{len(self.resident)} resident; {format_bytes(self.device_bytes)} on the device: "
            f"{format_bytes(self.resident_bytes)} resident blocks, {format_bytes(self.rest_bytes)} outside of blocks, "
            f"{format_bytes(self.staging_bytes)} staging"
        )


def minimum_bytes(sizes: Sequence[int], rest_bytes: int) -> int:
    """The least device memory that a plan needs: the rest, and one slot for the largest block."""
    return rest_bytes + max(sizes, default=0)


def make_plan(sizes: Sequence[int], rest_bytes: int, budget: float, slots: int) -> Plan:
    """Keep as many bytes resident as ``budget`` allows, and spread what is streamed evenly.

    Args:
        sizes: bytes of each block in the order in which they run.
        rest_bytes: bytes that are on the device in any case.
        budget: bytes for everything: rest, residents and staging.
        slots: staging slots to use where the budget has room for them; fewer otherwise.

    Raises:
        BudgetError: the budget has no room for the rest and one slot.
    """
    sizes = tuple(sizes)
    if rest_bytes + sum(sizes) <= budget:
        return Plan(sizes, rest_bytes, (), 0)
    least = minimum_bytes(sizes, rest_bytes)
    if least > budget:
        raise BudgetError(
            f"{format_bytes(budget)} are too few: the largest block and what lies outside of blocks need "
            f"{format_bytes(least)}",
            least,
        )
    largest = max(sizes)
    slots = max(1, min(slots, int((budget - rest_bytes) // largest)))
    residents = _spread(sizes, budget - rest_bytes - slots * largest)
    streamed = tuple(index for index in range(len(sizes)) if index not in residents)
    return Plan(sizes, rest_bytes, streamed, min(slots, len(streamed)))


def _spread(sizes: tuple[int, ...], budget: float) -> set[int]:
    """Blocks to keep, at most ``budget`` bytes, so that what crosses the bus is spread evenly over the step.

    Error diffusion: with each block the bytes that the bus can move while it computes become due. A block is streamed
    when at least half of it is due, else kept. Every block is taken to compute for the same time: that is true for
    most models and near enough for FLUX, whose double blocks have 2.4 times the bytes of its single blocks and, by
    their multiplications, compute 1.2 times as long. What the budget then still has room for is kept where streamed
    blocks stand closest.
    """
    due_per_block = (sum(sizes) - budget) / len(sizes)
    kept: set[int] = set()
    room = budget
    due = 0.0
    for index, size in enumerate(sizes):
        due += due_per_block
        if due * 2 < size <= room:
            kept.add(index)
            room -= size
        else:
            due -= size
    while True:
        fitting = [index for index in range(len(sizes)) if index not in kept and sizes[index] <= room]
        if not fitting or len(kept) + 1 >= len(sizes):
            return kept
        chosen = max(fitting, key=lambda index: (_run_length(index, kept, len(sizes)), sizes[index], -index))
        kept.add(chosen)
        room -= sizes[chosen]


def _run_length(index: int, kept: set[int], count: int) -> int:
    """Streamed neighbours on the nearer side of ``index``, as if the blocks lay in a circle."""
    before = next((step for step in range(1, count) if (index - step) % count in kept), count)
    after = next((step for step in range(1, count) if (index + step) % count in kept), count)
    return min(before, after)
