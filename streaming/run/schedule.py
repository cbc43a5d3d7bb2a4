"""What is copied next. Pure: it knows numbers of segments and where they lie, no tensors and no streams.

[Note: prediction]
The order of segments is learned from the last whole forward and used as a cycle, so the end of one step asks for the
start of the next. It may be wrong at any time: blocks are skipped, repeated, replaced or reordered by other nodes. So
nothing here relies on it. ``enter`` looks the segment up by its number; when it is not held that is a miss, and the
caller copies it then. ``upcoming`` starts again from where the segment was found. A segment is copied ahead as soon as
no segment in its place runs or is needed before it. A wrong prediction costs time, never a wrong weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from itertools import takewhile
from typing import NamedTuple

# No model runs so many segments in one forward.
LONGEST_STEP = 100_000


class Entry(Enum):
    """How a segment is found that is needed now."""

    HELD = "held"
    """It is in its place, or on its way there."""
    MISSING = "missing"
    """It must be copied to its place, where nothing is held now."""
    CROWDED_OUT = "crowded out"
    """A segment that runs is in its place."""


class Copy(NamedTuple):
    """A segment to copy ahead of its use.

    Attributes:
        opening: it is among the first that a step needs.
    """

    segment: int
    opening: bool


class Schedule:
    """Which segments are in the staging memory of one device.

    Args:
        order: the streamed segments in the order in which they are expected; a segment may stand in it more than once.
        spans: the place of each segment, by its number; where two overlap only one of them is held.
        ahead: whether segments are copied before they are needed.
    """

    def __init__(self, order: Sequence[int], spans: Sequence[range], ahead: bool = True) -> None:
        self.ahead = ahead
        self._starts = [span.start for span in spans]
        self._stops = [span.stop for span in spans]
        self._held: dict[int, None] = {}
        self._users = [0] * len(spans)
        self._position = 0
        self._trace: list[int] = []
        self.order: list[int] = []
        self._learn(order)

    @property
    def held(self) -> tuple[int, ...]:
        """Segments that are in their places, or on their way there."""
        return tuple(self._held)

    def enter(self, segment: int) -> Entry:
        """A segment starts. Nothing is copied to its place until it has left, unless it was crowded out."""
        if len(self._trace) >= LONGEST_STEP:
            self._trace.clear()  # Segments run, but never a whole step: there is nothing to learn.
        self._trace.append(segment)
        self._advance_past(segment)
        found = Entry.HELD
        if segment not in self._held:
            others = self._in_place_of(segment)
            if any(self._users[other] for other in others):
                return Entry.CROWDED_OUT
            self._clear(others)
            found = Entry.MISSING
        self._users[segment] += 1
        return found

    def leave(self, segment: int) -> None:
        """The segment ends; others may be copied to its place once it has ended as often as it has begun."""
        self._users[segment] -= 1

    def next_copy(self) -> Copy | None:
        """The most urgent segment to copy ahead; None without any, or if one in its place runs or is needed before."""
        if not self.ahead:
            return None
        upcoming = self._upcoming()
        sooner = list(takewhile(self._held.__contains__, upcoming))
        if len(sooner) == len(upcoming):
            return None
        segment, users = upcoming[len(sooner)], self._users
        others = self._in_place_of(segment)
        for other in others:
            if users[other] or other in sooner:
                return None
        self._clear(others)
        return Copy(segment, segment in self._opening)

    def hold(self, segment: int) -> None:
        """The segment is in its place, or on its way there. Not to be called before that: an interrupt may come."""
        self._held[segment] = None

    def drop(self, segment: int) -> None:
        """The segment is not in its place any more, for example because it was written to."""
        self._held.pop(segment, None)

    def begin_step(self) -> None:
        """A forward begins; no segment is running. What an unfinished forward left behind is forgotten."""
        self._trace = []
        self._position = 0
        self._users = [0] * len(self._starts)

    def end_step(self, completed: bool) -> None:
        """A forward ends. A whole one becomes the prediction of the next."""
        if completed and self._trace:
            self._learn(self._trace)
        self.begin_step()

    def forget(self) -> None:
        """What is held is out of date; no segment may be running."""
        self._held.clear()

    def upcoming(self, count: int) -> list[int]:
        """The next ``count`` different segments, in the order in which they are expected."""
        return self._upcoming()[:count]

    def _learn(self, order: Sequence[int]) -> None:
        if order == self.order:
            return
        self.order = list(order)
        self._cycle = self.order * 2
        self._distinct = len(set(order)) == len(order)
        self._opening: list[int] = []
        for segment in dict.fromkeys(order):
            if any(self._overlap(segment, other) for other in self._opening):
                break
            self._opening.append(segment)

    def _upcoming(self) -> list[int]:
        """All segments, in the order in which they are expected from now on."""
        ahead = self._cycle[self._position : self._position + len(self.order)]
        return ahead if self._distinct else list(dict.fromkeys(ahead))

    def _advance_past(self, segment: int) -> None:
        length = len(self.order)
        for step in range(length):
            index = (self._position + step) % length
            if self.order[index] == segment:
                self._position = (index + 1) % length
                return

    def _in_place_of(self, segment: int) -> list[int]:
        """Held segments that lie where ``segment`` will."""
        starts, stops = self._starts, self._stops
        start, stop = starts[segment], stops[segment]
        return [other for other in self._held if starts[other] < stop and start < stops[other]]

    def _overlap(self, one: int, other: int) -> bool:
        return self._starts[one] < self._stops[other] and self._starts[other] < self._stops[one]

    def _clear(self, others: Sequence[int]) -> None:
        for other in others:
            del self._held[other]
