"""Hands on what several threads finish, in the order in which it was begun, on one of these threads at a time.

[Note: who hands on]
A thread that has finished an item hands on all finished items that are next in order. Only one thread does so at a
time: the one that holds the lock ``_handing_on``. A thread that finishes an item meanwhile does not wait: it returns,
and the holder looks once more after it has released the lock. So does every thread that has held the lock, whatever for
(:meth:`InOrder.pause`). No item is forgotten: a thread marks its item as finished before it tries to take the lock. If
it cannot take the lock, the holder has not released it yet, and so looks after the mark was made. ``test_in_order.py``
tries all orders of these few operations.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar


class Item(Protocol):
    """What is handed on.

    Attributes:
        ready: it is finished.
    """

    ready: bool


T = TypeVar("T", bound=Item)


class InOrder(Generic[T]):
    """Items that are begun and not handed on yet.

    ``finish`` and ``pause`` take ``hand_on``, which is called with the items that are next, in their order, and must
    not raise. It is not kept: a method of the owner's would keep the owner alive.

    Args:
        belongs: whether the second of two items that follow each other may be handed on together with the first.
    """

    def __init__(self, belongs: Callable[[T, T], bool]) -> None:
        self._belongs = belongs
        self._items: deque[T] = deque()
        # Reentrant for wait_a_moment: the garbage collector may call that on the thread that is handing on.
        self._handing_on = threading.RLock()

    def begin(self, item: T) -> None:
        """``item`` is next in order. The caller ensures that no two threads call this at once."""
        self._items.append(item)

    def finish(self, item: T, hand_on: Callable[[list[T]], None]) -> None:
        """``item`` is finished: it is handed on now, by the thread that is handing on, or after the items before it."""
        item.ready = True
        self._hand_on_what_is_ready(hand_on)

    @contextmanager
    def pause(self, hand_on: Callable[[list[T]], None]) -> Iterator[None]:
        """While this lasts no other thread hands anything on."""
        try:
            with self._handing_on:
                yield
        finally:
            self._hand_on_what_is_ready(hand_on)

    def wait_a_moment(self, seconds: float) -> None:
        """Wait until another thread has handed on what it is handing on, for at most ``seconds``."""
        if self._handing_on.acquire(timeout=seconds):
            self._handing_on.release()

    def _hand_on_what_is_ready(self, hand_on: Callable[[list[T]], None]) -> None:
        while self._first_ready() is not None:
            if not self._handing_on.acquire(blocking=False):
                return
            try:
                while self._first_ready() is not None:
                    hand_on(self._next())
            finally:
                self._handing_on.release()

    def _next(self) -> list[T]:
        items = [self._items.popleft()]
        while (item := self._first_ready()) is not None and self._belongs(items[-1], item):
            items.append(self._items.popleft())
        return items

    def _first_ready(self) -> T | None:
        try:
            item = self._items[0]
        except IndexError:  # Without the lock: the thread that holds it may have taken the last item.
            return None
        return item if item.ready else None
