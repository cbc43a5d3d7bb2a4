"""What patches are, as bytes that are equal in two processes only if both compute the same weight with them.

In one process a patch is known by its object. Another one has loaded the same LoRA from the file again, so there its
tensors are compared, by digest, and all that decides how the host computes: strengths, the host's version, devices and
dtypes. What is not of a kind that is known here, such as a function of a pack, has no identity, and a weight with it is
each process's own.
"""

from __future__ import annotations

import hashlib
import sys
import threading
import types
import weakref
from collections.abc import Iterable
from typing import Any

import comfy.model_management as mm
import torch
from comfy.cli_args import args

from ..host import hosts

_ADAPTERS = "comfy.weight_adapter."
_NUMBERS = (str, bytes, int, float, bool, torch.dtype, type(None))

# Of adapters, which are the host's objects of one weight's LoRA; digesting one reads all of it.
_known: weakref.WeakKeyDictionary[Any, bytes | None] = weakref.WeakKeyDictionary()
_knowing = threading.Lock()


class UnknownPatchError(Exception):
    """Something in a patch is of a kind that is not known here."""


def identity_of_entries(entries: Iterable[tuple], context: str) -> bytes | None:
    """Return what the patches of one weight are known by; None where they are this process's own.

    Args:
        entries: as the host's patcher has them: strength, patch, strength of the model, offset, function.
        context: all else that the result depends on.
    """
    digest = hashlib.blake2b(context.encode(), digest_size=32)
    try:
        for strength, patch, model_strength, offset, function in entries:
            _feed(digest, (strength, model_strength, offset, _name_of(function)))
            _feed_patch(digest, patch)
    except UnknownPatchError:
        return None
    return digest.digest()


def computing_context(device: torch.device, module: torch.nn.Module, *more: object) -> str:
    """What the host's result depends on beside patches and weight, as text."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    libraries = (torch.__version__, torch.version.cuda, getattr(torch.version, "hip", None), hosts.VERSION)
    lora_dtype = mm.lora_compute_dtype(device)
    switches = sorted(str(one) for one in getattr(args, "fast", None) or ()), getattr(args, "deterministic", None)
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    return repr((device.type, name, libraries, lora_dtype, switches, kind, more))


def _feed_patch(digest: Any, patch: Any) -> None:
    if not type(patch).__module__.startswith(_ADAPTERS):
        _feed(digest, patch)
        return
    with _knowing:
        found, is_known = _known.get(patch), patch in _known
    if not is_known:
        found = _digest_of_adapter(patch)
        with _knowing:
            _known[patch] = found
    if found is None:
        raise UnknownPatchError
    digest.update(found)


def _digest_of_adapter(adapter: Any) -> bytes | None:
    digest = hashlib.blake2b(type(adapter).__qualname__.encode(), digest_size=32)
    # Keys are the names in its file: they decide nothing once it is loaded.
    attributes = {name: value for name, value in vars(adapter).items() if name != "loaded_keys"}
    try:
        _feed(digest, attributes)
    except UnknownPatchError:
        return None
    return digest.digest()


def _feed(digest: Any, value: Any) -> None:
    """Add a value to a digest, with its kind and its length, so that no two values add the same."""
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        if value.is_meta or value.layout is not torch.strided:
            raise UnknownPatchError
        plain = value.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
        digest.update(repr(("tensor", str(plain.dtype), tuple(plain.shape))).encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy())
    elif type(value) in _NUMBERS:
        digest.update(repr((type(value).__name__, value)).encode())
    elif type(value) in (tuple, list, torch.Size):
        digest.update(repr(("list", len(value))).encode())
        for one in value:
            _feed(digest, one)
    elif type(value) is dict and all(type(key) is str for key in value):
        digest.update(repr(("dict", sorted(value))).encode())
        for key in sorted(value):
            _feed(digest, value[key])
    else:
        raise UnknownPatchError


def _name_of(function: Any) -> str:
    """The name of a function of the host's own that is found by it; any other may be anything."""
    if function is None:
        return ""
    if isinstance(function, types.FunctionType) and function.__module__.partition(".")[0] == "comfy":
        module = sys.modules.get(function.__module__)
        if getattr(module, function.__qualname__, None) is function:
            return f"{function.__module__}.{function.__qualname__}"
    raise UnknownPatchError
