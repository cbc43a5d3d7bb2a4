"""Exchanges tensors among the arguments of a block for others, in whatever holds them, and back.

Lists and dictionaries are searched at any depth. So are objects (a dataclass, say, or a cache) and what functions have
closed over, but not in an argument that is a dictionary itself: options hold what belongs to any code. Whether there
are objects or functions that were not searched is in :attr:`Exchange.has_strangers`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from enum import Enum
from types import CellType, FunctionType
from typing import Any, NamedTuple
from uuid import UUID

import torch
from torch import nn

# What is done to a tensor.
Change = Callable[[torch.Tensor], torch.Tensor]
Function = Callable[..., Any]

# Values of these classes hold no tensor.
SIMPLE = (str, int, float, complex, bool, bytes, type(None), type, Enum, UUID, torch.dtype, torch.device)


class Exchange:
    """Arguments of one call, and what they held before it.

    Args:
        move: returns what takes the place of a tensor.
        names: keys of dictionaries below which functions are wrapped.
        wrap: returns what takes the place of such a function.
        move_later: as ``move``, for tensors that a dictionary holds; None to use ``move`` for these too.
        ignored: keys of dictionaries below which nothing is exchanged.

    Attributes:
        has_strangers: whether there are objects or functions that were not searched.
    """

    def __init__(
        self,
        move: Change,
        names: Collection[str] = (),
        wrap: Callable[[Function], Function] = lambda function: function,
        move_later: Change | None = None,
        ignored: Collection[str] = (),
    ) -> None:
        self._move, self._names, self._wrap, self._ignored = move, names, wrap, ignored
        self._move_later = move if move_later is None else move_later
        self._containers: dict[int, _Container] = {}
        self.has_strangers = False

    def all_of(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Arguments with their tensors moved; whatever else holds tensors is changed in place until :meth:`undo`."""
        return (
            tuple(self._exchange(value, own=not isinstance(value, dict)) for value in args),
            {name: self._exchange(value, own=not isinstance(value, dict)) for name, value in kwargs.items()},
        )

    def _exchange(self, value: Any, own: bool, named: bool = False, later: bool = False) -> Any:
        """Exchange an argument or a part of one. It is ``own`` unless the argument is a dictionary, ``named`` if it is
        below one of the names, and for ``later`` if it is in a dictionary."""
        if isinstance(value, SIMPLE):
            return value
        if isinstance(value, torch.Tensor):
            return self._move_later(value) if later else self._move(value)
        if isinstance(value, tuple):
            return _tuple_of(value, [self._exchange(item, own, named, later) for item in value])
        if named and callable(value):
            return self._wrap(value)
        if id(value) in self._containers:
            return value
        holds = isinstance(value, (list, dict))
        before = dict(_items(value)) if own or holds else {}
        if before or holds:
            self._exchange_in(value, before, own, named, later or isinstance(value, dict))
        elif not (own and isinstance(value, FunctionType)):
            self.has_strangers = True
        return value

    def _exchange_in(self, value: Any, before: dict[Any, Any], own: bool, named: bool, later: bool) -> None:
        now: dict[Any, Any] = {}
        self._containers[id(value)] = _Container(value, before, now)
        for key, item in before.items():
            if key in self._ignored:
                now[key] = item
                continue
            now[key] = self._exchange(item, own, named or key in self._names, later)
            if now[key] is not item:
                _put(value, key, now[key])

    def undo(self, change: Change) -> None:
        """The call is over: put back what was exchanged, and make ``change`` to tensors that the call has put in."""
        for container in self._containers.values():
            container.restore(change)


class _Container(NamedTuple):
    """A list, dictionary or object among a block's arguments: what it held, and what it held while the block ran."""

    value: Any
    before: dict[Any, Any]
    now: dict[Any, Any]

    def restore(self, change: Change) -> None:
        known = {id(item) for item in self.before.values()}
        back = {id(now): self.before[key] for key, now in self.now.items()}  # Fewer, if a move has failed.
        for key, item in _items(self.value):
            if id(item) not in known:
                _put(self.value, key, back[id(item)] if id(item) in back else mapped(item, change))


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    """Places where tensors may be in a list, a dictionary or an object, or in what a function has closed over."""
    if isinstance(value, dict):
        yield from list(value.items())
    elif isinstance(value, list):
        yield from enumerate(list(value))
    elif isinstance(value, FunctionType):
        for number, cell in enumerate(value.__closure__ or ()):
            if isinstance(content := _content(cell), (torch.Tensor, tuple, list, FunctionType)):
                yield number, content
    elif not isinstance(value, (type, nn.Module)):
        names = [*getattr(value, "__dict__", ()), *getattr(type(value), "__slots__", ())]
        for name in names:
            if isinstance(item := getattr(value, name, None), (torch.Tensor, tuple, list, dict)):
                yield name, item


def _content(cell: CellType) -> Any:
    """What a function has closed over; None if nothing was assigned yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _put(value: Any, key: Any, item: Any) -> None:
    if isinstance(value, (list, dict)):
        value[key] = item
    elif isinstance(value, FunctionType):
        value.__closure__[key].cell_contents = item
    else:
        object.__setattr__(value, key, item)  # A dataclass may be frozen.


def _tuple_of(kind: tuple, items: list[Any]) -> tuple:
    if all(new is old for new, old in zip(items, kind, strict=True)):
        return kind
    return type(kind)(*items) if hasattr(kind, "_fields") else tuple(items)


def mapped(value: Any, change: Change, seen: set[int] | None = None) -> Any:
    """``value`` with its tensors changed; whatever holds them stays the same object, but for tuples."""
    if isinstance(value, torch.Tensor):
        return change(value)
    seen = set() if seen is None else seen
    if isinstance(value, tuple):
        return _tuple_of(value, [mapped(item, change, seen) for item in value])
    if id(value) not in seen:
        seen.add(id(value))
        for key, item in _items(value):
            if (changed := mapped(item, change, seen)) is not item:
                _put(value, key, changed)
    return value
