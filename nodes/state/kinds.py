"""Kinds of objects for a step that may run again: how to keep what is in one, put it back, and see what it leads to."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

OURS = __name__.partition(".")[0]

# Objects of these packages are not looked into, but for the kinds that reach.py names.
SETTLED = {*sys.stdlib_module_names, "torch", "numpy", "comfy_aimdo", "comfy_kitchen", OURS}
# Functions and classes of these keep no state in global variables.
STATELESS = {*SETTLED, "comfy", "comfy_extras", "comfy_api", "nodes", "execution", "einops", "torchvision"}

MISSING = object()


class Changed(Exception):
    """What was kept cannot be put back; the message says what has changed."""


class Kind(NamedTuple):
    """How to deal with objects of a type.

    Attributes:
        keep: returns what is in an object now.
        put_back: puts that back into it; raises :class:`Changed` if it cannot.
        parts: returns the objects to look at next.
    """

    keep: Callable[[Any], Any]
    put_back: Callable[[Any, Any], None]
    parts: Callable[[Any], Iterable[Any]]


def nothing(*_: Any) -> tuple[()]:
    return ()


def only_parts(parts: Callable[[Any], Iterable[Any]]) -> Kind:
    """The kind of an object that has nothing in it that could change, but leads to others."""
    return Kind(nothing, nothing, parts)


def both(one: Kind, other: Kind) -> Kind:
    """The kind of an object with two contents, such as the items of a container and attributes beside them."""
    return Kind(
        lambda value: (one.keep(value), other.keep(value)),
        lambda value, kept: (one.put_back(value, kept[0]), other.put_back(value, kept[1])),
        lambda value: [*one.parts(value), *other.parts(value)],
    )


def package_of(value: type | types.FunctionType) -> str:
    return (value.__module__ or "").partition(".")[0]


@functools.lru_cache(maxsize=1024)
def is_stateless(package: str) -> bool:
    """Whether functions and classes of a package keep no state: those of the host and of installed libraries."""
    if package in STATELESS:
        return True
    found = sys.modules.get(package)
    places = [getattr(found, "__file__", None) or "", *(getattr(found, "__path__", None) or ())]
    return any("site-packages" in place or "dist-packages" in place for place in places)


def is_of_a_pack(module: types.ModuleType) -> bool:
    """Whether variables of a Python module may hold state."""
    return not is_stateless(module.__name__.partition(".")[0])
