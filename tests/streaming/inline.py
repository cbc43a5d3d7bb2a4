"""Executors without threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import cache, partial
from typing import Any


class InlineExecutor:
    """Does what it is given at once, on this thread: who hands memory over has seen all that was done with it."""

    def __init__(self, *args: object) -> None:
        pass

    def submit(self, function: Callable[..., Any], *args: Any) -> Future:
        done: Future = Future()
        done.set_result(function(*args))
        return done

    def shutdown(self, **options: object) -> None:
        pass


class LazyExecutor(InlineExecutor):
    """Does what it is given when somebody waits for it."""

    def submit(self, function: Callable[..., Any], *args: Any) -> LazyFuture:
        return LazyFuture(function, *args)


class LazyFuture:
    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.result = cache(partial(function, *args))
