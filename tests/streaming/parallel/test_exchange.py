"""Rows of several devices are put together in order, and every wait for them is needed."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import count, product
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


def run(backends: Sequence[Any], call: Callable[[int, Exchange], Any], links: Links | None = None) -> list[Any]:
    relay = Relay(range(len(backends)))
    exchange = Exchange(Wires(backends, links or Links()), relay)
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


@pytest.mark.parametrize("dim", [1, 2])
def test_rows_that_go_through_the_host_arrive(monkeypatch: pytest.MonkeyPatch, dim: int) -> None:
    """With all memory of the host for one block, whatever its strides and dtype are; more of it for a larger one."""
    monkeypatch.setattr(Wires, "_is_direct", lambda *_: False)
    sizes = [3, 3, 8, 2, 8]
    blocks = [torch.randn(2, 4 * size, 4 * size, 3).to(torch.float16).permute(0, 2, 1, 3) for size in sizes]
    backends = virtual(2)
    wires = Wires(backends, Links())
    relay = Relay(range(2))
    exchange = Exchange(wires, relay)

    def call(me: int) -> list[torch.Tensor]:
        found = []
        for number, block in enumerate(blocks):
            rows = block.chunk(2, dim)[me]
            half = rows.shape[dim]
            found += exchange.gather(me, number, [rows, rows.float()], dim, [[half, half]])
        exchange.finish(me)
        return found

    for found in relay.run([lambda me=me: call(me) for me in range(2)], WORKERS):
        for block, (one, other) in zip(blocks, zip(found[::2], found[1::2], strict=True), strict=True):
            assert torch.equal(one, block)
            assert torch.equal(other, block.float())
    assert len(wires._stages) == 2


@pytest.mark.parametrize("direct", [False, True])
def test_copies_of_rows_do_not_count_as_copies_of_weights(monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    """The planner would take the links between devices for those to the host."""
    monkeypatch.setattr(Wires, "_is_direct", lambda *_: direct)
    backends = virtual(2)
    relay = Relay(range(2))
    exchange = Exchange(Wires(backends, Links()), relay)
    for backend in backends:
        backend.time_copies()

    def call(me: int) -> None:
        exchange.gather(me, "block", [torch.ones(1, 4)], 1, [[4, 4]])
        exchange.finish(me)
        backends[me].copy([(torch.zeros(8), torch.ones(8))])

    relay.run([lambda me=me: call(me) for me in range(2)], WORKERS)
    for backend in backends:
        backend.synchronize()
        assert [time.nbytes for time in backend.copy_times()] == [32]


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


def test_rows_are_let_go_when_all_others_have_queued_their_copies() -> None:
    left: dict[int, list[list[bool]]] = {0: [], 1: []}

    def call(me: int, exchange: Exchange) -> None:
        kept = []
        for turn in range(3):
            rows = torch.zeros(1, 4)
            kept.append(weakref.ref(rows))
            exchange.gather(me, turn, [rows], 1, [[4, 4]])
            del rows
        left[me].append([each() is not None for each in kept])
        exchange.finish(me)
        left[me].append([each() is not None for each in kept])

    run([RaceBackend(compute=f"compute {number}") for number in range(2)], call)
    # The first device posts again before the other, whose turn it is then, has queued its copies.
    assert left == {0: [[False, True, True], [False] * 3], 1: [[False, False, True], [False] * 3]}


def test_rows_are_let_go_of_in_a_step_that_has_begun_again_too() -> None:
    begun: list[bool] = []
    left: dict[int, list[bool]] = {}

    def call(me: int, exchange: Exchange) -> None:
        kept = []
        for turn in range(4):
            if me == 0 and turn == 3 and not begun:
                begun.append(True)
                exchange.begin_again(me)
                return call(me, exchange)
            rows = torch.zeros(1, 4)
            kept.append(weakref.ref(rows))
            exchange.gather(me, turn, [rows], 1, [[4, 4]])
            del rows
        left[me] = [each() is not None for each in kept[:2]]
        exchange.finish(me)

    run([RaceBackend(compute=f"compute {number}") for number in range(2)], call)
    assert begun == [True]
    assert left == {0: [False, False], 1: [False, False]}


def test_copies_out_of_a_device_pass_by_its_compute() -> None:
    passing: list[str] = []
    copied: list[tuple[str, list[str]]] = []

    class Passing(RaceBackend):
        @contextmanager
        def passing_on(self) -> Iterator[None]:
            passing.append(self.compute)
            yield
            passing.remove(self.compute)

        def copy_on(self, *args: Any, **named: Any) -> Any:
            copied.append((self.compute, list(passing)))
            return super().copy_on(*args, **named)

    def call(me: int, exchange: Exchange) -> None:
        exchange.gather(me, "block", [torch.zeros(1, 4)], 1, [[4, 4]])
        exchange.finish(me)

    run([Passing(compute=name) for name in ("one", "other")], call)
    assert sorted(copied) == [("one", ["other"]), ("other", ["one"])]


# -- every wait is needed ----------------------------------------------------------------------------------------------


class Unsound(Links):
    """No device reaches the memory of another."""

    def is_sound(self, source: torch.device, target: torch.device) -> bool:
        return False


def run_watched(monkeypatch: pytest.MonkeyPatch, links: Links | None = None, turns: int = 4) -> None:
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
    if links is not None:
        for number, backend in enumerate(backends):
            backend.device = torch.device("cuda", number)

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

    run(backends, call, links)


def test_nothing_races(monkeypatch: pytest.MonkeyPatch) -> None:
    run_watched(monkeypatch)


@pytest.fixture
def page_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of the host, in the place of page-locked memory where there is no GPU."""
    empty_like = torch.empty_like

    def like(tensor: torch.Tensor, pin_memory: bool = False, **named: Any) -> torch.Tensor:
        return empty_like(tensor, **named)

    monkeypatch.setattr(torch, "empty_like", like)


