"""Brings tensors of home to a block on another device, where code that was put into the block uses them.

The operation decides: one that is given tensors of both devices gets those of home as copies, and one that writes to a
tensor of home is done there. Copies are made anew each time, because writes to such a tensor are not noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .away import Away, Move, may_be_on

# Methods that write to their first argument and do not end in an underscore.
WRITING = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__"}
WRITING |= {"__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__", "__idiv__"}


class Meeting(TorchFunctionMode):
    """A mode of torch's functions that is on while such a block runs.

    Args:
        device: of the block.
        home: of the tensors that are brought.
        move: returns a copy of a tensor on a device.
        before: is called before anything is brought.
        after: is called after a tensor of home was written to.
    """

    def __init__(
        self,
        device: torch.device,
        home: torch.device,
        move: Move,
        before: Callable[[], Any],
        after: Callable[[], Any],
    ) -> None:
        super().__init__()
        self._device, self._home, self._move, self._before, self._after = device, home, move, before, after
        self._is_paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While this lasts nothing is brought: what runs is at home."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._is_paused or not self._is_mixed((*args, *kwargs.values())):
            return function(*args, **kwargs)
        target = kwargs.get("out", args[0] if args and _writes(function) else None)
        at_home = isinstance(target, torch.Tensor) and may_be_on(target, self._home)
        place, other = (self._home, self._device) if at_home else (self._device, self._home)
        self._before()
        moved = [self._brought(value, other, place) for value in args]
        named = {name: self._brought(value, other, place) for name, value in kwargs.items()}
        output = function(*moved, **named)
        if at_home:
            self._after()
        return output

    def _is_mixed(self, values: tuple[Any, ...]) -> bool:
        tensors = [tensor for value in values for tensor in _tensors(value)]
        if len(tensors) < 2:
            return False
        return all(any(may_be_on(tensor, place) for tensor in tensors) for place in (self._home, self._device))

    def _brought(self, value: Any, other: torch.device, place: torch.device) -> Any:
        if isinstance(value, torch.Tensor):
            if not may_be_on(value, other):
                return value
            return value.on(place) if isinstance(value, Away) else self._move(value, place)
        if isinstance(value, (list, tuple)) and any(True for _ in _tensors(value)):
            items = [self._brought(item, other, place) for item in value]
            return items if isinstance(value, list) else tuple(items)
        return value


def _writes(function: Any) -> bool:
    name = getattr(function, "__name__", "")
    return name in WRITING or (name.endswith("_") and not name.endswith("__"))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        yield from (item for item in value if isinstance(item, torch.Tensor))
