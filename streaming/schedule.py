"""What is copied next, and into which slot. Pure: it knows numbers of segments and slots, no tensors and no streams.

[Note: prediction]
The order of segments is learned from the last whole forward and used as a cycle, so the end of one step asks for the
start of the next. It may be wrong at any time: blocks are skipped, repeated, replaced or reordered by other nodes. So
nothing here relies on it. ``enter`` looks the segment up by its number; when no slot holds it that is a miss, and the
caller copies it then. ``upcoming`` starts again from where the segment was found, and slots that hold segments which
are not among the upcoming ones are the first to be reused. A wrong prediction costs time, never a wrong weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .errors import RingExhaustedError

# No model runs so many segments in one forward.
LONGEST_STEP = 100_000


class Entry(NamedTuple):
    """Where a segment that is needed now is, or must be copied to."""

    slot: int
    hit: bool


class Copy(NamedTuple):
    """A segment to copy ahead of its use.

    Attributes:
        opening: it is among the first that a step needs.
    """

    segment: int
    slot: int
    opening: bool


class Schedule:
    """The slots of one device's ring, and who gets them.

    Args:
        order: the streamed segments in the order in which they are expected; a segment may stand in it more than once.
        slots: number of slots, 1 or more.
        lookahead: upcoming segments that are held in slots ahead of their use; 0 copies nothing ahead.
    """

    def __init__(self, order: Sequence[int], slots: int, lookahead: int) -> None:
        self._learn(order)
        self.lookahead = min(lookahead, slots)
        self._held: list[int | None] = [None] * slots
        self._users = [0] * slots
        self._position = 0
        self._trace: list[int] = []

    def slot_of(self, segment: int) -> int | None:
        return self._held.index(segment) if segment in self._held else None

    def enter(self, segment: int) -> Entry:
        """A segment starts. Its slot is not given to another segment until it has left.

        Raises:
            RingExhaustedError: it is in no slot, and every slot is used by a segment that is still running.
        """
        if len(self._trace) >= LONGEST_STEP:
            self._trace.clear()  # Somebody runs segments and never a whole step: there is nothing to learn.
        self._trace.append(segment)
        self._advance_past(segment)
        slot = self.slot_of(segment)
        hit = slot is not None
        if slot is None:
            slot = self._victim()
            self._held[slot] = segment
        self._users[slot] += 1
        return Entry(slot, hit)

    def leave(self, slot: int) -> None:
        """The segment in ``slot`` ends; the slot may be reused when nobody else is in it."""
        self._users[slot] -= 1

    def next_copy(self) -> Copy | None:
        """The most urgent segment to copy ahead, taken as copied; None when the slots hold all that is wanted."""
        wanted = self.upcoming(self.lookahead)
        segment = next((segment for segment in wanted if segment not in self._held), None)
        slot = self._spare(wanted) if segment is not None else None
        if segment is None or slot is None:
            return None
        self._held[slot] = segment
        return Copy(segment, slot, segment in self.order[: self.lookahead])

    def drop(self, slot: int) -> None:
        """The copy into ``slot`` failed: it holds nothing."""
        self._held[slot] = None

    def begin_step(self) -> None:
        """A forward begins. What an earlier one left behind that did not come to its end is forgotten."""
        self._trace = []
        self._position = 0

    def end_step(self, completed: bool) -> None:
        """A forward ends. A whole one becomes the prediction of the next."""
        if completed and self._trace:
            self._learn(self._trace)
        self.begin_step()

    def forget(self) -> None:
        """The contents of all slots are out of date; no segment may be running."""
        self._held = [None] * len(self._held)

    def upcoming(self, count: int) -> list[int]:
        """The next ``count`` different segments, in the order in which they are expected."""
        if len(self._distinct) == len(self.order):
            ahead = self.order[self._position : self._position + count]
            return ahead + self.order[: min(count - len(ahead), self._position)]
        return [segment for segment, _ in zip(self._upcoming_unique(), range(count), strict=False)]

    def _learn(self, order: Sequence[int]) -> None:
        self.order = list(order)
        self._distinct = set(order)

    def _upcoming_unique(self) -> Iterator[int]:
        seen: set[int] = set()
        length = len(self.order)
        for step in range(length):
            segment = self.order[(self._position + step) % length]
            if segment not in seen:
                seen.add(segment)
                yield segment

    def _advance_past(self, segment: int) -> None:
        length = len(self.order)
        for step in range(length):
            index = (self._position + step) % length
            if self.order[index] == segment:
                self._position = (index + 1) % length
                return

    def _victim(self) -> int:
        """The slot to overwrite for a miss: an empty one, else the one whose segment is needed last."""
        distance = {segment: step for step, segment in enumerate(self._upcoming_unique())}
        idle = [slot for slot, users in enumerate(self._users) if users == 0]
        if not idle:
            raise RingExhaustedError(
                f"all {len(self._held)} staging slots are used by segments that are still running; "
                "raise the number of slots"
            )
        far = len(distance)
        return max(idle, key=lambda slot: far + 1 if self._held[slot] is None else distance.get(self._held[slot], far))

    def _spare(self, wanted: Sequence[int]) -> int | None:
        for slot, held in enumerate(self._held):
            if self._users[slot] == 0 and held not in wanted:
                return slot
        return None
