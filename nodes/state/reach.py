"""What code that runs in a step can change in place.

[Note: what is reached]
From a value everything is reached that its code can get hold of: what is in containers, in attributes, in variables
that a function shares with others, on functions and classes, in variables of modules that a pack's code names, behind
weak references, and in modules. Weights, which belong to the streamer, and torch's hooks are left out, and models of
other patchers are not entered. The arguments of a step are small, and so is what packs attach to them; most
objects are the modules of the model. If Python cannot look into an object of a pack, the step is not run again.
"""

from __future__ import annotations

import argparse
import collections
import functools
import queue
import random
import threading
import types
import weakref
from collections.abc import Iterable
from typing import Any

import comfy.sd
import numpy as np
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher

from ...streaming import is_shown
from ...streaming.model.blocks import SMALL_BUFFER_BYTES as SMALL_BUFFER_BYTES
from ...streaming.model.entries import Method
from .kinds import MISSING, OURS, SETTLED, Kind, both, is_stateless, nothing, only_parts, package_of
from .kinds_of_code import CLASS, FUNCTION, OBJECT, PYTHON_MODULE, UNKNOWN, VARIABLES, Variables, is_unknown, slots
from .kinds_of_containers import CONTAINERS, FUNCTION_WITH_CACHE, VIEWS, refill_dict
from .kinds_of_iterators import ITERATORS
from .loaded_state import ON_MODULES

# These are not looked into: the host manages the first ones, and the caller keeps tensors.
WHOLES = (BaseModel, comfy.sd.CLIP, comfy.sd.VAE, torch.Tensor)

# The attributes that every module has (weights and hooks among them), and those that the host leaves on some.
OF_EVERY_MODULE = {*vars(torch.nn.Module()), *ON_MODULES}


def kind_of(value: Any) -> Kind | None:
    """Return the kind of ``value``; None if a step could change nothing in it, or if it must not be looked into."""
    if isinstance(value, type):
        return CLASS if not is_stateless(package_of(value)) else None
    if isinstance(value, types.FunctionType) and package_of(value) == OURS:
        return None
    return _kind_of_type(type(value))


@functools.lru_cache(maxsize=4096)
def _kind_of_type(kind: type) -> Kind | None:
    if issubclass(kind, WHOLES):
        return None
    if (found := _KINDS.get(kind)) is not None:
        return found
    base = next((base for base in _KINDS if issubclass(kind, base)), None)
    if base is not None:
        more = base in _EXTENDED and (kind.__dictoffset__ or slots(kind))
        return both(_KINDS[base], OBJECT) if more else _KINDS[base]
    if kind.__module__.partition(".")[0] in SETTLED:
        return None
    return UNKNOWN if is_unknown(kind) else OBJECT


# -- modules of torch --------------------------------------------------------------------------------------------------


def _keep_of_module(module: torch.nn.Module) -> tuple[dict[str, Any], ...]:
    return vars(module).copy(), module._buffers.copy(), module._parameters.copy()


def _put_back_of_module(module: torch.nn.Module, kept: tuple[dict[str, Any], ...]) -> None:
    put_back_attributes(module, kept[0])
    refill_dict(module._buffers, kept[1])
    refill_dict(module._parameters, kept[2])


def _parts_of_module(module: torch.nn.Module) -> list[Any]:
    attributes = vars(module)
    leading = [attributes[name] for name in telling_attributes(module)]
    return [*module._modules.values(), *module._buffers.values(), *leading, type(module)]


def put_back_attributes(module: torch.nn.Module, kept: dict[str, Any]) -> None:
    """Put back the attributes of a module, except those that every module has."""
    now = vars(module)
    for name in now.keys() | kept.keys():
        before, value = kept.get(name, MISSING), now.get(name, MISSING)
        if before is value or name in OF_EVERY_MODULE or isinstance(before, Method) or isinstance(value, Method):
            continue  # Methods of ours come and go with the state of the model.
        if before is MISSING:
            del now[name]
        else:
            now[name] = before


