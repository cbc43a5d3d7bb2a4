"""Whatever code of others keeps a state in is as it was when a step runs again, or the step says that it is not."""

from __future__ import annotations

import collections
import copy
import functools
import itertools
import random
import types
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from weightstream.nodes import step_memory, step_state
from weightstream.nodes.step_state import RepeatableStep, StepModules, StepState
from weightstream.streaming import StepNotRepeatedError

CPU = torch.device("cpu")

# What a pack's function keeps in a variable of its module.
counted = 0
seen: list[int] = []


def count_globally() -> tuple[int, int]:
    global counted
    counted += 1
    seen.append(counted)
    return counted, len(seen)


def calls_another() -> tuple[int, int]:
    return count_globally()


class Holder:
    shared = 0
    names: ClassVar[list[str]] = []

    def __init__(self) -> None:
        self.steps = 0
        self.cache: dict[str, Any] = {"last": None, "all": []}

    def __call__(self) -> tuple[Any, ...]:
        self.steps += 1
        Holder.shared += 1
        Holder.names.append("one")
        self.cache["all"].append(self.cache["last"])
        self.cache["last"] = self.steps
        self.__dict__.setdefault("new", 0)
        return self.steps, Holder.shared, len(Holder.names), len(self.cache["all"]), sorted(vars(self))


class Slotted:
    __slots__ = ("count", "other")

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> tuple[int, bool]:
        had = hasattr(self, "other")
        self.count += 1
        self.other = 1
        return self.count, had


def in_a_variable() -> Callable[[], int]:
    count = 0

    def step() -> int:
        nonlocal count
        count += 1
        return count

    return step


def in_a_variable_without_a_value() -> Callable[[], bool]:
    def step() -> bool:
        nonlocal value
        try:
            return bool(value)
        except NameError:
            value = True
            return False

    value = True
    del value
    return step


def on_the_function() -> Callable[[], int]:
    def step() -> int:
        step.count = getattr(step, "count", 0) + 1  # type: ignore[attr-defined]
        return step.count  # type: ignore[attr-defined]

    return step


def in_a_default() -> Callable[[], int]:
    def step(found: list[int] = []) -> int:  # noqa: B006
        found.append(1)
        return len(found)

    return step


def in_containers() -> Callable[[], tuple[Any, ...]]:
    made: list[Any] = [
        {"a": [1]},
        {1, 2},
        collections.deque([1, 2], maxlen=2),
        collections.OrderedDict(a=1, b=2),
        collections.defaultdict(list),
        bytearray(b"ab"),
        types.SimpleNamespace(n=0),
        (["inner"],),
    ]

    def step() -> tuple[Any, ...]:
        made[0]["a"].append(2)
        made[0]["b"] = 1
        made[1].add(len(made[1]) + 1)
        made[2].append(3)
        made[3].move_to_end("a")
        made[4]["x"].append(1)
        made[5] += b"c"
        made[6].n += 1
        made[7][0].append("more")
        return copy.deepcopy(tuple(made))

    return step


def in_a_partial() -> Callable[[], int]:
    return functools.partial(lambda found: found.append(1) or len(found), [])


def in_a_method() -> Callable[[], tuple[Any, ...]]:
    return Holder().__call__


def in_tensors() -> Callable[[], tuple[list[Any], ...]]:
    base = torch.arange(6.0)
    values = {"whole": base, "part": torch.ones(4, 4)[1:3, ::2], "one for all": torch.ones(1).expand(3)}
    with torch.inference_mode():
        values["of inference"] = torch.ones(2)

    def step() -> tuple[list[Any], ...]:
        with torch.inference_mode():
            values["whole"].add_(1)
            values["part"].mul_(2)
            values["of inference"].add_(1)
            values["one for all"].as_strided((1,), (1,)).add_(1)
            return tuple(value.tolist() for value in values.values())

    return step


def in_a_tensor_of_another_shape() -> Callable[[], list[float]]:
    value = torch.zeros(2)

    def step() -> list[float]:
        value.resize_(value.numel() + 1).fill_(value.numel())
        return value.tolist()

    return step


def in_an_array() -> Callable[[], list[int]]:
    value = np.zeros(3, int)

    def step() -> list[int]:
        value[1] += 1
        return value.tolist()

    return step


def in_generators() -> Callable[[], tuple[Any, ...]]:
    own = torch.Generator().manual_seed(1), random.Random(1), np.random.default_rng(1), np.random.RandomState(1)

    def step() -> tuple[Any, ...]:
        return (
            torch.rand(1).item(),
            random.random(),
            np.random.rand(),
            torch.rand(1, generator=own[0]).item(),
            own[1].random(),
            own[2].random(),
            own[3].rand(),
        )

    return step


def in_modules() -> Callable[[], tuple[Any, ...]]:
    module = torch.nn.Sequential(torch.nn.Linear(1, 1))
    module[0].calls = 0
    module.cache = {}

    def step() -> tuple[Any, ...]:
        module[0].calls += 1
        module.cache.setdefault("all", []).append(1)
        module.added = getattr(module, "added", 0) + 1
        return module[0].calls, len(module.cache["all"]), module.added

    return step


STATES = [
    in_a_variable,
    in_a_variable_without_a_value,
    on_the_function,
    in_a_default,
    in_containers,
    in_a_partial,
    in_a_method,
    in_tensors,
    in_a_tensor_of_another_shape,
    in_an_array,
    in_generators,
    in_modules,
    Holder,
    Slotted,
    lambda: count_globally,
    lambda: calls_another,
]


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
    with pytest.raises(StepNotRepeatedError, match=r"a tensor of 4\.0 KB that a patch leads to was written to"):
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


def test_a_generator_is_the_reason() -> None:
    step = repeatable(functools.partial(lambda _: 5, (number for number in range(9))), failing=1)
    with pytest.raises(torch.OutOfMemoryError):
        step()
    with pytest.raises(StepNotRepeatedError, match="nobody can tell whether it has moved on"):
        step()


@pytest.mark.parametrize("make", [itertools.count, lambda: iter([1] * 9), lambda: iter(range(9))])
def test_what_cannot_go_back_is_the_reason(make: Callable[[], Iterator[int]]) -> None:
    """Only where it has gone on."""
    iterator = make()
    next(iterator)
    idle = repeatable(functools.partial(lambda _: 5, iterator), failing=1)
    with pytest.raises(torch.OutOfMemoryError):
        idle()
    assert idle() == 5
    step = repeatable(functools.partial(next, iterator), failing=1)
    with pytest.raises(torch.OutOfMemoryError):
        step()
    with pytest.raises(StepNotRepeatedError, match=rf"a {type(iterator).__name__} .*it has moved on"):
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
