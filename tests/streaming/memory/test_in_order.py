"""What several threads finish is handed on in order, once, by one of them at a time, and never forgotten."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from schedules import Schedule, SharedDeque, SharedLock, all_runs
from weightstream.streaming.memory.in_order import InOrder


class Item:
    """Its mark is shared between threads."""

    def __init__(self, number: int, schedule: Schedule) -> None:
        self.number = number
        self._schedule = schedule
        self._ready = False

    @property
    def ready(self) -> bool:
        self._schedule.point()
        return self._ready

    @ready.setter
    def ready(self, ready: bool) -> None:
        self._schedule.point()
        self._ready = ready


class Run:
    """Threads that finish items, each its own one after another, and some that pause everything.

    Attributes:
        handed: numbers of the items that were handed on, in batches.
    """

    def __init__(self, prefix: list[int], finish: list[list[int]], pauses: int, looks_again: bool = True) -> None:
        self.handed: list[list[int]] = []
        self.paused = 0
        self._inside = False
        programs = [self._finishing(numbers) for numbers in finish] + [self._pausing] * pauses
        self.schedule = Schedule(programs, prefix)
        self.order = InOrder(lambda first, second: first.number // 2 == second.number // 2)
        self.order._items = SharedDeque(self.schedule)
        self.order._handing_on = SharedLock(self.schedule)
        self.items = [Item(number, self.schedule) for number in range(sum(map(len, finish)))]
        for item in self.items:
            self.order.begin(item)
        if not looks_again:
            self.order.pause = lambda hand_on: self.order._handing_on

    def _finishing(self, numbers: list[int]) -> Callable[[], None]:
        def program() -> None:
            for number in numbers:
                self.order.finish(self.items[number], self._hand_on)

        return program

    def _pausing(self) -> None:
        with self.order.pause(self._hand_on):
            before = len(self.handed)
            self.schedule.point()
            assert len(self.handed) == before, "handed on in a pause"
            self.paused += 1

    def _hand_on(self, items: list[Item]) -> None:
        assert not self._inside, "two threads hand on"
        self._inside = True
        self.schedule.point()
        self.handed.append([item.number for item in items])
        self._inside = False

    def check(self, pauses: int) -> None:
        assert [number for batch in self.handed for number in batch] == list(range(len(self.items)))
        assert all(len({number // 2 for number in batch}) == 1 for batch in self.handed)
        assert self.paused == pauses


@pytest.mark.slow
@pytest.mark.parametrize(
    ("finish", "pauses", "preemptions"),
    [
        ([[0], [1]], 0, 3),
        ([[1], [0]], 0, 3),
        ([[0, 2], [1]], 0, 2),
        ([[1, 2], [0]], 0, 2),
        ([[0, 3], [1, 2]], 0, 2),
        ([[2], [1], [0]], 0, 2),
        ([[0], [1], [2]], 0, 2),
        ([[0]], 1, 4),
        ([[0], [1]], 1, 2),
        ([[1], [0]], 1, 2),
        ([[0, 1]], 2, 1),
    ],
)
def test_every_order_of_operations(finish: list[list[int]], pauses: int, preemptions: int) -> None:
    runs: list[Run] = []

    def make(prefix: list[int]) -> Schedule:
        runs[:] = [Run(prefix, finish, pauses)]
        return runs[0].schedule

    count, batches = 0, set()
    for _ in all_runs(make, preemptions):
        runs[0].check(pauses)
        count += 1
        batches.add(str(runs[0].handed))
    assert count > 100
    assert len(batches) > 1 or len(runs[0].items) == 1, "items that belong together go together at times"


def test_all_orders_show_who_does_not_look_again() -> None:
    """As if a pause were the lock alone."""
    runs: list[Run] = []

    def make(prefix: list[int]) -> Schedule:
        runs[:] = [Run(prefix, [[0]], 1, looks_again=False)]
        return runs[0].schedule

    assert any(not runs[0].handed for _ in all_runs(make, 2))
