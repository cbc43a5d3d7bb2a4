"""What the host leaves on a model that it has run: weights on a device, patches in them, and handles of its memory.

[Note: copies of handles]
With dynamic VRAM modules hold handles of aimdo's memory: plain Python objects around addresses, which they free when
they die. A copy of one would free the same memory again, so a copy of a model must have none of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ...streaming import UnsupportedModelError
from ..host.devices import unload
from .references import reachable

# What dynamic VRAM sets when a model is loaded or run, in all versions of ComfyUI that were read, 0.30 to 0.40. None
# of it is needed by another loader.
ON_MODELS = {"dynamic_vbars", "dynamic_pins", "dynamic_patchers"}
ON_MODULES = {"_v", "_v_signature", "_v_weight", "_v_bias", "_v_block_faulted", "_prefetch", "_pins", "_pin_state"}
ON_MODULES |= {"_comfy_graph", "_resident_bank", "weight_lowvram_function", "bias_lowvram_function"}
ON_MODULES |= {"_v_block", "_comfy_cross_step_state"}


def take_off(patcher: ModelPatcher) -> None:
    """Have the host take a model off its device, with the patches in its weights.

    The patcher that loaded it may be gone with its patches still in, so that the host knows of nothing to unload.
    """
    unload(patcher)
    if patcher.backup or patcher.backup_buffers or patcher.model.model_loaded_weight_memory:
        patcher.detach()


def left_by_host(model: torch.nn.Module) -> Iterator[Any]:
    """Yield what the host has left on ``model`` and a copy must not have.

    Raises:
        UnsupportedModelError: it has left more than is known here.
    """
    found = [value for holder, name, value in _attributes(model) if name in _left_on(holder, model)]
    yield from (value for value in found if not isinstance(value, (type(None), bool, int, float, str)))
    kept = [value for holder, name, value in _attributes(model) if name not in _left_on(holder, model)]
    if any(type(value).__module__.partition(".")[0] == "comfy_aimdo" for value in reachable(kept, {*map(id, found)})):
        raise UnsupportedModelError("its modules hold memory of ComfyUI's dynamic VRAM in a way that is not known")


def forget(model: torch.nn.Module) -> None:
    """Delete from a copy the attributes whose values :func:`left_by_host` yields, and how the host has layers run."""
    for module in model.modules():
        for name in _left_on(module, model):
            vars(module).pop(name, None)
        if hasattr(type(module), "comfy_cast_weights"):
            vars(module).pop("comfy_cast_weights", None)


def _left_on(module: torch.nn.Module, model: torch.nn.Module) -> set[str]:
    return ON_MODELS | ON_MODULES if module is model else ON_MODULES


def _attributes(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, Any]]:
    return ((module, name, value) for module in model.modules() for name, value in vars(module).items())
