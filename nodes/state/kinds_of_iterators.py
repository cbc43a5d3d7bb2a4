"""Iterators and generators: their positions. None of them can be moved back, but it shows whether one has moved on."""

from __future__ import annotations

import gc
import itertools
import operator
import types
import warnings
from typing import Any

from .kinds import Changed, Kind

_BUILTIN = ([], (), {}, set(), "", b"", bytearray(), range(0), range(2**70), {}.values(), {}.items())
_ITERATORS = {
    *(type(iter(value)) for value in _BUILTIN),
    *(type(reversed(value)) for value in ([], {}, {}.values(), {}.items())),
    *(enumerate, zip, map, filter, reversed, type(iter(int, 1)), type(iter(type("", (), {"__getitem__": len})()))),
    *(value for value in vars(itertools).values() if isinstance(value, type)),
}


def _position(value: Any) -> Any:
    """The position of an iterator, which stays equal until it is advanced, or until what it goes through changes."""
    if hasattr(value, "__length_hint__"):
        return value.__length_hint__()
    if isinstance(value, itertools.count):
        return repr(value)
    return _told(_reduced(value))


def _reduced(value: Any) -> Any:
    """What would be pickled of it; None if it cannot be pickled."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return value.__reduce__()
    except Exception:
        return None


def _told(reduced: Any) -> Any:
    """What an iterator consists of: numbers, positions of other iterators, lengths of lists, identities of objects."""
    if isinstance(reduced, tuple):
        return tuple(map(_told, reduced))
    if reduced is None or isinstance(reduced, (bool, int, str)):
        return reduced
    if type(reduced) in _ITERATORS:
        return _position(reduced)
    return len(reduced) if isinstance(reduced, list) else id(reduced)


def _keep(value: Any) -> tuple[Any, list[Any]]:
    return _position(value), gc.get_referents(value)


def _compare(value: Any, kept: tuple[Any, list[Any]]) -> None:
    # An iterator that has no position shows it by those that it refers to, which are compared by themselves.
    if _position(value) != kept[0]:
        raise Changed("it has moved on")


def _stands(value: Any) -> tuple[int, list[Any]] | None:
    """The instruction at which a generator stands, and all that it holds; None for one that has ended."""
    frame = value.gi_frame
    if frame is None:
        return None
    _ = frame.f_locals  # This dictionary is made on the first access, and is then held too.
    held = gc.get_referents(value)
    if frame in held:  # Up to Python 3.10 the frame holds the objects.
        held = [*held, *gc.get_referents(frame)]
    return frame.f_lasti, held


def _compare_generators(value: types.GeneratorType, kept: tuple[int, list[Any]] | None) -> None:
    now = _stands(value)
    if (now is None) != (kept is None):
        raise Changed("it has ended")
    if now is not None and (now[0] != kept[0] or len(now[1]) != len(kept[1]) or not _all_same(now[1], kept[1])):
        raise Changed("it has moved on")


def _all_same(one: list[Any], other: list[Any]) -> bool:
    return all(map(operator.is_, one, other))


def _parts_of_generator(value: types.GeneratorType) -> list[Any]:
    frame = value.gi_frame
    inner = [held for held in gc.get_referents(value) if type(held) in _ITERATORS]
    return [] if frame is None else [*frame.f_locals.values(), *inner, value.gi_yieldfrom]


_ITERATOR = Kind(_keep, _compare, gc.get_referents)
ITERATORS: dict[type, Kind] = {
    types.GeneratorType: Kind(_stands, _compare_generators, _parts_of_generator),
    **dict.fromkeys(_ITERATORS, _ITERATOR),
}
