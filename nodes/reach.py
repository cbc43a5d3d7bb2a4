"""What code that runs in a step can change in place, and how to keep and put back what is in it.

[Note: what is reached]
From a value everything that its code can get hold of: what is in containers, in attributes, in variables that a
function shares with others, on functions and classes, in global variables that a pack's function names, and in modules.
Not weights, which are the streamer's, and not hooks of torch; models of other patchers are wholes of their own. What a
step gets as arguments is small, and so is what packs hang on it; the modules of the model are the most of it.
"""

from __future__ import annotations

import collections
import functools
import inspect
import itertools
import operator
import random
import sys
import types
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import comfy.sd
import numpy as np
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher

from ..streaming.entries import Method
from .loaded_state import ON_MODULES

OURS = __name__.partition(".")[0]

# Objects of these packages are not looked into, but for the kinds at the end.
SETTLED = {*sys.stdlib_module_names, "torch", "numpy", "comfy_aimdo", "comfy_kitchen", OURS}
# Functions and classes of these keep no state in global variables.
STATELESS = {*SETTLED, "comfy", "comfy_extras", "comfy_api", "nodes", "execution", "einops", "torchvision"}
# What the host keeps books of, and tensors, which are for who asks.
WHOLES = (BaseModel, comfy.sd.CLIP, comfy.sd.VAE, torch.Tensor)

# What every module has (its weights and hooks among it), and what the host leaves on some.
OF_EVERY_MODULE = {*vars(torch.nn.Module()), *ON_MODULES}

# Larger arrays are pictures and tables, which nothing counts in.
SMALL_ARRAY_BYTES = 1 << 20

_MISSING = object()


class Changed(Exception):
    """What was kept cannot be put back; the message says what has changed."""


class Kind(NamedTuple):
    """How to deal with objects of a type.

    Attributes:
        keep: gives what is in an object now.
        put_back: has that in it again, and raises :class:`Changed` where it cannot.
        parts: what is to be looked at next.
    """

    keep: Callable[[Any], Any]
    put_back: Callable[[Any, Any], None]
    parts: Callable[[Any], Iterable[Any]]


def kind_of(value: Any) -> Kind | None:
    """How to deal with ``value``; None where there is nothing in it that a step could change, or nobody may look."""
    if isinstance(value, type):
        return _CLASS if _package(value) not in STATELESS else None
    if isinstance(value, types.FunctionType) and _package(value) == OURS:
        return None
    return _kind_of_type(type(value))


@functools.lru_cache(maxsize=4096)
def _kind_of_type(kind: type) -> Kind | None:
    if issubclass(kind, WHOLES):
        return None
    found = next((found for base, found in _KINDS.items() if issubclass(kind, base)), None)
    return _OBJECT if found is None and kind.__module__.partition(".")[0] not in SETTLED else found


def _package(value: type | types.FunctionType) -> str:
    return (value.__module__ or "").partition(".")[0]


# -- containers ------------------------------------------------------------------------------------------------------


def _refill_dict(value: dict, kept: dict) -> None:
    if not (_same(value.keys(), kept.keys()) and _same(value.values(), kept.values())):
        value.clear()
        value.update(kept)


def _refill_list(value: list, kept: list) -> None:
    if not _same(value, kept):
        value[:] = kept


def _refill(value: Any, kept: Any) -> None:
    if not _same(value, kept):
        value.clear()
        (value.update if isinstance(value, set) else value.extend)(kept)


def _same(one: Collection[Any], other: Collection[Any]) -> bool:
    """What nobody has changed is not written to: other threads may be reading it."""
    return len(one) == len(other) and all(map(operator.is_, one, other))


def _keep_of_array(value: np.ndarray) -> np.ndarray | None:
    return value.copy() if value.nbytes <= SMALL_ARRAY_BYTES else None


def _refill_array(value: np.ndarray, kept: np.ndarray | None) -> None:
    if kept is not None:
        value[...] = kept


# -- functions, objects, classes -------------------------------------------------------------------------------------


def _keep_of_function(function: types.FunctionType) -> tuple:
    cells = [(cell, _content(cell)) for cell in function.__closure__ or ()]
    return cells, vars(function).copy(), _globals_of(function)


def _put_back_of_function(function: types.FunctionType, kept: tuple) -> None:
    cells, attributes, variables = kept
    for cell, content in cells:
        if content is not _MISSING:
            cell.cell_contents = content
        elif _content(cell) is not _MISSING:
            del cell.cell_contents
    _refill_dict(vars(function), attributes)
    _refill_variables(function.__globals__, variables)


def _refill_variables(variables: dict[str, Any], kept: dict[str, Any]) -> None:
    variables.update({name: value for name, value in kept.items() if variables.get(name, _MISSING) is not value})


def _parts_of_function(function: types.FunctionType) -> Iterator[Any]:
    yield from (_content(cell) for cell in function.__closure__ or ())
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from vars(function).values()
    yield from _globals_of(function).values()


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # A variable that has no value yet, or none any more.
        return _MISSING


def _globals_of(function: types.FunctionType) -> dict[str, Any]:
    """Global variables that a pack's function names, with their values."""
    if _package(function) in STATELESS:
        return {}
    variables = function.__globals__
    found = {name: variables[name] for name in _names(function.__code__) if name in variables}
    return {name: value for name, value in found.items() if not isinstance(value, types.ModuleType)}


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> frozenset[str]:
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return frozenset(code.co_names).union(*inner)


