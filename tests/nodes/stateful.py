"""Code of others that keeps a state from step to step, of every kind that we know of."""

from __future__ import annotations

import array
import collections
import contextvars
import copy
import functools
import io
import itertools
import queue
import random
import sys
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch

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
    kept: ClassVar[list[Any]] = []

    @classmethod
    def keep(cls, value: Any) -> Any:
        cls.kept.append(value)
        return value

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


def in_a_module_of_the_pack() -> Callable[[], tuple[Any, ...]]:
    """By its name, by names as texts, by another module, and where the step imports it."""
    state: Any = sys.modules.setdefault("pack_state", types.ModuleType("pack_state"))
    state.n, state.named, state.held = 0, 0, {"n": 0}
    function = types.FunctionType(_count_in_module.__code__, {"state": state, "__name__": "pack_nodes"})

    def step() -> tuple[Any, ...]:
        state.held["n"] += 1
        return function()

    return step


def _count_in_module() -> tuple[Any, ...]:
    import pack_state

    state.n += 1  # type: ignore[name-defined]  # noqa: F821
    setattr(pack_state, "named", pack_state.named + 1)  # noqa: B010
    pack_state.new = getattr(pack_state, "new", 0) + 1  # type: ignore[attr-defined]
    return pack_state.n, pack_state.named, pack_state.held["n"], pack_state.new  # type: ignore[attr-defined]


class Key:
    def __init__(self) -> None:
        self.count = 0


def behind_weak_references() -> Callable[[], tuple[Any, ...]]:
    key, value = Key(), Key()
    by_key: Any = weakref.WeakKeyDictionary({key: 0})
    by_name: Any = weakref.WeakValueDictionary({"a": value})
    keys: Any = weakref.WeakSet([key])
    points, proxy = weakref.ref(Holder.keep(Key())), weakref.proxy(Holder.keep(Key()))

    def step() -> tuple[Any, ...]:
        by_key[key] += 1
        by_name["a"].count += 1
        by_name["b"] = value
        found = points()
        found.count += 1
        proxy.count += 1
        keys.add(value)
        return by_key[key], by_name["a"].count, sorted(by_name), found.count, proxy.count, len(keys)

    return step


class Dict(dict):
    pass


class List(list):
    __slots__ = ("__private", "n")

    def bump(self) -> tuple[int, int]:
        self.n = getattr(self, "n", 0) + 1
        self.__private = getattr(self, "_List__private", 0) + 1
        return self.n, self.__private


class Set(set):
    pass


class Deque(collections.deque):
    def clear(self) -> None:
        raise AssertionError("this is somebody's own")


class Lru(collections.OrderedDict):
    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        self.written = getattr(self, "written", 0) + 1


def on_containers() -> Callable[[], tuple[Any, ...]]:
    made: list[Any] = [Dict(), List(), Set(), Deque(), Lru(a=1), collections.Counter()]

    def step() -> tuple[Any, ...]:
        for value in (made[0], made[2], made[3]):
            value.n = getattr(value, "n", 0) + 1
        made[3].append(1)
        made[4][f"b{len(made[4])}"] = 1
        made[4].move_to_end("a")
        made[5]["x"] += 1
        return made[0].n, made[1].bump(), made[2].n, made[3].n, [*made[3]], [*made[4]], made[4].written, made[5]["x"]

    return lambda: copy.deepcopy(step())


