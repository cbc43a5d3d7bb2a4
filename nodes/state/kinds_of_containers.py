"""Containers: what is in them is put back only if it has changed, since other threads may be reading it.

A subclass may do more when it is written to, so the methods of the built-in class are used.
"""

from __future__ import annotations

import array
import collections
import contextvars
import gc
import io
import operator
import types
from collections.abc import Collection, Iterable
from queue import SimpleQueue
from typing import Any

import numpy as np

from .kinds import MISSING, Changed, Kind, nothing, only_parts

# A larger array is not copied but fingerprinted.
SMALL_ARRAY_BYTES = 1 << 20

# Keys of these types lead to no other objects.
_PLAIN_KEYS = (str, int, float, bool, bytes, type(None))

_OrderedDict = collections.OrderedDict


def _same(one: Collection[Any], other: Collection[Any]) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))


# -- dictionaries, lists, sets -----------------------------------------------------------------------------------------


def _items(value: dict) -> dict:
    return dict(_OrderedDict.items(value) if isinstance(value, _OrderedDict) else dict.items(value))


def refill_dict(value: dict, kept: dict) -> None:
    """Have ``value`` hold what ``kept`` does, in the same order."""
    now = _items(value)
    if _same(now.keys(), kept.keys()) and _same(now.values(), kept.values()):
        return
    base = _OrderedDict if isinstance(value, _OrderedDict) else dict
    base.clear(value)
    for name, content in kept.items():
        base.__setitem__(value, name, content)


def _parts_of_dict(value: dict) -> list[Any]:
    keys = [key for key in dict.keys(value) if not isinstance(key, _PLAIN_KEYS)]
    return [*dict.values(value), *keys, getattr(value, "default_factory", None)]


def _refill_list(value: list, kept: list) -> None:
    if not _same(list.copy(value), kept):
        list.__setitem__(value, slice(None), kept)


def _refill_set(value: set, kept: list) -> None:
    if not _same(set.copy(value), kept):
        set.clear(value)
        set.update(value, kept)


def _refill_deque(value: collections.deque, kept: list) -> None:
    if not _same(list(collections.deque.__iter__(value)), kept):
        collections.deque.clear(value)
        collections.deque.extend(value, kept)


def _refill_sequence(value: Any, kept: Any) -> None:
    if value[:] != kept:
        value[:] = kept


# -- others ------------------------------------------------------------------------------------------------------------


def _keep_of_array(value: np.ndarray) -> Any:
    if not value.flags.writeable or value.nbytes > SMALL_ARRAY_BYTES:
        return _fingerprint(value)
    return value.copy()


def _put_back_of_array(value: np.ndarray, kept: Any) -> None:
    if isinstance(kept, np.ndarray):
        value[...] = kept
    elif kept != _fingerprint(value):
        raise Changed(f"{value.nbytes:,} bytes, which were written to")


def _fingerprint(value: np.ndarray) -> object:
    """Sums of words, each over the same number in a row, and one of the bytes behind them; for an array of objects
    their identities; None for any other read-only array."""
    if value.dtype.hasobject or not value.flags.writeable:
        return tuple(map(id, value.flat)) if value.dtype.hasobject else None
    words = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    whole = words.nbytes // (8 * 256) * (8 * 256)
    sums = words[:whole].view(np.uint64).reshape(256, -1).sum(1, dtype=np.uint64)
    return sums.tobytes(), int(words[whole:].sum())


def _parts_of_array(value: np.ndarray) -> Iterable[Any]:
    return value.ravel().tolist() if value.dtype.hasobject else ()


def _content_of_variable(value: contextvars.ContextVar) -> Any:
    try:
        return value.get()
    except LookupError:
        return MISSING


def _put_back_of_variable(value: contextvars.ContextVar, kept: Any) -> None:
    if (now := _content_of_variable(value)) is not kept:
        if kept is MISSING:
            raise Changed(f"it had no value, and has {type(now).__name__}")
        value.set(kept)


def _content_of_queue(value: SimpleQueue) -> tuple[int, list[Any]]:
    held = gc.get_referents(value)
    inner = [item for one in held if type(one) is list for item in one]
    return value.qsize(), [*held, *inner]


def _compare_queues(value: SimpleQueue, kept: tuple[int, list[Any]]) -> None:
    size, held = _content_of_queue(value)
    if size != kept[0] or not _same(held, kept[1]):
        raise Changed("what waits in it is something else")


def _put_back_of_buffer(value: Any, kept: tuple[Any, int]) -> None:
    if value.getvalue() != kept[0]:
        value.seek(0)
        value.truncate()
        value.write(kept[0])
    value.seek(kept[1])


def _cached(value: Any) -> list[Any]:
    """What is in a function's cache. The cache itself stays as it is, since its entries follow from the arguments."""
    held = [one for one in gc.get_referents(value) if one is not vars(value)]
    if value.cache_info().maxsize is None:
        return [value.__wrapped__, *(one for cache in held if type(cache) is dict for one in cache.values())]
    return [one for one in held if not _is_table_of_links(one)]


def _is_table_of_links(value: Any) -> bool:
    """Whether ``value`` is the table of a cache of limited size, which only the cache itself may change."""
    return type(value) is dict and bool(value) and all(type(one).__name__ == "_lru_list_elem" for one in value.values())


# An object of a subclass of these may have attributes beside its items.
CONTAINERS: dict[type, Kind] = {
    dict: Kind(_items, refill_dict, _parts_of_dict),
    list: Kind(list.copy, _refill_list, list.copy),
    tuple: only_parts(tuple.__iter__),
    set: Kind(lambda value: list(set.__iter__(value)), _refill_set, lambda value: list(set.__iter__(value))),
    frozenset: only_parts(frozenset.__iter__),
    collections.deque: Kind(
        lambda value: list(collections.deque.__iter__(value)),
        _refill_deque,
        lambda value: list(collections.deque.__iter__(value)),
    ),
    bytearray: Kind(bytes, _refill_sequence, nothing),
    array.array: Kind(lambda value: value[:], _refill_sequence, nothing),
    np.ndarray: Kind(_keep_of_array, _put_back_of_array, _parts_of_array),
    io.BytesIO: Kind(lambda value: (value.getvalue(), value.tell()), _put_back_of_buffer, nothing),
    io.StringIO: Kind(lambda value: (value.getvalue(), value.tell()), _put_back_of_buffer, nothing),
    SimpleQueue: Kind(_content_of_queue, _compare_queues, lambda value: _content_of_queue(value)[1]),
}

# Objects that show the content of another one.
VIEWS: dict[type, Kind] = {
    contextvars.ContextVar: Kind(
        _content_of_variable, _put_back_of_variable, lambda value: [_content_of_variable(value)]
    ),
    types.MappingProxyType: only_parts(lambda value: [*value.values()]),
    memoryview: only_parts(lambda value: [value.obj]),
    **dict.fromkeys((type({}.keys()), type({}.values()), type({}.items())), only_parts(gc.get_referents)),
}
FUNCTION_WITH_CACHE = only_parts(_cached)
