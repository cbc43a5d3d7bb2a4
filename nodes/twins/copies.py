"""A second model as a copy of a first one: the modules are copied, their weights are shared or copied too."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ...streaming import UnsupportedModelError
from ..host.noted_dtypes import note_dtypes
from ..model.streamed_model import ATTRIBUTE
from ..model.text_encoder import StepCall
from ..state.loaded_state import ON_MODULES, forget, left_by_host, take_off
from ..state.references import refers_to
from .likeness import HOOKS, TORCH, held_by, is_our_hook

CANNOT_BE_CARRIED = (
    "refers to modules of the model that was loaded; connect this node directly behind the loader, and what changes "
    "the model behind this node"
)
# Of a model whose weights are shared, at most this fraction of the bytes may stay on a device.
MOST_STAYING = 0.5

# Makes the parameter or buffer of the copy.
Another = Callable[[torch.Tensor], torch.Tensor]


def copy_with_shared_weights(patcher: ModelPatcher) -> torch.nn.Module:
    """Copy the model of ``patcher``. The copy has parameters of its own, which use the same memory.

    Raises:
        UnsupportedModelError: it cannot be copied.
    """
    take_off(patcher)  # No weight is patched, or on a device, now.
    tensors = _tensors(patcher.model)
    staying = sum(tensor.nbytes for tensor in tensors if not _in_memory(tensor))
    if staying > MOST_STAYING * sum(tensor.nbytes for tensor in tensors):
        raise UnsupportedModelError("its weights stay on a device")
    return _copy(patcher, _sharing)


def copy_with_weights(patcher: ModelPatcher) -> torch.nn.Module:
    """Copy the model of ``patcher``, with weights of its own in RAM.

    Raises:
        UnsupportedModelError: it cannot be copied.
    """
    take_off(patcher)
    return _copy(patcher, _copied)


def _copy(patcher: ModelPatcher, another: Another) -> torch.nn.Module:
    model = patcher.model
    modules = {id(module) for module in model.modules()}
    if any(refers_to(_not_copied(module, modules), modules) for module in model.modules()):
        raise UnsupportedModelError(f"a function that was put on one of its modules {CANNOT_BE_CARRIED}")
    memo: dict[int, Any] = {id(tensor): another(tensor) for tensor in _tensors(model)}
    twin = object.__new__(type(model))
    memo[id(model)] = twin
    shared = {name: getattr(model, name, None) for name in ("model_config", "latent_format")}
    memo |= {id(value): value for value in shared.values()}
    # The patcher that runs the first model would bring along all that it refers to; our state is bound to that model.
    memo |= {id(getattr(model, name, None)): None for name in ("current_patcher", ATTRIBUTE)}
    memo |= {id(value): None for value in left_by_host(model)}
    held = {name: value for name, value in vars(model).items() if not isinstance(value, StepCall)}
    try:
        vars(twin).update(copy.deepcopy(held, memo))
    except Exception as error:  # Whatever the modules of another pack hold.
        raise UnsupportedModelError(f"its modules cannot be copied ({type(error).__name__}: {error})") from error
    vars(twin).pop(ATTRIBUTE, None)
    _take_off_our_hooks(twin)
    forget(twin)
    if not held_by(patcher).by_note:
        note_dtypes(twin)
    return twin


def _take_off_our_hooks(model: torch.nn.Module) -> None:
    """Remove our hooks from the copy: they act on the model that was copied."""
    for module in model.modules():
        for kind in HOOKS:
            hooks = vars(module)[kind]
            for key in [key for key, hook in hooks.items() if is_our_hook(hook)]:
                del hooks[key]


def _tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _not_copied(module: torch.nn.Module, modules: Collection[int]) -> Iterator[Any]:
    """Yield what a copy of this module would share with it: functions on this instance, and weak references. Methods of
    modules are left out, since a copy binds them anew."""
    held = [value for name, value in vars(module).items() if name not in ON_MODULES | TORCH]
    held += [hook for kind in HOOKS for hook in vars(module)[kind].values() if not is_our_hook(hook)]
    for value in held:
        is_function = callable(value) and not isinstance(value, (type, torch.nn.Module, StepCall))
        if (is_function or isinstance(value, weakref.ref)) and id(getattr(value, "__self__", None)) not in modules:
            yield value


def _sharing(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with the same memory; a copy if it stays on a device, where ComfyUI 0.30 leaves ``logit_scale``."""
    if type(tensor) is not torch.nn.Parameter:
        return tensor if _in_memory(tensor) else tensor.cpu()
    with torch.inference_mode(False):
        return torch.nn.Parameter(tensor.data if _in_memory(tensor) else tensor.data.cpu(), requires_grad=False)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(False):
        copied = tensor.data.to(device="cpu", copy=True)
        return torch.nn.Parameter(copied, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else copied


def _in_memory(tensor: torch.Tensor) -> bool:
    return tensor.device.type in ("cpu", "meta")
