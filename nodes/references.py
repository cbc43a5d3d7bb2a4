"""Whether what hangs on a patcher refers to the modules of its model.

A wrapper, an injection or a patch may hold a module of the model that it was made for, to call it or to exchange a part
of it. Carried over to another model it would go on working on the first one.
"""

from __future__ import annotations

import types
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ..streaming.entries import Method

# More than anything that is meant to be looked through; what is not looked at may refer to anything.
MOST_OBJECTS = 200_000

PLAIN = (str, bytes, int, float, complex, type(None), type, types.ModuleType, torch.dtype, torch.device, torch.Tensor)


def refers_to(values: Iterable[Any], modules: Collection[int]) -> bool:
    """Whether any of ``modules``, by identity, can be reached from ``values``; true also where there is too much to
    tell."""
    return any(id(value) in modules or number >= MOST_OBJECTS for number, value in enumerate(reachable(values)))


def reachable(values: Iterable[Any], without: Collection[int] = ()) -> Iterator[Any]:
    """What can be reached from ``values`` through containers, closures, methods, attributes, and patchers to the models
    that they hold; not through what is ``without``, by identity."""
    seen: set[int] = {*without}
    kept = []  # What is made on the way (bound methods' parts) must not give its identity to another object.
    left = list(values)
    while left:
        value = left.pop()
        if isinstance(value, PLAIN) or id(value) in seen:
            continue
        yield value
        seen.add(id(value))
        kept.append(value)
        left.extend(_parts(value))


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


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # A variable that has no value yet, or none any more.
        return None


def _slots(kind: type) -> Iterator[str]:
    for one in kind.__mro__:
        slots = vars(one).get("__slots__", ())
        yield from (slots,) if isinstance(slots, str) else slots
