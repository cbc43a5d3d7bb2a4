"""Which prompt a GPU takes: its own first, another's where that is quicker, and none in turns that exchange models."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from weightstream.fleet.scheduling import ModelFile, Waiting, WorkerView, choose, home_of

GB = 1_000_000_000
A, B, C = (frozenset({ModelFile("diffusion_models", name, 20 * GB)}) for name in "ABC")
NOTHING: frozenset[ModelFile] = frozenset()


def prompt(number: int, files: frozenset[ModelFile] = A, *excluded: str) -> Waiting:
    return Waiting(str(number), files, frozenset(excluded))


def worker(name: str, loaded: frozenset[ModelFile] = NOTHING, busy: float | None = None) -> WorkerView:
    return WorkerView(name, busy, loaded)


def test_a_prompt_goes_where_its_models_are() -> None:
    one, two = worker("one", A), worker("two", B)
    assert choose(one, [one, two], [prompt(1, B), prompt(2, A)]) == prompt(2, A)
    assert choose(two, [one, two], [prompt(1, B), prompt(2, A)]) == prompt(1, B)


def test_else_where_least_has_to_be_unloaded() -> None:
    one, two = worker("one", A | B), worker("two", A)
    assert home_of(prompt(1, C), [one, two]) is two
    assert home_of(prompt(1, C), [one, worker("three")]) is not one


def test_what_waits_for_a_home_that_is_busy_is_left_to_it_while_that_is_quicker() -> None:
    home, other = worker("home", A, busy=9.0), worker("other", B)
    assert choose(other, [home, other], [prompt(1, A)]) is None
    waiting = [prompt(number, A) for number in range(4)]
    assert choose(other, [home, other], waiting) == waiting[0]


@pytest.mark.parametrize("busy", [60.0, 3600.0])
def test_nobody_waits_behind_a_prompt_that_takes_long(busy: float) -> None:
    home, other = worker("home", A, busy=busy), worker("other", B)
    assert choose(other, [home, other], [prompt(1, A)]) == prompt(1, A)


@pytest.mark.parametrize("count", range(1, 6))
def test_a_queue_that_takes_longer_than_the_models_is_shared(count: int) -> None:
    home, other = worker("home", A, busy=0.0), worker("other", B)
    waiting = [prompt(number, A) for number in range(count)]
    # Two changes of 20 GB at 2 GB/s each, against prompts of 10 s: those that wait, and the one that has just begun.
    assert (choose(other, [home, other], waiting) is not None) == (10 * (count + 1) > 20)


def test_nobody_gets_what_it_must_not_run() -> None:
    one, two = worker("one", A), worker("two")
    assert choose(one, [one, two], [prompt(1, A, "one")]) is None
    assert choose(two, [one, two], [prompt(1, A, "one")]) == prompt(1, A, "one")
    without = replace(one, missing=frozenset({("diffusion_models", "A")}))
    assert choose(without, [without, two], [prompt(1)]) is None
    assert home_of(prompt(1, A, "one", "two"), [one, two]) is None


def test_every_small_state_keeps_the_rules() -> None:
    """Two workers in all states, and all queues of up to three prompts."""
    states = [(loaded, busy) for loaded in (NOTHING, A, B, A | B) for busy in (None, 0.0, 100.0)]
    queues = [queue for length in range(4) for queue in itertools.product((A, B, NOTHING), repeat=length)]
    for first, second in itertools.product(states, repeat=2):
        workers = [worker("one", *first), worker("two", *second)]
        for queue in queues:
            waiting = [prompt(number, files) for number, files in enumerate(queue)]
            check_rules(workers, waiting)


def check_rules(workers: list[WorkerView], waiting: list[Waiting]) -> None:
    free = [each for each in workers if each.free]
    chosen = {each.name: choose(each, workers, waiting) for each in free}
    for each in free:
        own = [one for one in waiting if home_of(one, workers) is each]
        taken = chosen[each.name]
        if own:
            assert taken is own[0], "what is at home comes first, in the order of the queue"
        elif taken is not None:
            home = home_of(taken, workers)
            assert home is not None
            assert not home.free, "nothing is taken from one that would begin at once"
    if waiting and len(free) == len(workers):
        assert any(chosen.values()), "a queue does not stand still while all are free"


# -- a whole day -------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What came of a simulated queue."""

    changes: int = 0
    seconds: float = 0.0
    order: dict[str, list[int]] = field(default_factory=dict)


Choice = Callable[[WorkerView, list[WorkerView], list[Waiting]], "Waiting | None"]


def simulate(queue: list[Waiting], workers: int, take: Choice, seconds: float = 10.0) -> Run:
    """Run a queue to its end; changing models takes as long as the scheduler thinks."""
    run, waiting, now = Run(), list(queue), 0.0
    views = [WorkerView(f"gpu-{number}", prompt_seconds=seconds) for number in range(workers)]
    began, ends = [0.0] * workers, [0.0] * workers
    while waiting:
        started = False
        for number in range(workers):
            views[number] = replace(views[number], busy_seconds=now - began[number] if ends[number] > now else None)
        for number in range(workers):
            if not views[number].free or (taken := take(views[number], views, waiting)) is None:
                continue
            waiting.remove(taken)
            started = True
            loads = sum(file.nbytes for file in taken.files - views[number].loaded) / views[number].load_rate
            run.changes += bool(loads)
            run.order.setdefault(views[number].name, []).append(int(taken.id))
            began[number], ends[number] = now, now + seconds + loads
            views[number] = replace(views[number], loaded=taken.files, busy_seconds=0.0)
        if not started:
            now = min([end for end in ends if end > now], default=now + 1)
    run.seconds = max(ends)
    return run


def round_robin(count: int) -> Choice:
    """Prompt n is for worker n modulo their number, as N separate servers behind a balancer have it."""

    def take(one: WorkerView, _: list[WorkerView], waiting: list[Waiting]) -> Waiting | None:
        return next((each for each in waiting if f"gpu-{int(each.id) % count}" == one.name), None)

    return take


@pytest.mark.parametrize("seed", range(20))
def test_two_models_on_two_gpus_are_seldom_exchanged(seed: int) -> None:
    chance = random.Random(seed)
    queue = [prompt(number, chance.choice((A, B))) for number in range(100)]
    ours, theirs = simulate(queue, 2, choose), simulate(queue, 2, round_robin(2))
    assert ours.changes <= theirs.changes / 5
    assert ours.seconds <= theirs.seconds
    for order in ours.order.values():
        own = [number for number in order if queue[number].files == queue[order[0]].files]
        assert own == sorted(own), "a home keeps the order of the queue"


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 8])
def test_one_model_uses_all_gpus(workers: int) -> None:
    queue = [prompt(number) for number in range(96)]
    run = simulate(queue, workers, choose)
    # Each loads once, 10 s, and the last to begin waits until the queue is worth it.
    assert run.changes == workers
    assert run.seconds <= 10.0 * 96 / workers + 10.0 + 30.0


def test_a_rare_model_does_not_wait_for_ever() -> None:
    queue = [prompt(number, C if number == 50 else A) for number in range(200)]
    run = simulate(queue, 2, choose)
    (place,) = [order.index(50) for order in run.order.values() if 50 in order]
    assert place <= 50
