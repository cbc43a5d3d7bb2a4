"""Whatever code of others keeps a state in is as it was when a step runs again, or the step says that it is not."""

from __future__ import annotations

import contextvars
import functools
import itertools
import queue
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from stateful import STATES, Holder, in_a_variable_without_a_value
from weightstream.nodes.state import step_memory, step_state
from weightstream.nodes.state.step_state import RepeatableStep, StepModules, StepState
from weightstream.streaming import StepNotRepeatedError, WeightsMovedError
from weightstream.streaming.handoff.away import Away

CPU = torch.device("cpu")


def repeatable(step: Callable[[], Any], failing: int, error: type[Exception] = torch.OutOfMemoryError) -> Any:
    """``step`` so that it can be run again, out of memory at the end of so many runs."""
    left = [failing]

    def forward() -> Any:
        found = step()
        left[0] -= 1
        if left[0] >= 0:
            raise error("no room")
        return found

    return RepeatableStep(forward, state_of(step))


def state_of(*roots: Any, modules: torch.nn.Module | None = None) -> StepState:
    return StepState({"a patch": roots}, StepModules(modules or torch.nn.Module()), [CPU])


@pytest.mark.parametrize("make", STATES)
def test_a_second_run_finds_what_the_first_one_did(make: Callable[[], Callable[[], Any]]) -> None:
    """Over three steps, of which the second fails twice."""
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    plain, ours = make(), make()
    state = state_of(plain)
    expected = [plain() for _ in range(3)]
    state.put_back()  # Where both have the same, in variables of this module and generators.
    assert expected[0] != expected[1] != expected[2] or make is in_a_variable_without_a_value
    found = [ours()]
    step = repeatable(ours, failing=2)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            step()
    found.append(step())
    found.append(ours())
    assert found == expected


def test_modules_of_the_model_have_the_attributes_that_they_had() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    modules = StepModules(model)
    model[0].cache = None
    for _ in range(3):
        state = StepState({}, modules, [CPU])
        before = [dict(vars(module)) for module in model.modules()]
        held = list(model[0].cache or ())
        model[0].cache = [*held, 1]
        model[1].calls = getattr(model[1], "calls", 0) + 1
        model.training = model.training  # Of every module: not for us.
        state.put_back()
        assert [dict(vars(module)) for module in model.modules()] == before
        model[0].cache = [*held, 1]  # As a step that goes well leaves it; the next one appends in place.
        state = StepState({}, modules, [CPU])
        model[0].cache.append(2)
        state.put_back()
        assert model[0].cache == [*held, 1]


def test_weights_and_what_is_bound_are_not_touched() -> None:
    model = torch.nn.Linear(2, 2)
    state = state_of(model, modules=model)
    weight = torch.nn.Parameter(torch.ones(2, 2))
    model.weight = weight
    state.put_back()
    assert model.weight is weight


def test_an_error_that_is_not_mended_leaves_everything_as_it_is() -> None:
    """Who raises it to end a step early wants what the step has left."""
    holder = Holder()
    with pytest.raises(LookupError):
        repeatable(holder, failing=1, error=LookupError)()
    assert holder.steps == 1


