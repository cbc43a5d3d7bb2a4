"""Whether a step has left what it can reach as it was. Nothing is put back here (step_state.py does that)."""

from __future__ import annotations

import array
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ...streaming import is_shown
from ...streaming.model.entries import Method
from .kinds import MISSING, Kind
from .kinds_of_code import UNKNOWN
from .reach import ATTRIBUTES, BUFFERS, MODULE, OF_EVERY_MODULE, alike

# Of these types two equal values are the same.
_PLAIN = (bool, int, float, complex, str, bytes, type(None), array.array)


def has_changed(value: Any, kind: Kind, kept: Any) -> bool:
    """Whether something else is in ``value`` than what was ``kept`` of it; also where nobody can tell."""
    if kind is ATTRIBUTES:
        return _attributes_differ(vars(value), kept)
    if kind is BUFFERS:
        return _buffers_differ(value._buffers, kept)
    if kind is MODULE:
        attributes, buffers, parameters = kept
        now = value._parameters
        exchanged = now.keys() != parameters.keys() or any(
            one is not now[name] and not is_shown(now[name]) for name, one in parameters.items()
        )
        return exchanged or _attributes_differ(vars(value), attributes) or _buffers_differ(value._buffers, buffers)
    return kind is UNKNOWN or not _same(kept, kind.keep(value))


def _attributes_differ(now: Mapping[str, Any], kept: Mapping[str, Any]) -> bool:
    """Of a module, but for what every module has and methods of ours, which come and go with the model's state."""
    for name in now.keys() | kept.keys():
        before, value = kept.get(name, MISSING), now.get(name, MISSING)
        ours = name in OF_EVERY_MODULE or isinstance(before, Method) or isinstance(value, Method)
        if not ours and not _same(before, value):
            return True
    return False


def _buffers_differ(now: Mapping[str, Any], kept: Mapping[str, Any]) -> bool:
    """Of a module. When weights move it has other buffers, which are alike; contents are compared elsewhere."""
    if now.keys() != kept.keys():
        return True
    return any(before is not now[name] and not alike(before, now[name]) for name, before in kept.items())


def _same(one: Any, other: Any) -> bool:
    """Whether two values are the same object, or containers of the same objects."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, _PLAIN):
        return bool(one == other)
    if isinstance(one, torch.Tensor):
        return _is_state(one) and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, dict):
        return [*one] == [*other] and all(map(_same, one.values(), other.values()))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(isinstance(one, (set, frozenset)) and all(map(operator.is_, one, other)) and len(one) == len(other))


def _is_state(tensor: torch.Tensor) -> bool:
    """Whether this may be the state of a generator, of which each question gives another tensor."""
    return tensor.dtype == torch.uint8 and tensor.device.type == "cpu"
