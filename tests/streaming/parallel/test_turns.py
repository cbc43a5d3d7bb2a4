"""Threads that take turns: one runs at a time, each gets its turn, and one that fails gives it away."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from weightstream.streaming.parallel.turns import Turns


class Watched(nn.Module):
    """A block that notes who runs it, and fails if two do."""

    def __init__(self, order: list[str], running: threading.Lock, error: BaseException | None = None) -> None:
        super().__init__()
        self._order, self._running, self._error = order, running, error

    def forward(self, who: str) -> str:
        assert self._running.acquire(blocking=False), "two run at once"
        self._order.append(who)
        self._running.release()
        if self._error is not None:
            raise self._error
        return who


def run_all(turns: Turns, calls: list[Callable[[], None]]) -> list[BaseException | None]:
    """Run each in a thread, the first of which has the turn until all others wait for theirs."""
    with ThreadPoolExecutor(len(calls)) as threads:
        turns.take()
        futures = []
        for number, call in enumerate(calls):
            futures.append(threads.submit(call))
            while len(turns._waiting) <= number:
                threading.Event().wait(0.001)
        turns.give()
        return [future.exception(60) for future in futures]


def call(turns: Turns, who: str, blocks: list[Watched]) -> Callable[[], None]:
    def forward() -> None:
        for block in blocks:
            block(who)

    return lambda: turns.run(forward, blocks)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("depth", [0, 1, 4])
def test_each_gets_one_turn_for_each_block_in_order(count: int, depth: int) -> None:
    order: list[str] = []
    turns, running = Turns(), threading.Lock()
    models = [[Watched(order, running) for _ in range(depth)] for _ in range(count)]
    calls = [call(turns, str(number), blocks) for number, blocks in enumerate(models)]
    assert run_all(turns, calls) == [None] * count
    assert order == [str(number) for number in range(count)] * depth
    assert not any(block._forward_pre_hooks for blocks in models for block in blocks)


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("kind", [ValueError, torch.OutOfMemoryError, KeyboardInterrupt])
def test_one_that_fails_gives_its_turn_away(failing: int, place: int, kind: type[BaseException]) -> None:
    order: list[str] = []
    turns, running = Turns(), threading.Lock()
    models = [
        [Watched(order, running, kind("broken") if (number, depth) == (failing, place) else None) for depth in range(3)]
        for number in range(3)
    ]
    errors = run_all(turns, [call(turns, str(number), blocks) for number, blocks in enumerate(models)])
    assert [type(error) for error in errors] == [kind if number == failing else type(None) for number in range(3)]
    assert [order.count(str(number)) for number in range(3)] == [
        place + 1 if number == failing else 3 for number in range(3)
    ]
    assert not any(block._forward_pre_hooks for blocks in models for block in blocks)
    assert run_all(turns, [call(turns, "again", models[failing - 1])]) == [None], "the turn is free"


def test_a_block_that_cannot_be_watched_takes_no_turn() -> None:
    turns = Turns()
    with pytest.raises(AttributeError):
        turns.run(lambda: None, [object()])
    assert not turns._is_taken


def test_one_that_is_alone_goes_on() -> None:
    turns = Turns()
    turns.take()
    turns.pass_on()
    turns.give()
    turns.take()
    assert turns._is_taken