def _put_back_of_buffers(module: torch.nn.Module, kept: dict[str, Any]) -> None:
    """Put back the buffers of a module of the model, whose contents were put back already. If weights have moved
    meanwhile the module has other buffers, which stay if they are alike."""
    now = module._buffers
    for name in now.keys() | kept.keys():
        before, value = kept.get(name, MISSING), now.get(name, MISSING)
        if before is MISSING:
            del now[name]
        elif before is not value and not alike(before, value):
            now[name] = before


def alike(before: Any, value: Any) -> bool:
    """Whether a module has a buffer like the one before in its place."""
    if not (isinstance(before, torch.Tensor) and isinstance(value, torch.Tensor)):
        return False
    if is_shown(value):
        return True  # The model was unloaded, and nobody has written to it.
    return before.device == value.device and before.dtype == value.dtype and torch.equal(before, value)


def telling_attributes(module: torch.nn.Module) -> tuple[str, ...]:
    """The names of a module's attributes that lead to others, or may do so later: no submodules and no plain values."""
    found = ((name, value) for name, value in vars(module).items() if name not in OF_EVERY_MODULE)
    return tuple(name for name, value in found if not isinstance(value, _PLAIN))


_PLAIN = (bool, int, float, str, torch.dtype, torch.device, torch.Size)

# A module of the model (step_state.py), in two parts, and a module of somebody else.
ATTRIBUTES = Kind(nothing, put_back_attributes, nothing)
BUFFERS = Kind(nothing, _put_back_of_buffers, nothing)
MODULE = Kind(_keep_of_module, _put_back_of_module, _parts_of_module)


# -- all kinds ---------------------------------------------------------------------------------------------------------


def _behind_proxy(value: Any) -> Iterable[Any]:
    try:
        return [value.__init__.__self__]
    except ReferenceError:
        return ()


def _state(get: str, put: str) -> Kind:
    """The kind of a random generator."""
    return Kind(lambda value: getattr(value, get)(), lambda value, kept: getattr(value, put)(kept), nothing)


_WEAK = Kind(lambda value: value(), nothing, lambda value: [value()])
_PROXY = only_parts(_behind_proxy)
_OBJECTS = (types.SimpleNamespace, argparse.Namespace, threading.local, queue.Queue, weakref.WeakSet)
_OBJECTS += (collections.UserDict, collections.UserList, collections.UserString, collections.ChainMap)
_OBJECTS += (weakref.WeakKeyDictionary, weakref.WeakValueDictionary)

# An object is of the first kind here of whose class it is an instance.
_KINDS: dict[type, Kind] = {
    **CONTAINERS,
    **VIEWS,
    **ITERATORS,
    types.FunctionType: FUNCTION,
    Variables: VARIABLES,
    types.ModuleType: PYTHON_MODULE,
    functools.partial: only_parts(lambda value: (value.func, value.args, value.keywords, vars(value))),
    type(functools.lru_cache(len)): FUNCTION_WITH_CACHE,
    types.MethodType: only_parts(lambda method: (method.__self__, method.__func__)),
    types.BuiltinMethodType: only_parts(lambda method: (method.__self__,)),
    types.MethodWrapperType: only_parts(lambda method: (method.__self__,)),
    **dict.fromkeys((staticmethod, classmethod), only_parts(lambda method: (method.__func__,))),
    **dict.fromkeys(_OBJECTS, OBJECT),
    weakref.WeakMethod: only_parts(lambda method: (method(),)),
    weakref.ref: _WEAK,
    **dict.fromkeys((weakref.ProxyType, weakref.CallableProxyType), _PROXY),
    ModelPatcher: only_parts(lambda patcher: (patcher.model_options, getattr(patcher, "attachments", None))),
    torch.nn.Module: MODULE,
    torch.Generator: _state("get_state", "set_state"),
    random.Random: _state("getstate", "setstate"),
    np.random.RandomState: _state("get_state", "set_state"),
    np.random.Generator: only_parts(lambda value: (value.bit_generator,)),
    np.random.BitGenerator: Kind(lambda value: value.state, lambda value, kept: setattr(value, "state", kept), nothing),
}
# Objects of a subclass of these may have attributes beside what they contain.
_EXTENDED = {*CONTAINERS, *VIEWS, functools.partial, weakref.ref, random.Random, torch.Generator}