@pytest.mark.usefixtures("page_locked")
@pytest.mark.parametrize("missing", ["", "made", "down", "free"])
def test_each_wait_by_way_of_the_host_is_needed(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    copy_on, calls = RaceBackend.copy_on, count()

    def copy_early(self: RaceBackend, stream: Any, pairs: Any, after: Sequence[Any], **named: Any) -> Any:
        names = ("down", "free") if next(calls) % 2 else ("made", "read")
        after = [event for name, event in zip(names, after, strict=False) if name != missing]
        return copy_on(self, stream, pairs, after, **named)

    monkeypatch.setattr(RaceBackend, "copy_on", copy_early)
    with pytest.raises(RaceError) if missing else nullcontext():
        run_watched(monkeypatch, Unsound())
    assert next(calls) > 0


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


def test_nothing_races_through_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Wires, "_is_direct", lambda *_: False)
    run_watched(monkeypatch)


def test_the_wait_for_what_was_there_before_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    like = exchanges._Stage.like

    def like_unread(self: Any, tensors: Any) -> Any:
        found = like(self, tensors)
        self.read = None
        return found

    monkeypatch.setattr(Wires, "_is_direct", lambda *_: False)
    monkeypatch.setattr(exchanges._Stage, "like", like_unread)
    with pytest.raises(RaceError):
        run_watched(monkeypatch)


@pytest.mark.parametrize(
    ("device", "turn", "waits"), [*product([0, 1], [0, 1, 2], [True]), (0, 1, False), (0, 2, False), (1, 1, False)]
)
def test_all_copies_are_over_when_the_devices_begin_again(
    monkeypatch: pytest.MonkeyPatch, device: int, turn: int, waits: bool
) -> None:
    """Rows that were posted are dropped, and their memory goes to something else."""
    accesses, known, begun = Accesses(), [], []
    backends = [RaceBackend(accesses, f"compute {number}") for number in range(2)]
    forget = Exchange._forget

    def noted(self: Exchange) -> None:
        forget(self)
        known.append(accesses.seen_by(threading.current_thread()))

    monkeypatch.setattr(Exchange, "_forget", noted)
    if not waits:
        monkeypatch.setattr(RaceBackend, "synchronize", lambda _: None)
    rows = [[torch.zeros(1, 32) for _ in range(3)] for _ in range(2)]

    def call(me: int, exchange: Exchange) -> int:
        number = 0
        while number < 3:
            if known:  # Whoever has the baton knows what the one before has waited for.
                accesses.see(threading.current_thread(), known[-1])
            if (me, number) == (device, turn) and not begun:
                begun.append(True)
                exchange.begin_again(me)
                number = 0
                continue
            mine = rows[me][number]
            backends[me].write(mine)
            (whole,) = exchange.gather(me, number, [mine], 1, [[32, 32]])
            backends[me].read(whole)
            number += 1
        exchange.finish(me)
        return number

    with nullcontext() if waits else pytest.raises(RaceError):
        assert run(backends, call) == [3, 3]
    assert begun == [True]


@pytest.mark.parametrize("wait", ["made", "free", "done", "taken"])
def test_each_wait_is_needed(monkeypatch: pytest.MonkeyPatch, wait: str) -> None:
    without_wait_for(wait, monkeypatch)
    with pytest.raises(RaceError):
        run_watched(monkeypatch)
