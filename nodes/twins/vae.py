"""A VAE on another device than its loader chose.

[Note: a VAE of its own]
For another GPU a VAE is built a second time, as a MODEL is (components.py). For the CPU it cannot be: with dynamic VRAM
the host's VAE has weights in the dtype of its file, which are cast when they are copied to a GPU, and nothing casts
them on a CPU (and the host's factory of a VAE makes none without dynamic VRAM). There, and if its loader makes another
VAE than the incoming one, it gets weights of its own: a VAE is small. They are those of the file, which may have more
digits, if nothing was changed.
"""

from __future__ import annotations

import copy
import logging
import weakref
from types import MethodType
from typing import Any

import comfy.model_management as mm
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher

from ...streaming import UnsupportedModelError
from ..host.contracts import check_host
from ..host.devices import same_device
from ..host.hosts import made_with
from ..host.noted_dtypes import change_dtypes
from ..state.references import carry_functions
from .components import CPU, NotAgainError, built_on
from .copies import copy_with_weights
from .takeover import carry_over, check_what_hangs_on
from .twins import build_like, factory_of, lasting_difference

logger = logging.getLogger(__name__)

# The patchers that were made for another device, by the incoming model, with the dtype in which they compute.
_made: weakref.WeakKeyDictionary[torch.nn.Module, tuple[torch.dtype | None, ModelPatcher]]
_made = weakref.WeakKeyDictionary()


def vae_on(vae: comfy.sd.VAE, device: torch.device) -> comfy.sd.VAE:
    """A VAE like ``vae`` on ``device``, computing in the dtype in which ComfyUI computes there.

    Raises:
        UnsupportedModelError: it cannot be moved; the message says why.
    """
    patcher = getattr(vae, "patcher", None)
    if patcher is None:
        raise UnsupportedModelError("it has no weights")
    check_host()
    if same_device(patcher.load_device, device):
        return vae
    if getattr(vae, "first_stage_model", patcher.model) is not patcher.model:
        raise UnsupportedModelError("somebody has put another model into it, which nobody loads")
    moved = copy.copy(vae)
    carry_functions(vae, moved, patcher.model)
    before, after = _dtypes(vae, device)
    moved.patcher = _patcher_on(patcher, device, before, after)
    if after != before:
        moved.vae_dtype = after
    moved.first_stage_model, moved.device = moved.patcher.model, device
    for name, value in vars(vae).items():
        if isinstance(value, MethodType) and value.__self__ is vae.first_stage_model:
            setattr(moved, name, MethodType(value.__func__, moved.first_stage_model))
    return moved


def _dtypes(vae: comfy.sd.VAE, device: torch.device) -> tuple[torch.dtype | None, torch.dtype | None]:
    """The dtype in which it computes, and that for ``device``: ComfyUI's choice if ComfyUI chose the first, else the
    same."""
    dtype, allowed = getattr(vae, "vae_dtype", None), getattr(vae, "working_dtypes", [])
    chosen = dtype == mm.vae_dtype(vae.patcher.load_device, allowed)
    return dtype, mm.vae_dtype(device, allowed) if chosen else dtype


def _patcher_on(
    patcher: ModelPatcher, device: torch.device, before: torch.dtype | None, after: torch.dtype | None
) -> ModelPatcher:
    if device != CPU and before == after:
        try:
            moved = built_on(patcher, device)
        except NotAgainError as error:
            logger.info("[WeightStream] the VAE is copied to %s: %s", device, error)
        else:
            return _waiting(moved, patcher, device)
    check_what_hangs_on(patcher)
    dtype, made = _made.get(patcher.model, (None, None))
    is_there = made is not None and dtype == after and same_device(made.load_device, device)
    if not is_there or lasting_difference(made, patcher, dtypes=before == after):
        made = _make(patcher, device, before, after)
        _made[patcher.model] = after, made
    return _waiting(carry_over(patcher, made.clone()), patcher, device)


def _waiting(moved: ModelPatcher, patcher: ModelPatcher, device: torch.device) -> ModelPatcher:
    """Set where its weights wait: on ``device`` if it is the CPU or with --gpu-only, else where the first one's do."""
    stays = device == CPU or patcher.offload_device == patcher.load_device != CPU
    moved.offload_device = device if stays else patcher.offload_device
    return moved


def _make(
    patcher: ModelPatcher, device: torch.device, before: torch.dtype | None, after: torch.dtype | None
) -> ModelPatcher:
    """A patcher without dynamic VRAM of the same VAE, with weights of its own."""
    factory = factory_of(patcher)
    again = build_like(patcher, factory) if factory is not None else None
    model = again.model if again is not None else copy_with_weights(patcher)
    change_dtypes(model, before, after)
    made: dict[str, Any] = {**made_with(patcher), "load_device": device}
    return ModelPatcher(model, **made)