def in_containers_of_python() -> Callable[[], tuple[Any, ...]]:
    key = Key()
    made: list[Any] = [
        collections.UserDict(n=0),
        collections.UserList(),
        collections.ChainMap({"n": 0}, {}),
        queue.Queue(),
        array.array("i", [0]),
        bytearray(1),
        threading.local(),
        contextvars.ContextVar("count"),
        {key: 1},
        io.BytesIO(b"ab"),
        types.MappingProxyType({"inner": [0]}),
        memoryview(bytearray(1)),
    ]
    made[6].n = 0
    made[7].set(0)

    def step() -> tuple[Any, ...]:
        made[0]["n"] += 1
        made[1].append(1)
        made[2]["n"] += 1
        made[3].put(1)
        made[4][0] += 1
        made[5][0] += 1
        made[6].n += 1
        made[7].set(made[7].get() + 1)
        key.count += 1
        made[9].write(b"c")
        made[10]["inner"][0] += 1
        made[11].obj[0] += 1
        found = made[0]["n"], len(made[1]), made[2]["n"], made[3].qsize(), made[3].unfinished_tasks, made[4][0]
        more = made[5][0], made[6].n, made[7].get(), key.count, made[9].getvalue(), made[10]["inner"][0]
        return (*found, *more, made[11].obj[0])

    return step


class Numbers(torch.Tensor):
    pass


def in_other_tensors() -> Callable[[], tuple[Any, ...]]:
    number = torch.zeros(1)
    number.count = 0  # type: ignore[attr-defined]
    own = torch.zeros(2).as_subclass(Numbers)
    own.count = 0  # type: ignore[attr-defined]
    weight = torch.nn.Parameter(torch.zeros(2))
    sparse = torch.zeros(3).index_fill(0, torch.tensor([1]), 1.0).to_sparse()
    held = torch.zeros(1)

    def step() -> tuple[Any, ...]:
        number.count += 1  # type: ignore[attr-defined]
        own.count += 1  # type: ignore[attr-defined]
        with torch.no_grad():
            own.add_(1)
            weight.add_(1)
            weight.data.add_(1)
            sparse.mul_(2)
        held.data = torch.full((1,), held.item() + 1)
        values = number.count, own.count, own.tolist(), weight.tolist()  # type: ignore[attr-defined]
        return (*values, sparse.to_dense().tolist(), held.item())

    return step


def in_buffers() -> Callable[[], tuple[Any, ...]]:
    """Written in place, exchanged, counted by torch, and of which there is a new one."""
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(2).train())
    module.register_buffer("mean", torch.zeros(1))
    module.register_buffer("other", torch.zeros(1))

    def step() -> tuple[Any, ...]:
        with torch.no_grad():
            module(torch.arange(8.0).view(4, 2))
        module.mean.add_(1)
        module.other = module.other + 1
        had = hasattr(module, "new")
        module.register_buffer("new", torch.ones(1))
        return (*[buffer.tolist() for _, buffer in sorted(module.named_buffers())], had)

    return step


class Methods:
    """Methods call one another, a property, and an object that can be called and stands on the class."""

    def __call__(self) -> tuple[Any, ...]:
        return self.one(), self.two, self.three()

    def one(self) -> int:
        global counted_in_methods
        counted_in_methods += 1
        return counted_in_methods

    @property
    def two(self) -> int:
        listed_in_methods.append(1)
        return len(listed_in_methods)

    three = Holder()


counted_in_methods = 0
listed_in_methods: list[int] = []


class Below(Methods):
    pass


@functools.lru_cache(maxsize=2)
def the_state() -> dict[str, int]:
    return {"n": 0}


def in_a_cached_function() -> Callable[[], int]:
    def step() -> int:
        the_state()["n"] += 1
        return the_state()["n"]

    the_state()
    return step


def in_what_an_iterator_goes_through() -> Callable[[], tuple[int, int]]:
    held, made = [0], {"n": 0}
    ahead, generator = itertools.chain([held], []), (one for one in [made])

    def step() -> tuple[int, int]:
        assert ahead is not generator
        held[0] += 1
        made["n"] += 1
        return held[0], made["n"]

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
    in_a_module_of_the_pack,
    behind_weak_references,
    on_containers,
    in_containers_of_python,
    in_other_tensors,
    in_buffers,
    Methods,
    Below,
    in_a_cached_function,
    in_what_an_iterator_goes_through,
]
