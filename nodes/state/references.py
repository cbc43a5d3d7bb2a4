"""Whether what is attached to a patcher refers to the modules of its model.

A wrapper, an injection or a patch may hold a module of the model that it was made for, to call it or to exchange a part
of it. Carried over to another model it would go on working on the first one. It may also know that module by a table of
its pack (a dictionary beside the function, or on the class of an object), under the module itself, a weak reference to
it or its identity; carried over to another model it would find nothing there, and silently do nothing.
"""

from __future__ import annotations

import dis
import types
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ...streaming import UnsupportedModelError
from ...streaming.model.entries import Method

OUR_PACKAGE = __name__.partition(".")[0]

# The search ends after so many objects, more than any expected ones; what was not searched may refer to anything.
MOST_OBJECTS = 200_000

# The same for tables of packs: a pack may refer to all that it has, so what is further away is taken as unrelated.
MOST_IN_TABLES = 20_000
# Packages without tables of modules of models, or with none that matters (the host's own list of loaded models).
WITHOUT_TABLES = {"torch", "comfy", "comfy_api", "comfy_execution", "comfy_extras", "comfy_kitchen", "comfy_aimdo"}
WITHOUT_TABLES |= {"nodes", "execution", "server", "folder_paths", "builtins", "logging", "numpy", "typing", "abc"}
# Packages whose objects refer to everything, for another reason.
OMNISCIENT = {"server", "execution", "comfy_execution", "app", "logging", "asyncio", "aiohttp", "threading"}

PLAIN = (str, bytes, float, complex, type(None), type, types.ModuleType, torch.dtype, torch.device, torch.Tensor)


def refers_to(values: Iterable[Any], modules: Collection[int]) -> bool:
    """Whether any of ``modules``, by identity, can be reached from ``values``; also true if there are too many objects
    to tell."""
    known: dict[int, Any] = {}
    for number, value in enumerate(reachable(values, follow_weak=True)):
        if _is_one_of(value, modules) or number >= MOST_OBJECTS:
            return True
        known[id(value)] = value
    tables = [table for value in known.values() for table in _tables(value)]
    found = islice(reachable(tables, follow_weak=True, parts=_parts_and_tables), MOST_IN_TABLES)
    return any(_is_one_of(value, modules) for value in found)


def _is_one_of(value: Any, modules: Collection[int]) -> bool:
    return id(value) in modules or (type(value) is int and value in modules)


def reachable(
    values: Iterable[Any],
    without: Collection[int] = (),
    follow_weak: bool = False,
    parts: Callable[[Any], Iterator[Any]] | None = None,
) -> Iterator[Any]:
    """What can be reached from ``values`` through containers, closures, methods, attributes, and patchers to the models
    that they hold; not through what is ``without``, by identity."""
    parts = _parts if parts is None else parts
    seen: set[int] = {*without}
    kept = []  # Objects that are made on the way stay alive, so that no other gets their identity.
    left = list(values)
    while left:
        value = left.pop()
        if isinstance(value, PLAIN) or id(value) in seen:
            continue
        yield value
        seen.add(id(value))
        kept.append(value)
        if not isinstance(value, weakref.ref):
            left.extend(parts(value))
        elif follow_weak:
            left.append(value())


def carry_functions(source: Any, target: Any, model: torch.nn.Module) -> None:
    """Have methods that somebody has put on ``source`` work on ``target``, its shallow copy.

    Raises:
        UnsupportedModelError: one of them refers to ``source`` or to modules of ``model``, which it holds.
    """
    others = {id(source), *map(id, model.modules())}
    for name, value in vars(source).items():
        if not callable(value) or not hasattr(type(source), name):
            continue
        if isinstance(value, types.MethodType) and value.__self__ is source:
            value = value.__func__
            setattr(target, name, types.MethodType(value, target))
        if refers_to([value], others):
            raise UnsupportedModelError(f"somebody has exchanged its {name} by a function that refers to it")


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.keys()
        yield from value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from value
    elif isinstance(value, types.FunctionType):
        yield from map(_content, value.__closure__ or ())
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
        yield vars(value)
    elif isinstance(value, types.MethodType):
        yield value.__self__
        yield value.__func__
    elif isinstance(value, Method):
        yield value.module
        yield value.instead_of
    elif isinstance(value, partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, ModelPatcher):
        yield value.model
    else:
        yield getattr(value, "__dict__", None)
        yield from (getattr(value, name, None) for name in _slots(type(value)))


def _parts_and_tables(value: Any) -> Iterator[Any]:
    if str(type(value).__module__).partition(".")[0] not in OMNISCIENT:
        yield from _parts(value)
        yield from _tables(value)


def _tables(value: Any) -> Iterator[Any]:
    """What a pack's code refers to by name: the globals that a function uses, and what is on the class of an object."""
    if isinstance(value, types.FunctionType) and _may_have_tables(value.__module__):
        for code in _codes(value.__code__):
            yield from _named(value.__globals__, code)
    elif not isinstance(value, torch.nn.Module) and _may_have_tables(type(value).__module__):
        yield _on(type(value))


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code of a function, and of the functions that it makes."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _named(known: dict[str, Any], code: types.CodeType) -> Iterator[Any]:
    names = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    for name in names & known.keys():
        value = known[name]
        if not isinstance(value, types.ModuleType):
            yield _on(value)
        elif _may_have_tables(value.__name__):
            yield from (_on(one) for one in (vars(value).get(other) for other in code.co_names) if not callable(one))


def _on(value: Any) -> Any:
    """A class stands for what is on it."""
    if not isinstance(value, type):
        return value
    return [*vars(value).values()] if _may_have_tables(value.__module__) else None


def _may_have_tables(module: Any) -> bool:
    root = str(module).partition(".")[0]
    return root not in WITHOUT_TABLES and root != OUR_PACKAGE


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # A variable that has no value yet, or none any more.
        return None


def _slots(kind: type) -> Iterator[str]:
    for one in kind.__mro__:
        slots = vars(one).get("__slots__", ())
        yield from (slots,) if isinstance(slots, str) else slots
