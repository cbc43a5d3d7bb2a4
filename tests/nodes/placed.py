"""Tensors with values that say they are on one of several devices; an operation on two of them is an error.

FakeTensorMode does that without values. Some models of the host read values (the sizes of windows, which expert gets a
token), and run with these instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from weightstream.streaming.handoff.away import Away

ATEN = torch.ops.aten
# What goes from device to device, and what takes indices from the CPU.
COPIES = (ATEN.copy_.default, ATEN._to_copy.default)
INDEXED = (ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default, ATEN._index_put_impl_.default)


class MixedDevicesError(RuntimeError):
    """An operation was given tensors of two devices."""


class Placed(torch.Tensor):
    """Says that it is on ``place``; ``value`` is its value, in memory of the CPU."""

    value: torch.Tensor

    @staticmethod
    def __new__(cls, value: torch.Tensor, place: torch.device) -> Placed:
        placed = torch.Tensor._make_wrapper_subclass(
            cls, value.size(), strides=value.stride(), dtype=value.dtype, device=place
        )
        placed.value = value
        return placed

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operation, args, kwargs or {})

    def tolist(self) -> Any:
        """torch gives no other way."""
        return self.value.tolist()


class PlacedMode(TorchDispatchMode):
    """What is made on a device is :class:`Placed`. Within FakeTensorMode, for which torch starts no devices."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, Away) for kind in types):
            return NotImplemented
        return _run(operation, args, kwargs or {})


def _run(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    place = _place(operation, tensors)
    if (asked := kwargs.get("device")) is not None:
        place = None if asked.type == "cpu" else asked
        kwargs = kwargs | {"device": torch.device("cpu")}
    known = {id(tensor.value): tensor for tensor in tensors if isinstance(tensor, Placed)}
    with _disable_current_modes():
        output = operation(*tree_map(_value, args), **tree_map(_value, kwargs))

    def wrap(value: Any) -> Any:
        if place is None or not isinstance(value, torch.Tensor):
            return value
        return known[id(value)] if id(value) in known else Placed(value, place)

    return tree_map(wrap, output)


def _place(operation: Any, tensors: list[torch.Tensor]) -> torch.device | None:
    """Where an operation runs; None is the CPU. Of the CPU's tensors those without dimensions may be anywhere."""
    places = {tensor.device for tensor in tensors if isinstance(tensor, Placed)}
    if operation in COPIES:
        return tensors[0].device if isinstance(tensors[0], Placed) else None
    strays = [] if operation in INDEXED else [t for t in tensors if not isinstance(t, Placed) and t.dim() > 0]
    if len(places) > 1 or (places and strays):
        raise MixedDevicesError(
            f"{operation} was given tensors of {sorted(map(str, places))}, {len(strays)} of the CPU"
        )
    return places.pop() if places else None


def _value(value: Any) -> Any:
    return value.value if isinstance(value, Placed) else value
