"""Runs a few threads in all orders of their operations on what they share, up to a number of preemptions.

A thread runs until it comes to such an operation (:meth:`Schedule.point`), and goes on when it is chosen. A run is a
list of choices; the next one differs from it in its last choice that has an alternative left. A switch away from a
thread that could have gone on is a preemption: nearly all errors of concurrency show with two or three of them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any


class Deadlock(AssertionError):
    """No thread can go on."""


def _always() -> bool:
    return True


def _shut() -> threading.Lock:
    """A lock that opens when somebody releases it."""
    lock = threading.Lock()
    lock.acquire()
    return lock


class Schedule:
    """One run of ``programs``, each a thread's.

    Args:
        prefix: choices that are made; from then on the thread that runs goes on while it can.
    """

    def __init__(self, programs: list[Callable[[], None]], prefix: list[int]) -> None:
        self.choices: list[int] = []
        self._options: list[list[int]] = []
        self._prefix = prefix
        self._turn = [_shut() for _ in programs]
        self._over = _shut()
        self._may_run: list[Callable[[], bool]] = [_always for _ in programs]
        self._ended = [False for _ in programs]
        self._errors: list[BaseException] = []
        self._numbers: dict[int, int] = {}
        self._threads = [
            threading.Thread(target=self._run, args=(number, program), daemon=True)
            for number, program in enumerate(programs)
        ]

    def _run(self, number: int, program: Callable[[], None]) -> None:
        self._numbers[threading.get_ident()] = number
        self._turn[number].acquire()
        try:
            program()
        except BaseException as error:
            self._errors.append(error)
        self._ended[number] = True
        chosen = None
        try:
            chosen = self._choose()
        except BaseException as error:
            self._errors.append(error)
        self._wake(chosen)

    def point(self, may_run: Callable[[], bool] = _always) -> None:
        """Before an operation on what is shared: go on when it is this thread's turn, and ``may_run``."""
        number = self._numbers.get(threading.get_ident())
        if number is None:
            return  # The test's own thread, before or after.
        self._may_run[number] = may_run
        chosen = self._choose()
        if chosen != number:
            self._wake(chosen)
            self._turn[number].acquire()

    def run(self) -> None:
        for thread in self._threads:
            thread.start()
        self._wake(self._choose())
        self._over.acquire()
        if self._errors:
            raise self._errors[0]
        if not all(self._ended):
            raise Deadlock(f"after {self.choices}")
        for thread in self._threads:
            thread.join()

    def _choose(self) -> int | None:
        """Who goes on, chosen by the thread that ran until now; None where nobody can."""
        options = [n for n, ended in enumerate(self._ended) if not ended and self._may_run[n]()]
        if not options:
            return None
        # Who runs goes on, if nothing else is chosen.
        if self.choices and self.choices[-1] in options:
            options.remove(self.choices[-1])
            options.insert(0, self.choices[-1])
        step = len(self.choices)
        chosen = self._prefix[step] if step < len(self._prefix) else options[0]
        self.choices.append(chosen)
        self._options.append(options)
        self._may_run[chosen] = _always
        return chosen

    def _wake(self, chosen: int | None) -> None:
        (self._over if chosen is None else self._turn[chosen]).release()

    def next_prefix(self, preemptions: int) -> list[int] | None:
        """The choices of the next run that was not made yet; None when there is none."""
        for step in reversed(range(len(self.choices))):
            options = self._options[step]
            for other in options[options.index(self.choices[step]) + 1 :]:
                prefix = [*self.choices[:step], other]
                if self._preemptions(prefix) <= preemptions:
                    return prefix
        return None

    def _preemptions(self, choices: list[int]) -> int:
        later = zip(choices, choices[1:], self._options[1:], strict=False)
        return sum(before != chosen and before in options for before, chosen, options in later)


class SharedDeque:
    """A deque whose operations are points."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._items: deque[Any] = deque()

    def append(self, item: Any) -> None:
        self._schedule.point()
        self._items.append(item)

    def popleft(self) -> Any:
        self._schedule.point()
        return self._items.popleft()

    def __getitem__(self, index: int) -> Any:
        self._schedule.point()
        return self._items[index]

    def __len__(self) -> int:
        return len(self._items)


class SharedLock:
    """A lock whose operations are points."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._held = False

    def acquire(self, blocking: bool = True) -> bool:
        self._schedule.point(lambda: not (blocking and self._held))
        if self._held:
            return False
        self._held = True
        return True

    def release(self) -> None:
        self._schedule.point()
        self._held = False

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()


def all_runs(make: Callable[[list[int]], Schedule], preemptions: int) -> Iterator[Schedule]:
    """Run what ``make`` gives for a prefix, in all orders."""
    prefix: list[int] | None = []
    while prefix is not None:
        schedule = make(prefix)
        schedule.run()
        yield schedule
        prefix = schedule.next_prefix(preemptions)