@pytest.mark.parametrize("limit", ["SMALL_BYTES", "COPIES_BYTES"])
def test_a_large_tensor_that_was_written_to_is_the_reason(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(step_memory, limit, 1000)
    caches = [torch.zeros(1000)]

    def step(write: bool = True) -> float:
        caches[0][-1 if write else slice(0)] = 5
        return caches[0].sum().item()

    assert repeatable(functools.partial(step, write=False), failing=0)() == 0
    unwritten = repeatable(functools.partial(step, False), failing=1)
    with pytest.raises(torch.OutOfMemoryError):
        unwritten()
    assert unwritten() == 0
    written = repeatable(step, failing=1)
    with pytest.raises(torch.OutOfMemoryError):
        written()
    with pytest.raises(StepNotRepeatedError, match=r"a tensor of 3\.9 KiB that a patch leads to was written to"):
        written()


def test_a_fingerprint_shows_what_was_only_moved() -> None:
    memory = torch.arange(4 * step_memory.SUMS * 2 + 3, dtype=torch.int64).to(torch.uint8)
    before = step_memory.fingerprint(memory)
    assert torch.equal(step_memory.fingerprint(memory.clone()), before)
    assert not torch.equal(step_memory.fingerprint(memory.roll(8)), before)
    for place in (0, len(memory) // 2, len(memory) - 1):
        changed = memory.clone()
        changed[place] ^= 1
        assert not torch.equal(step_memory.fingerprint(changed), before)


def test_where_there_is_no_room_for_a_copy_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(torch.Tensor, "clone", full)
    monkeypatch.setattr(step_memory, "fingerprint", full)
    value = torch.zeros(3)
    step = repeatable(functools.partial(value.add_, 1), failing=1)
    with pytest.raises(torch.OutOfMemoryError):
        step()
    monkeypatch.undo()
    with pytest.raises(StepNotRepeatedError, match="a tensor of"):
        step()


def generated(values: Iterable[int]) -> Iterator[int]:
    while True:
        yield from values


ITERATORS: list[Callable[[], Iterator[Any]]] = [
    itertools.count,
    lambda: iter([1] * 9),
    lambda: iter(range(9)),
    lambda: iter(dict.fromkeys(range(9), 1).items()),
    lambda: reversed([1] * 9),
    lambda: itertools.cycle([1, 2]),
    lambda: itertools.islice([1] * 9, 5),
    lambda: itertools.chain([1] * 5, [1] * 5),
    lambda: enumerate([1] * 9),
    lambda: zip([1] * 9, [1] * 9, strict=True),
    lambda: map(abs, [1] * 9),
    lambda: filter(None, [1] * 9),
    lambda: itertools.repeat(1, 9),
    lambda: itertools.accumulate([1] * 9),
    lambda: itertools.product([1, 2], [1, 2]),
    lambda: (1 for _ in range(9)),
    lambda: generated([1] * 9),
    lambda: generated((1,)),
    lambda: map(abs, (1 for _ in range(9))),
]


@pytest.mark.parametrize("begun", [0, 1, 3])
@pytest.mark.parametrize("make", ITERATORS)
def test_what_cannot_go_back_is_the_reason(make: Callable[[], Iterator[int]], begun: int) -> None:
    """Only where it has gone on."""
    iterator = make()
    for _ in range(begun):
        next(iterator)
    idle = repeatable(functools.partial(lambda _: 5, iterator), failing=1)
    with pytest.raises(torch.OutOfMemoryError):
        idle()
    assert idle() == 5
    step = repeatable(functools.partial(next, iterator), failing=1)
    with pytest.raises(torch.OutOfMemoryError):
        step()
    with pytest.raises(StepNotRepeatedError, match=r"it has moved on"):
        step()


class Ended:
    def __init__(self) -> None:
        self.values: Any = iter(())

    def begin(self) -> None:
        self.values = (value for value in ())

    def __call__(self) -> int:
        return len([*self.values])


def test_a_generator_that_has_ended_is_the_reason_once() -> None:
    ended = Ended()
    ended.begin()
    step = repeatable(ended, failing=1)
    with pytest.raises(torch.OutOfMemoryError):
        step()
    with pytest.raises(StepNotRepeatedError, match=r"a generator that .*it has ended"):
        step()
    again = repeatable(ended, failing=1)
    with pytest.raises(torch.OutOfMemoryError):
        again()
    assert again() == 0


def unset_variable() -> Callable[[], Any]:
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("unset")
    return lambda: variable.set(1)


def queue_without_a_view() -> Callable[[], Any]:
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    waiting.put(1)
    return lambda: waiting.put(waiting.get() + 1)


def large_array() -> Callable[[], Any]:
    values = np.zeros((1 << 18) + 1)
    return lambda: values.__setitem__(7, 1)


def large_array_that_lies_apart() -> Callable[[], Any]:
    values = np.zeros((2, 1 << 19))[:, ::2]
    return lambda: values.__setitem__((1, 7), 1)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (unset_variable, "it had no value, and has int"),
        (queue_without_a_view, "what waits in it is something else"),
        (large_array, "which were written to"),
        (large_array_that_lies_apart, "which were written to"),
    ],
)
def test_what_cannot_be_put_back_is_the_reason_if_it_has_changed(make: Callable[[], Any], said: str) -> None:
    change = make()
    idle = repeatable(functools.partial(lambda _: 5, change), failing=1)
    with pytest.raises(torch.OutOfMemoryError):
        idle()
    assert idle() == 5
    step = repeatable(change, failing=1)
    with pytest.raises(torch.OutOfMemoryError):
        step()
    with pytest.raises(StepNotRepeatedError, match=said):
        step()


