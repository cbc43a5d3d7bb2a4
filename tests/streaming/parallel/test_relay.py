"""Calls that take turns: one runs at a time, what one raises ends all, and nobody waits for ever."""

from __future__ import annotations

import contextlib
import contextvars
import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import pytest
import torch
from weightstream.streaming.parallel import relay as relays
from weightstream.streaming.parallel.relay import HeldUpError, Relay, Workers


@pytest.fixture(scope="module")
def workers() -> Workers:
    return Workers()


class Watched:
    """Notes who runs, and fails if two do."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self._running = threading.Lock()

    def runs(self, what: str) -> None:
        assert self._running.acquire(blocking=False), "two calls run at once"
        self.order.append(what)
        self._running.release()


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_one_runs_at_a_time_and_each_gets_what_the_others_bring(workers: Workers, count: int) -> None:
    relay, watched = Relay(range(count)), Watched()
    brought = [[0] * 4 for _ in range(count)]

    def call(me: int) -> Callable[[], int]:
        def run() -> int:
            for turn in range(4):
                watched.runs(f"{me} {turn}")
                brought[me][turn] = 1
                relay.until(me, lambda turn=turn: all(each[turn] for each in brought))
            return me

        return run

    assert relay.run([call(me) for me in range(count)], workers) == list(range(count))
    assert sorted(watched.order) == sorted(f"{me} {turn}" for me in range(count) for turn in range(4))
    again = Watched()
    first, watched = watched.order, again
    brought = [[0] * 4 for _ in range(count)]
    relay = Relay(range(count))
    relay.run([call(me) for me in range(count)], workers)
    assert again.order == first, "the order is always the same"
    assert first[:count] == [f"{me} 0" for me in range(count)], "it is that of their numbers"


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_what_one_raises_ends_all(workers: Workers, failing: int, kind: type[BaseException]) -> None:
    relay, ended = Relay(range(3)), []

    def call(me: int) -> Callable[[], None]:
        def run() -> None:
            try:
                relay.until(me, lambda: True)
                if me == failing:
                    raise kind("broken")
                relay.until(me, lambda: False)
            except HeldUpError:
                ended.append(me)
                raise

        return run

    with pytest.raises(kind, match="broken"):
        relay.run([call(me) for me in range(3)], workers)
    assert failing not in ended
    assert Relay(range(2)).run([lambda: 1, lambda: 2], workers) == [1, 2], "its threads are free again"


def test_who_waits_for_what_nobody_brings_is_told(workers: Workers) -> None:
    relay = Relay(range(2))
    with pytest.raises(HeldUpError, match="do not run the same blocks"):
        relay.run([lambda: relay.until(0, lambda: False), lambda: None], workers)
    relay = Relay(range(2))
    with pytest.raises(HeldUpError, match="do not run the same blocks"):
        relay.run([lambda: None, lambda: relay.until(1, lambda: False)], workers)


def test_a_run_inside_of_another_has_threads_of_its_own(workers: Workers) -> None:
    def call(depth: int) -> int:
        return depth and sum(Relay(range(2)).run([lambda: call(depth - 1), lambda: 1], workers))

    assert Relay(range(2)).run([lambda: call(3), lambda: call(2)], workers) == [3, 2]


def test_a_thread_that_cannot_be_had_ends_the_run(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    made, given = relays._make_thread, []

    def make() -> ThreadPoolExecutor:
        thread = made()
        if given:
            thread.shutdown()
        given.append(thread)
        return thread

    monkeypatch.setattr(relays, "_make_thread", make)
    ran: list[int] = []
    with pytest.raises(RuntimeError, match="cannot schedule"):
        Relay(range(4)).run([lambda number=number: ran.append(number) for number in range(4)], Workers())
    assert ran == []
    assert len(given) == 3


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_keeps_nothing_alive_once_it_is_handled(workers: Workers, failing: int) -> None:
    """The memory of what calls have computed is needed at once, for the step on one device."""
    kept: list[weakref.ref[torch.Tensor]] = []
    relay = Relay(range(2))

    def call(me: int) -> None:
        computed = torch.zeros(4)
        kept.append(weakref.ref(computed))
        if me == failing:
            raise ValueError("broken")
        relay.until(me, lambda: False)

    gc.disable()
    try:
        with contextlib.suppress(ValueError):
            relay.run([lambda me=me: call(me) for me in range(2)], workers)
        assert [reference() for reference in kept if reference() is not None] == []
    finally:
        gc.enable()
    assert kept


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_threads_have_the_modes_of_the_caller(workers: Workers, inference: bool, grad: bool) -> None:
    def modes() -> tuple[bool, bool]:
        return torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    with torch.inference_mode(inference), torch.set_grad_enabled(grad):
        mine, others = Relay(range(2)).run([modes, modes], workers)
    assert mine == others


def test_threads_have_the_context_of_the_caller(workers: Workers) -> None:
    """As of the node that runs, which ComfyUI keeps there. What a call sets is its own."""
    node = contextvars.ContextVar("node", default="none")

    def call() -> str:
        found = node.get()
        node.set("changed")
        return found

    def run() -> tuple[list[str], str]:
        node.set("sampler")
        return Relay(range(3)).run([node.get, call, call], workers), node.get()

    assert contextvars.copy_context().run(run) == (["sampler"] * 3, "sampler")


def test_what_has_not_begun_when_one_fails_does_not_begin(workers: Workers) -> None:
    begun: list[int] = []

    def fail() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        Relay(range(2)).run([fail, lambda: begun.append(1)], workers)
    assert begun == []


TURNS = 3
PLACES = [(me, turn) for me in range(3) for turn in range(TURNS)]


@pytest.mark.parametrize("places", [*combinations(PLACES, 1), *combinations(PLACES, 2)], ids=str)
def test_all_begin_again_where_one_does(workers: Workers, places: tuple[tuple[int, int], ...]) -> None:
    """One or two calls begin again, each once and at any turn."""
    relay, left, watched = Relay(range(3)), set(places), Watched()
    brought: list[list[int]] = [[], [], []]
    forgotten: list[list[int]] = []
    begins = [0, 0, 0]

    def forget() -> None:
        forgotten.append([len(each) for each in brought])
        for each in brought:
            each.clear()

    relay.on_again = forget

    def call(me: int) -> tuple[int, list[list[int]]]:
        begins[me] += 1
        while True:
            seen = []
            for turn in range(TURNS):
                if (me, turn) in left:
                    left.remove((me, turn))
                    relay.begin_again(me)
                    break
                watched.runs(f"{me} {turn}")
                brought[me].append(turn)
                relay.until(me, lambda turn=turn: all(len(each) > turn for each in brought))
                seen.append([each[turn] for each in brought])
            else:
                return me, seen

    expected = [(me, [[turn] * 3 for turn in range(TURNS)]) for me in range(3)]
    calls = [lambda me=me: call(me) for me in range(3)]
    assert relay.run(calls, workers) == expected
    assert left == set()
    assert 1 <= len(forgotten) <= len(places)
    assert sum(begins) > 3, "others are called once more"


def test_a_call_that_is_ended_to_begin_again_keeps_nothing_alive(workers: Workers) -> None:
    """While it waits for the others: the memory may be what one of them lacks."""
    relay, kept = Relay(range(2)), []

    def second() -> None:
        if kept:
            return
        computed = torch.zeros(4)
        kept.append(weakref.ref(computed))
        relay.until(1, lambda: False)

    def first() -> None:
        relay.until(0, lambda: bool(kept))
        relay.begin_again(0)

    relay.on_again = lambda: kept.append(kept[0]())
    gc.disable()
    try:
        relay.run([first, second], workers)
    finally:
        gc.enable()
    assert kept[1] is None


def test_a_call_that_begins_again_when_another_has_ended_is_told(workers: Workers) -> None:
    with pytest.raises(HeldUpError, match="begun the step again when another had ended"):
        (relay := Relay(range(2))).run([lambda: None, lambda: relay.begin_again(1)], workers)


def test_a_call_that_always_begins_again_is_told(workers: Workers) -> None:
    relay, begins = Relay(range(2)), []

    def first() -> None:
        for _ in range(4 * relays.MOST_BEGINS):
            relay.begin_again(0)

    def second() -> None:
        begins.append(1)
        relay.until(1, lambda: False)

    with pytest.raises(HeldUpError, match="begun the step again too often"):
        relay.run([first, second], workers)
    assert len(begins) == 1 + 2 * relays.MOST_BEGINS


def test_a_call_begins_again_while_others_still_wait_for_the_begin_before(workers: Workers) -> None:
    relay, brought, calls = Relay(range(3)), [False] * 3, [0] * 3
    relay.on_again = lambda: brought.__setitem__(slice(None), [False] * 3)

    def call(me: int) -> int:
        calls[me] += 1
        if (me, calls[me]) in {(0, 1), (2, 2)}:
            relay.begin_again(me)
        brought[me] = True
        relay.until(me, lambda: all(brought))
        return me

    assert relay.run([lambda me=me: call(me) for me in range(3)], workers) == [0, 1, 2]
    assert calls == [2, 2, 2], "the second call waits for both begins, and the first is ended where it waits"


@pytest.mark.parametrize("count", [2, 4, 8])
def test_each_device_may_find_out_what_it_can_do_without(workers: Workers, count: int) -> None:
    """As where the steps of a run need more than those before, on GPUs that are alike."""
    relay, left, brought = Relay(range(count)), [4] * count, [False] * count
    relay.on_again = lambda: brought.__setitem__(slice(None), [False] * count)

    def call(me: int) -> int:
        while left[me]:
            left[me] -= 1
            relay.begin_again(me)
        brought[me] = True
        relay.until(me, lambda: all(brought))
        return me

    assert relay.run([lambda me=me: call(me) for me in range(count)], workers) == list(range(count))
    assert left == [0] * count


def test_two_calls_may_be_in_the_middle_of_what_begins_again(workers: Workers) -> None:
    """Each goes on where it was: what it has found out about the memory that it lacks is not lost."""
    relay, begins = Relay(range(2)), [0, 0]

    def call(me: int) -> None:
        begins[me] += 1
        relay.begin_again(me)

    relay.run([lambda me=me: call(me) for me in range(2)], workers)
    assert begins == [1, 1]


def test_an_error_where_all_begin_again_ends_all(workers: Workers) -> None:
    relay = Relay(range(2))
    relay.on_again = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        relay.run([lambda: relay.begin_again(0), lambda: relay.until(1, lambda: False)], workers)


def test_threads_are_kept(workers: Workers) -> None:
    found = [Relay(range(3)).run([threading.get_ident] * 3, workers) for _ in range(2)]
    assert found[0] == found[1]
    assert len(set(found[0])) == 3
    assert found[0][0] == threading.get_ident()
