from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import pytest
from weightstream.streaming import Schedule
from weightstream.streaming.planning.ring_layout import lay_out
from weightstream.streaming.run.schedule import Entry

# Bytes of segments, by their number: like ones, and two kinds that do not divide each other.
SIZES = {"like": (2,), "unlike": (2, 3, 1, 4)}


def spans_of(count: int, room: int, sizes: Sequence[int]) -> list[range]:
    """Where so many segments lie in a ring that holds ``room`` of the largest."""
    nbytes = [sizes[number % len(sizes)] for number in range(count)]
    offsets = lay_out(nbytes, room * max(nbytes))
    return [range(offset, offset + size) for offset, size in zip(offsets, nbytes, strict=True)]


class Memory:
    """What a device would hold if it did as the schedule says; refuses to touch bytes that are in use."""

    def __init__(self, schedule: Schedule, spans: Sequence[range]) -> None:
        self.schedule = schedule
        self.spans = spans
        self.content: dict[int, int] = {}
        self.used: set[int] = set()
        self.misses = self.crowded_out = 0
        self.prefetch()

    def copy(self, segment: int) -> None:
        for byte in self.spans[segment]:
            assert byte not in self.used, "memory is overwritten while a segment runs in it"
            self.content[byte] = segment
        self.schedule.hold(segment)

    def holds(self, segment: int) -> bool:
        return all(self.content.get(byte) == segment for byte in self.spans[segment])

    def enter(self, segment: int) -> bool:
        """Whether it runs in its place."""
        entry = self.schedule.enter(segment)
        if entry is Entry.CROWDED_OUT:
            assert self.used & set(self.spans[segment]), "there is room for it"
            self.crowded_out += 1
            return False
        if entry is Entry.MISSING:
            self.misses += 1
            self.copy(segment)
        assert self.holds(segment), "another segment is in its place"
        self.used |= set(self.spans[segment])
        return True

    def leave(self, segment: int) -> None:
        self.used -= set(self.spans[segment])
        self.schedule.leave(segment)

    def run(self, segment: int) -> None:
        assert self.enter(segment)
        self.prefetch()  # Prefetching while a segment runs must not take its place.
        assert self.holds(segment)
        self.leave(segment)
        self.prefetch()

    def prefetch(self) -> None:
        while (copy := self.schedule.next_copy()) is not None:
            assert not self.holds(copy.segment), "a segment is copied again"
            self.copy(copy.segment)
        assert all(map(self.holds, self.schedule.held)), "a segment counts as held and is overwritten"

    def step(self, order: Sequence[int]) -> int:
        before = self.misses
        for segment in order:
            self.run(segment)
        self.schedule.end_step(completed=True)
        return self.misses - before


def make(order: Sequence[int], spans: Sequence[range]) -> Memory:
    return Memory(Schedule(order, spans), spans)


def rings(most: int) -> Iterator[list[range]]:
    """Small ones of all shapes."""
    for count, room, sizes in itertools.product(range(1, most), range(1, 6), SIZES.values()):
        yield spans_of(count, room, sizes)


def test_a_constant_order_never_misses() -> None:
    for spans in rings(10):
        for streamed in range(1, 2 ** len(spans)):
            order = [number for number in range(len(spans)) if streamed >> number & 1]
            memory = make(order, spans)
            assert sum(memory.step(order) for _ in range(3)) == 0


def test_skipped_segments_cost_time_at_most() -> None:
    for spans in rings(9):
        everything = list(range(len(spans)))
        for chosen in range(2 ** len(spans)):
            some = [number for number in everything if chosen >> number & 1]
            memory = make(everything, spans)
            memory.step(everything)
            memory.step(some)
            memory.step(everything)
            assert memory.step(everything) <= 1, "the schedule has not healed"


def test_any_order_runs_the_right_segments() -> None:
    for spans in rings(5):
        everything = list(range(len(spans)))
        for length in range(1, 5):
            for order in itertools.product(everything, repeat=length):
                memory = make(everything, spans)
                for each in (order, everything, order):
                    memory.step(each)


def test_segments_that_run_inside_of_others_are_crowded_out_only_by_those() -> None:
    for spans in rings(5):
        for outer, inner in itertools.permutations(range(len(spans)), 2):
            memory = make(range(len(spans)), spans)
            assert memory.enter(outer)
            memory.prefetch()
            if memory.enter(inner):
                memory.prefetch()
                assert memory.holds(inner)
                memory.leave(inner)
            assert memory.holds(outer)
            memory.leave(outer)
            memory.step(range(len(spans)))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_repeated_segments_are_learned(sizes: Sequence[int]) -> None:
    order = [0, 1, 1, 2, 0, 3, 2]
    memory = make(range(4), spans_of(4, 2, sizes))
    memory.step(order)
    memory.step(order)
    assert memory.step(order) == 0


def test_the_end_of_a_step_asks_for_its_start() -> None:
    memory = make(range(5), spans_of(5, 2, [1]))
    memory.step(range(5))
    assert set(memory.schedule.held) == {0, 1}


def test_the_most_urgent_segment_is_copied_first() -> None:
    schedule = Schedule([2, 0, 1, 3], [range(1, 2), range(2, 3), range(1), range(1)])
    for expected in ((2, True), (0, True), (1, True)):
        assert schedule.next_copy() == expected
        assert schedule.next_copy() == expected, "nobody has copied it"
        schedule.hold(expected[0])
    assert schedule.next_copy() is None
    schedule.enter(2)
    assert schedule.next_copy() is None
    schedule.leave(2)
    assert schedule.next_copy() == (3, False)


def test_nothing_is_copied_ahead_where_that_is_switched_off() -> None:
    schedule = Schedule([0, 1], [range(1), range(1, 2)], ahead=False)
    assert schedule.next_copy() is None
    assert schedule.enter(0) is Entry.MISSING


def test_a_dropped_copy_is_a_miss() -> None:
    schedule = Schedule([0, 1], [range(1), range(1, 2)])
    schedule.hold(0)
    schedule.drop(0)
    assert schedule.enter(0) is Entry.MISSING


def test_what_is_out_of_date_is_forgotten() -> None:
    schedule = Schedule([0, 1], [range(1), range(1, 2)])
    schedule.hold(0)
    schedule.hold(1)
    schedule.forget()
    assert schedule.held == ()
    assert schedule.enter(1) is Entry.MISSING


def test_an_interrupted_step_is_not_learned() -> None:
    schedule = Schedule([0, 1, 2], [range(number, number + 1) for number in range(3)])
    schedule.enter(2)
    schedule.leave(2)
    schedule.end_step(completed=False)
    assert schedule.order == [0, 1, 2]
    assert schedule.upcoming(3) == [0, 1, 2]