@pytest.mark.parametrize("counted", [True, False])
def test_a_large_tensor_in_host_memory_is_looked_at_while_the_model_runs_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, counted: bool
) -> None:
    monkeypatch.setattr(step_memory, "SMALL_BYTES", 1000)
    with torch.inference_mode(not counted):
        value = torch.zeros(1000)

    def step(write: bool) -> int:
        with torch.inference_mode():
            if write:
                value[-1] = 5
        return 5

    def on_a_gpu(write: bool) -> RepeatableStep[int]:
        left = [1]

        def forward() -> int:
            found = step(write)
            if left and left.pop():
                raise torch.OutOfMemoryError("no room")
            return found

        before = StepState({"a patch": step}, StepModules(torch.nn.Module()), [torch.device("cuda", 0)])
        return RepeatableStep(forward, before, "a model")

    idle = on_a_gpu(False)
    with pytest.raises(torch.OutOfMemoryError):
        idle()
    assert idle() == 5
    written = on_a_gpu(True)
    with pytest.raises(torch.OutOfMemoryError):
        written()
    with pytest.raises(StepNotRepeatedError, match=r"^a model: a step failed .* 3\.9 KiB .*was written to\. More"):
        written()
    monkeypatch.setattr(step_memory, "HOST_BYTES", 1000)
    unread = on_a_gpu(False)
    with pytest.raises(torch.OutOfMemoryError):
        unread()
    if counted:
        assert unread() == 5
        return
    with pytest.raises(StepNotRepeatedError, match="may have been written to"):
        unread()


def test_a_tensor_that_is_still_on_another_device_stays_there() -> None:
    """Somebody who looks brings it home; the second run finds it where it was."""
    there = torch.zeros(2)
    away = Away(there, torch.device("cpu", 1), torch.device("cpu", 0), lambda tensor, _: tensor.clone())
    step = repeatable(lambda: (away.stands_for(there), away.add_(1).tolist()), failing=1)
    with pytest.raises(torch.OutOfMemoryError):
        step()
    assert step() == (True, [1, 1])


def test_memory_is_spoken_of_only_where_it_was_missing() -> None:
    step = repeatable(functools.partial(next, itertools.count()), failing=1, error=WeightsMovedError)
    with pytest.raises(WeightsMovedError):
        step()
    with pytest.raises(StepNotRepeatedError, match=r"it has moved on\)\. Queue the prompt once more\.$"):
        step()


class Touchy:
    __slots__ = ("value",)

    def __getattribute__(self, name: str) -> Any:
        if name == "value":
            raise ValueError("not now")
        return super().__getattribute__(name)


def test_objects_that_do_not_want_to_be_looked_at_do_no_harm() -> None:
    step = repeatable(functools.partial(lambda _: 5, Touchy()), failing=1)
    with pytest.raises(torch.OutOfMemoryError):
        step()
    with pytest.raises(StepNotRepeatedError, match="a Touchy that a patch leads to cannot be kept"):
        step()


def test_more_than_can_be_looked_through_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_state, "MOST_OBJECTS", 10)
    step = repeatable(functools.partial(lambda _: 5, [[] for _ in range(20)]), failing=1)
    with pytest.raises(torch.OutOfMemoryError):
        step()
    with pytest.raises(StepNotRepeatedError, match="more hangs on a patch than can be put back"):
        step()
