"""Whether two models compute the same: their modules, what somebody has put on those, their settings and weights.

A model that a loader makes a second time takes the place of the incoming one only if both are alike, since somebody may
have changed the incoming one in place, even by a single number.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ...streaming import take_apart
from ...streaming.model.entries import Method
from ..host.noted_dtypes import NOTE, PLAIN, noted_dtype
from ..model.patcher import StreamedModelPatcher
from ..model.streamed_model import ATTRIBUTE
from ..model.text_encoder import StepCall
from ..state.loaded_state import ON_MODELS, ON_MODULES
from .equality import first_difference

OUR_PACKAGE = __name__.rpartition(".nodes.")[0]

# What the host writes to modules while it loads and runs a model.
ABOUT_LOADING = {"device", "training", "seed_key", "comfy_cast_weights", "prev_comfy_cast_weights", "skip_injection"}
ABOUT_LOADING |= {"comfy_force_cast_weights", "comfy_patched_weights", "lowvram_patch_counter", "model_lowvram"}
ABOUT_LOADING |= {"model_loaded_weight_memory", "model_offload_buffer_memory", "current_weight_patches_uuid"}
ABOUT_LOADING |= {"weight_function", "bias_function", "can_assign_sd", "manual_cast_dtype", "latent_shapes"}
# What some of the host's models keep of a run.
ABOUT_LOADING |= {"affline_emb", "affline_scale_log_info", "crossattn_emb", "_kv_cache_entries", "_visual_cache"}
ABOUT_LOADING |= {"execution_device", "current_patcher", ATTRIBUTE} | ON_MODELS | ON_MODULES
# What the host resets before it encodes, to the values in ``options_default``.
RESET_BEFORE_ENCODING = {"layer", "layer_idx", "return_projected_pooled"}
HOOKS = ("_forward_pre_hooks", "_forward_hooks")
# What torch itself keeps on a module, hooks aside.
TORCH = frozenset(vars(torch.nn.Module()))

SETTINGS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.Size)
# How deep nested objects are looked into, and how many values of each.
DEPTH, MOST_VALUES = 4, 10_000


@dataclass(frozen=True)
class Held:
    """A model as its loader and others have left it, without the host's patches.

    Attributes:
        model: the model.
        originals: those of weights and buffers that the host has replaced while it is loaded, by their names.
        by_note: whether its tensors compute in the dtype that is noted on their module, not in that of their file.
    """

    model: torch.nn.Module
    originals: Mapping[str, torch.Tensor]
    by_note: bool


def held_by(patcher: ModelPatcher) -> Held:
    """The model of ``patcher``, which may be loaded."""
    originals = {name: kept.weight for name, kept in patcher.backup.items()}
    originals |= getattr(patcher, "backup_buffers", {})
    return Held(patcher.model, originals, patcher.is_dynamic() or isinstance(patcher, StreamedModelPatcher))


def difference(one: Held, other: Held, dtypes: bool = True) -> str:
    """Return the name of the first module or tensor in which two models differ; an empty string if they are alike.
    Without ``dtypes`` they may compute in different dtypes.
    """
    for this, that in zip_longest(_modules(one.model), _modules(other.model)):
        if this != that:
            return (that or this)[0] or type(other.model).__name__
    pairs = []
    for (name, this, dtype), (other_name, that, wanted) in zip(_tensors(one), _tensors(other), strict=False):
        if name != other_name:
            return name  # A module occurs twice, but its tensors are listed once.
        if dtypes and None not in (dtype, wanted) and dtype != wanted:
            return name
        pairs.append((name, this, that))
    return first_difference(pairs)


# -- modules -----------------------------------------------------------------------------------------------------------


def _modules(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules(remove_duplicate=False):
        held = {**module._parameters, **module._buffers}
        shapes = {name: tensor.shape for name, tensor in held.items() if tensor is not None}
        hooks = [hook for kind in HOOKS for hook in vars(module)[kind].values() if not is_our_hook(hook)]
        yield name, (_class(type(module)), _attributes(module), shapes, _described(hooks, DEPTH))


def _attributes(module: torch.nn.Module) -> dict[str, Any]:
    """Settings, functions and other things on this one instance. A method of ours counts as what it replaces."""
    left_out = ABOUT_LOADING | TORCH
    if hasattr(module, "options_default"):
        left_out = left_out | RESET_BEFORE_ENCODING
    found = {}
    for name, value in vars(module).items():
        if isinstance(value, Method):
            value = value.instead_of
            if value is None:
                continue
        if name not in left_out and not name.endswith(NOTE) and not isinstance(value, StepCall):
            found[name] = _described(value, DEPTH)
    return found


def is_our_hook(hook: Any) -> bool:
    """Whether a hook on a module is one of this pack."""
    return _name(hook)[0].startswith(f"{OUR_PACKAGE}.")


def _class(kind: type) -> tuple[tuple[str, str], list[CodeType]]:
    """The name of a class and the code of its methods: a pack may have replaced it by a class of the same name."""
    methods = [value for name, value in sorted(vars(kind).items()) if isinstance(value, FunctionType)]
    return _name(kind), [method.__code__ for method in methods]


def _name(thing: Any) -> tuple[str, str]:
    # By name, since some of the host's classes and functions are made anew for each model. Other objects count by their
    # type and are not asked: some of the host's say that they have no such attribute.
    named = thing if isinstance(thing, (type, FunctionType, BuiltinFunctionType, MethodType)) else type(thing)
    return named.__module__ or "", named.__qualname__


def _described(value: Any, depth: int) -> Any:
    """A description that is equal for what computes the same, as far as can be told."""
    if isinstance(value, enum.Enum):
        return _name(type(value)), value.name
    if isinstance(value, SETTINGS):
        return repr(value)  # As text a NaN equals a NaN, and True is not 1.
    if isinstance(value, torch.Tensor):
        return _described_tensor(value)
    if isinstance(value, type) or depth == 0:
        return _name(value)
    if isinstance(value, (list, tuple)):
        return [_described(each, depth - 1) for each in value[:MOST_VALUES]]
    if isinstance(value, dict):
        return {repr(key): _described(each, depth - 1) for key, each in [*value.items()][:MOST_VALUES]}
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))[:MOST_VALUES] if all(isinstance(one, SETTINGS) for one in value) else len(value)
    return _name(value), _described(_content(value), depth - 1)


def _content(value: Any) -> Any:
    """What a function or an object consists of. None for modules, which are compared in their own place, and for
    patchers, which belong to a machine or a run."""
    if isinstance(value, (torch.nn.Module, ModelPatcher)):
        return None
    if isinstance(value, FunctionType):
        return [_cell(cell) for cell in value.__closure__ or ()], value.__defaults__, value.__kwdefaults__
    if isinstance(value, MethodType):
        return _name(value.__func__), value.__self__
    if isinstance(value, partial):
        return value.func, value.args, value.keywords
    if isinstance(value, BuiltinFunctionType):
        return value.__name__
    return getattr(value, "__dict__", None)


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # A variable that has no value yet.
        return None


def _described_tensor(tensor: torch.Tensor) -> Any:
    if type(tensor) not in PLAIN or tensor.is_meta or tensor.layout != torch.strided:
        return str(type(tensor)), tuple(tensor.shape)
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return tuple(tensor.shape), str(tensor.dtype), hashlib.blake2b(data.numpy()).hexdigest()


# -- weights -----------------------------------------------------------------------------------------------------------


def plain_tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """All plain tensors of a model, including those of which other tensors consist."""
    return (tensor for _, tensor, _ in _tensors(Held(model, {}, by_note=True)))


def _tensors(held: Held) -> Iterator[tuple[str, torch.Tensor, torch.dtype | None]]:
    """All plain tensors, including those of which other tensors consist, by name, each with the dtype in which it
    computes; None if that is not known."""
    for prefix, module in held.model.named_modules():
        for name, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is None:
                continue
            full = f"{prefix}.{name}" if prefix else name
            tensor = held.originals.get(full, tensor)
            # Not detach(): for a Parameter that was made in a node's inference mode and that the host has moved outside
            # of it, that returns a tensor of which torch makes no views.
            parts = take_apart(full, tensor.data)[0]
            dtype = noted_dtype(module, name) if held.by_note else tensor.dtype
            for part in parts.values():
                yield full, part, dtype if len(parts) == 1 else None