def _keep_of_object(value: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return getattr(value, "__dict__", {}).copy(), {name: getattr(value, name, _MISSING) for name in _slots(type(value))}


def _put_back_of_object(value: Any, kept: tuple[dict[str, Any], dict[str, Any]]) -> None:
    attributes, slots = kept
    if hasattr(value, "__dict__"):
        _refill_dict(vars(value), attributes)
    for name, content in slots.items():
        if content is not _MISSING:
            object.__setattr__(value, name, content)
        elif hasattr(value, name):
            object.__delattr__(value, name)


def _parts_of_object(value: Any) -> Iterator[Any]:
    attributes, slots = _keep_of_object(value)
    yield from attributes.values()
    yield from slots.values()
    yield type(value)
    if isinstance(call := inspect.getattr_static(value, "__call__", None), types.FunctionType):
        yield call


@functools.lru_cache(maxsize=4096)
def _slots(kind: type) -> tuple[str, ...]:
    found = (vars(one).get("__slots__", ()) for one in kind.__mro__)
    names = itertools.chain.from_iterable((slots,) if isinstance(slots, str) else slots for slots in found)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def _keep_of_class(kind: type) -> dict[str, Any]:
    return {name: value for name, value in vars(kind).items() if not name.startswith("__") and _is_data(value)}


def _put_back_of_class(kind: type, kept: dict[str, Any]) -> None:
    for name in _keep_of_class(kind).keys() - kept.keys():
        delattr(kind, name)
    for name, value in kept.items():
        if vars(kind).get(name, _MISSING) is not value:
            setattr(kind, name, value)


def _is_data(value: Any) -> bool:
    """Whether it is something that code sets on a class, and not a part of its definition."""
    return not callable(value) and not hasattr(type(value), "__get__")


# -- modules ---------------------------------------------------------------------------------------------------------


def _put_back_of_module(module: torch.nn.Module, kept: dict[str, Any]) -> None:
    now = vars(module)
    for name in now.keys() | kept.keys():
        before, value = kept.get(name, _MISSING), now.get(name, _MISSING)
        if before is value or name in OF_EVERY_MODULE or isinstance(before, Method) or isinstance(value, Method):
            continue  # Methods of ours come and go with the state of the model.
        if before is _MISSING:
            del now[name]
        else:
            now[name] = before


def _parts_of_module(module: torch.nn.Module) -> list[Any]:
    attributes = vars(module)
    return [*module._modules.values(), *(attributes[name] for name in telling_attributes(module))]


def telling_attributes(module: torch.nn.Module) -> tuple[str, ...]:
    """Which attributes of a module lead on, or may do so later: not its parts, nor plain numbers and names."""
    found = ((name, value) for name, value in vars(module).items() if name not in OF_EVERY_MODULE)
    return tuple(name for name, value in found if not isinstance(value, _PLAIN))


_PLAIN = (bool, int, float, str, torch.dtype, torch.device, torch.Size)


# -- what has a position ---------------------------------------------------------------------------------------------


def _position(value: Any) -> Any:
    """Where an iterator is; it cannot be put back there."""
    return value.__length_hint__() if hasattr(value, "__length_hint__") else repr(value)


def _compare_positions(value: Any, kept: Any) -> None:
    if _position(value) != kept:
        raise Changed("it has moved on")


def _tell_of_generator(value: types.GeneratorType, _: Any) -> None:
    if value.gi_frame is not None:
        raise Changed("nobody can tell whether it has moved on")


def _nothing(*_: Any) -> tuple[()]:
    return ()


def _only_parts(parts: Callable[[Any], Iterable[Any]]) -> Kind:
    return Kind(_nothing, _nothing, parts)


MODULE = Kind(lambda module: vars(module).copy(), _put_back_of_module, _parts_of_module)
_CLASS = Kind(_keep_of_class, _put_back_of_class, lambda kind: _keep_of_class(kind).values())
_OBJECT = Kind(_keep_of_object, _put_back_of_object, _parts_of_object)
_ITERATOR = Kind(_position, _compare_positions, _nothing)
_ITERATORS = (itertools.count, *(type(iter(value)) for value in ([], (), range(0), range(2**70))))

# The first that an object is an instance of.
_KINDS: dict[type, Kind] = {
    dict: Kind(dict, _refill_dict, lambda value: [*value.values()]),
    list: Kind(list, _refill_list, list),
    tuple: _only_parts(iter),
    set: Kind(set, _refill, list),
    frozenset: _only_parts(iter),
    collections.deque: Kind(list, _refill, list),
    bytearray: Kind(bytes, _refill_list, _nothing),
    np.ndarray: Kind(_keep_of_array, _refill_array, _nothing),
    types.FunctionType: Kind(_keep_of_function, _put_back_of_function, _parts_of_function),
    types.MethodType: _only_parts(lambda method: (method.__self__, method.__func__)),
    types.BuiltinMethodType: _only_parts(lambda method: (method.__self__,)),
    functools.partial: _only_parts(lambda value: (value.func, value.args, value.keywords)),
    types.SimpleNamespace: _OBJECT,
    ModelPatcher: _only_parts(lambda patcher: (patcher.model_options, getattr(patcher, "attachments", None))),
    torch.nn.Module: MODULE,
    torch.Generator: Kind(torch.Generator.get_state, torch.Generator.set_state, _nothing),
    random.Random: Kind(random.Random.getstate, random.Random.setstate, _nothing),
    np.random.RandomState: Kind(np.random.RandomState.get_state, np.random.RandomState.set_state, _nothing),
    np.random.Generator: Kind(
        lambda value: value.bit_generator.state,
        lambda value, kept: setattr(value.bit_generator, "state", kept),
        _nothing,
    ),
    types.GeneratorType: Kind(_nothing, _tell_of_generator, _nothing),
    **dict.fromkeys(_ITERATORS, _ITERATOR),
}
