from __future__ import annotations

import itertools

import pytest
from weightstream.streaming import RingExhaustedError, Schedule


class Slots:
    """What a device would hold if it did as the schedule says; refuses to touch a slot that is in use."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.content: dict[int, int] = {}
        self.used: set[int] = set()
        self.misses = 0
        self.prefetch()

    def run(self, block: int) -> None:
        slot, hit = self.schedule.enter(block)
        if hit:
            assert self.content[slot] == block, "a hit on a slot that holds another block"
        else:
            self.misses += 1
            assert slot not in self.used
            self.content[slot] = block
        self.used.add(slot)
        self.prefetch()  # Prefetching while a block runs must not take its slot.
        assert self.content[slot] == block
        self.used.discard(slot)
        self.schedule.leave(slot)
        self.prefetch()

    def prefetch(self) -> None:
        while (copy := self.schedule.next_copy()) is not None:
            assert copy.slot not in self.used, "a slot is overwritten while a block runs in it"
            self.content[copy.slot] = copy.segment
        copies = list(self.content.values())
        assert len(copies) == len(set(copies)), "a block is held twice"

    def step(self, order: list[int]) -> int:
        before = self.misses
        for block in order:
            self.run(block)
        self.schedule.end_step(completed=True)
        return self.misses - before


@pytest.mark.parametrize("slots", range(1, 6))
@pytest.mark.parametrize("blocks", range(1, 10))
def test_a_constant_order_never_misses(blocks: int, slots: int) -> None:
    for streamed in range(1, 2**blocks):
        order = [block for block in range(blocks) if streamed >> block & 1]
        device = Slots(Schedule(order, slots, lookahead=slots))
        assert sum(device.step(order) for _ in range(3)) == 0


@pytest.mark.parametrize("slots", range(1, 6))
@pytest.mark.parametrize("blocks", range(1, 10))
def test_skipped_blocks_cost_time_at_most(blocks: int, slots: int) -> None:
    everything = list(range(blocks))
    for chosen in range(2**blocks):
        some = [block for block in everything if chosen >> block & 1]
        device = Slots(Schedule(everything, slots, lookahead=slots))
        device.step(everything)
        device.step(some)
        device.step(everything)
        assert device.step(everything) <= 1, "the schedule has not healed"


@pytest.mark.parametrize("slots", range(1, 6))
@pytest.mark.parametrize("blocks", range(1, 6))
def test_any_order_runs_the_right_blocks(blocks: int, slots: int) -> None:
    for length in range(1, 5):
        for order in itertools.product(range(blocks), repeat=length):
            device = Slots(Schedule(range(blocks), slots, lookahead=slots))
            device.step(list(order))
            device.step(list(range(blocks)))
            device.step(list(order))


def test_repeated_blocks_are_learned() -> None:
    order = [0, 1, 1, 2, 0, 3, 2]
    device = Slots(Schedule(range(4), 2, lookahead=2))
    device.step(order)
    device.step(order)
    assert device.step(order) == 0


def test_the_end_of_a_step_asks_for_its_start() -> None:
    schedule = Schedule([3, 5, 8], 2, lookahead=2)
    device = Slots(schedule)
    device.step([3, 5, 8])
    assert set(device.content.values()) == {3, 5}


def test_the_most_urgent_block_is_copied_first() -> None:
    schedule = Schedule([4, 2, 9], 3, lookahead=3)
    copies = [schedule.next_copy() for _ in range(4)]
    assert [copy.segment for copy in copies[:3] if copy] == [4, 2, 9]
    assert copies[3] is None


def test_no_lookahead_copies_nothing_ahead() -> None:
    schedule = Schedule([0, 1], 1, lookahead=0)
    assert schedule.next_copy() is None
    assert not schedule.enter(0).hit


def test_a_dropped_copy_is_a_miss() -> None:
    schedule = Schedule([0, 1], 2, lookahead=2)
    copy = schedule.next_copy()
    assert copy is not None
    schedule.drop(copy.slot)
    assert not schedule.enter(0).hit


def test_an_interrupted_step_is_not_learned() -> None:
    schedule = Schedule([0, 1, 2], 2, lookahead=2)
    schedule.leave(schedule.enter(2).slot)
    schedule.end_step(completed=False)
    assert schedule.order == [0, 1, 2]
    assert schedule.upcoming(3) == [0, 1, 2]


def test_more_nested_blocks_than_slots_are_refused() -> None:
    schedule = Schedule([0, 1, 2], 2, lookahead=2)
    schedule.enter(0)
    schedule.enter(1)
    with pytest.raises(RingExhaustedError, match="2 staging slots"):
        schedule.enter(2)
