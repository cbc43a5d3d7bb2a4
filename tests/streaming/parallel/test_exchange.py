"""Rows of several devices are put together in order, and every wait for them is needed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from accesses import Accesses, RaceError
from race import RaceBackend
from weightstream.streaming import CpuBackend, VirtualMemory
from weightstream.streaming.parallel import exchange as exchanges
from weightstream.streaming.parallel.exchange import Exchange, Wires
from weightstream.streaming.parallel.relay import HeldUpError, Relay, Workers
from weightstream.streaming.split.links import Links

WORKERS = Workers()
COUNTS = [[3, 1, 2], [2, 5, 1]]


def run(backends: Sequence[Any], call: Callable[[int, Exchange], Any]) -> list[Any]:
    relay = Relay(range(len(backends)))
    exchange = Exchange(Wires(backends, Links()), relay)
    return relay.run([lambda me=me: call(me, exchange) for me in range(len(backends))], WORKERS)


def virtual(count: int) -> list[CpuBackend]:
    return [CpuBackend(VirtualMemory(1, f"gpu:{number}")) for number in range(count)]


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
@pytest.mark.parametrize("inference", [False, True])
def test_rows_come_in_the_order_of_parts_and_devices(dim: int, inference: bool) -> None:
    shape = [2, 3, 2, 3]
    parts = []
    for counts in COUNTS:
        shape[dim] = sum(counts)
        parts.append(torch.randn(shape))
    whole = torch.cat(parts, dim)

    def call(me: int, exchange: Exchange) -> list[torch.Tensor]:
        own = [part.split(counts, dim)[me] for part, counts in zip(parts, COUNTS, strict=True)]
        rows = torch.cat(own, dim)
        found = exchange.gather(me, "block", [rows, rows * 2], dim, COUNTS)
        exchange.finish(me)
        return found

    with torch.inference_mode(inference):
        for one, double in run(virtual(3), call):
            assert torch.equal(one, whole)
            assert torch.equal(double, whole * 2)


@pytest.mark.parametrize("other", [("another", 1, [[1, 1]]), ("block", 2, [[1, 1]]), ("block", 1, [[1, 2]])])
def test_what_does_not_belong_together_is_refused(other: tuple[str, int, list[list[int]]]) -> None:
    def call(me: int, exchange: Exchange) -> None:
        label, tensors, lengths = ("block", 1, [[1, 1]]) if me == 0 else other
        exchange.gather(me, label, [torch.ones(1, lengths[0][me])] * tensors, 1, lengths)

    with pytest.raises(HeldUpError, match="the same block"):
        run(virtual(2), call)


def test_a_device_that_exchanges_once_more_is_refused() -> None:
    def call(me: int, exchange: Exchange) -> None:
        for _ in range(1 + me):
            exchange.gather(me, "block", [torch.ones(1, 1)], 1, [[1, 1]])
        exchange.finish(me)

    with pytest.raises(HeldUpError):
        run(virtual(2), call)


# -- every wait is needed ----------------------------------------------------------------------------------------------


def run_watched(monkeypatch: pytest.MonkeyPatch, turns: int = 4) -> None:
    """Two devices that exchange, whose kernels use rows, what is put together, and memory that is used again.

    Raises:
        RaceError: two accesses that nothing orders.
    """
    accesses = Accesses()
    backends = [RaceBackend(accesses, f"compute {number}") for number in range(2)]
    memory: dict[int, torch.Tensor] = {}

    def reused(tensor: torch.Tensor, dim: int, length: int) -> torch.Tensor:
        """As a device's allocator does: memory that its kernels have used, and may be using."""
        return memory.setdefault(threading.get_ident(), torch.zeros(1, length))

    monkeypatch.setattr(exchanges, "_of_length", reused)

    def call(me: int, exchange: Exchange) -> None:
        rows = [torch.zeros(1, 32) for _ in range(2)]
        for turn in range(turns):
            mine = rows[turn % 2]
            backends[me].write(mine)
            (whole,) = exchange.gather(me, turn, [mine], 1, [[32, 32]])
            backends[me].read(whole)
        exchange.finish(me)
        for mine in rows:
            backends[me].write(mine)

    run(backends, call)


def test_nothing_races(monkeypatch: pytest.MonkeyPatch) -> None:
    run_watched(monkeypatch)


def without_wait_for(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copy, wait, retire = Wires.copy, RaceBackend.wait, Exchange._retire
    nothing: dict[Any, int] = {}
    retiring: list[bool] = []

    def copy_early(self: Wires, target: int, source: int, pairs: Any, made: Any, free: Any) -> Any:
        made, free = (nothing if what == "made" else made), (nothing if what == "free" else free)
        return copy(self, target, source, pairs, made, free)

    def wait_unless(self: RaceBackend, event: Any) -> Any:
        if what == ("taken" if retiring else "done"):
            return None
        return wait(self, event)

    def retire_noted(self: Exchange, me: int) -> None:
        retiring.append(True)
        try:
            retire(self, me)
        finally:
            retiring.pop()

    monkeypatch.setattr(Wires, "copy", copy_early)
    monkeypatch.setattr(RaceBackend, "wait", wait_unless)
    monkeypatch.setattr(Exchange, "_retire", retire_noted)


@pytest.mark.parametrize("wait", ["made", "free", "done", "taken"])
def test_each_wait_is_needed(monkeypatch: pytest.MonkeyPatch, wait: str) -> None:
    without_wait_for(wait, monkeypatch)
    with pytest.raises(RaceError):
        run_watched(monkeypatch)
