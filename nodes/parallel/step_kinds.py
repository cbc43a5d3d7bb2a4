"""What decides which kernels a step runs, as values to compare (verified.py, Note: verified, not believed)."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Mapping
from functools import partial
from typing import Any

import torch
from comfy.controlnet import ControlBase


def is_in_effect(entry: Mapping[str, Any], sigma: torch.Tensor) -> bool:
    """Whether the host computes this prompt at this step: some begin and end at a sigma."""
    start, end = entry.get("timestep_start"), entry.get("timestep_end")
    if start is not None and sigma[0] > start:
        return False
    return end is None or not sigma[0] < end


def describe(entry: Mapping[str, Any], sigma: torch.Tensor) -> tuple[Hashable, ...]:
    """Of a prompt: the shapes of all that the model is given, its area, and what acts on it at this step."""
    shapes = [(name, _shape(getattr(value, "cond", value))) for name, value in entry.get("model_conds", {}).items()]
    area, controls = entry.get("area"), []
    control = entry.get("control")
    while control is not None:
        controls.append((type(control).__qualname__, _acts(control, sigma)))
        control = getattr(control, "previous_controlnet", None)
    others = [(name, _shape(entry.get(name))) for name in ("mask", "gligen", "hooks", "default")]
    return tuple(shapes), None if area is None else tuple(area), tuple(controls), tuple(others)


def _acts(control: ControlBase, sigma: torch.Tensor) -> bool:
    """Whether a ControlNet does something at this step: some begin and end at a sigma."""
    span = control.timestep_range
    return span is None or not (sigma[0] > span[0] or sigma[0] < span[1])


def _shape(value: Any) -> Hashable:
    """What of a value decides which kernels run: models choose their ways by numbers and names."""
    if isinstance(value, (bool, int, float, str)):
        return type(value).__qualname__, value
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(map(_shape, value))
    return type(value).__qualname__


def is_data(value: Any) -> bool:
    """Whether there is nothing in a value but numbers, names and tensors, which do nothing."""
    if isinstance(value, dict):
        return all(map(is_data, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(is_data, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.Tensor))


def names(value: Any) -> Hashable:
    """What options consist of, by names: functions and classes, not numbers."""
    if isinstance(value, (bool, str)):
        return value
    if isinstance(value, dict):
        return tuple((str(name), names(each)) for name, each in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(names, value))
    if isinstance(value, torch.Tensor):
        return _shape(value)
    if isinstance(value, partial):
        return "partial", names(value.func)
    if isinstance(value, torch.nn.Module):
        return type(value).__qualname__, make_of(value)
    named = getattr(value, "__qualname__", None)
    return named if isinstance(named, str) else type(value).__qualname__


# Of models, what :func:`make_of` has found.
_makes: weakref.WeakKeyDictionary[torch.nn.Module, int] = weakref.WeakKeyDictionary()


def make_of(model: torch.nn.Module) -> int:
    """Tells models apart that have a name in common: by the classes of all layers, and the dtypes and shapes of their
    weights."""
    if model not in _makes:
        layers = [(type(module).__module__, type(module).__qualname__) for module in model.modules()]
        weights = [
            (name, type(weight).__qualname__, weight.dtype, tuple(weight.shape))
            for name, weight in model.named_parameters()
        ]
        _makes[model] = hash((*layers, *weights))
    return _makes[model]
