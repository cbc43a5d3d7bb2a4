"""LoRA and other weight patches, as the engine asks for them. The host's own functions compute them.

[Note: two ways of the host]
ComfyUI computes a patched weight in one of two ways, whose results differ in the last bits. Its older way casts the
weight to a dtype of its own for LoRA (float16 on most GPUs). With dynamic VRAM, its default on NVIDIA cards, it
computes in the dtype in which the layer runs, except for layers of at most 16 KiB and for patches that change a
weight's shape, which go the older way. An image is the same as ComfyUI's own only if ours goes the way that
ComfyUI's own loader would go in this process, so that is what decides here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import comfy.float
import comfy.lora
import comfy.memory_management
import comfy.model_management as mm
import comfy.utils
import torch

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

# The host loads a module of at most so many bytes whole, with dynamic VRAM on (ModelPatcherDynamic.load).
PRELOADED_MODULE_BYTES = 16 * 1024


class PatchSignature:
    """The patches of one weight, in their order.

    Two signatures are equal when the same patch objects act with the same strengths, offsets and functions. Patch
    objects are compared by identity, and kept alive so that an identity is never used twice.
    """

    def __init__(self, entries: list[tuple]) -> None:
        self._entries = tuple(entries)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PatchSignature) or len(self._entries) != len(other._entries):
            return False
        return all(_same_patch(mine, theirs) for mine, theirs in zip(self._entries, other._entries, strict=True))

    __hash__ = None  # type: ignore[assignment]


def _same_patch(mine: tuple, theirs: tuple) -> bool:
    strength, patch, model_strength, offset, function = mine
    return (
        patch is theirs[1]
        and function is theirs[4]
        and (strength, model_strength, offset) == (theirs[0], theirs[2], theirs[3])
    )


class HostPatches:
    """The patches of a MODEL (:class:`streaming.Patches`)."""

    def __init__(self, patcher: ModelPatcher) -> None:
        self._patcher = patcher

    def signature(self, name: str) -> PatchSignature | None:
        entries = self._patcher.patches.get(name)
        return PatchSignature(entries) if entries else None

    def compute(self, name: str, original: torch.Tensor) -> torch.Tensor:
        """The patched weight exactly as the host computes it, on the load device (Note: two ways of the host)."""
        if self._goes_the_dynamic_way(name, original):
            return self._compute_when_run(name, original)
        with _weight_in_place(self._patcher.model, name, original):
            return self._patcher.patch_weight_to_device(name, device_to=self._patcher.load_device, return_weight=True)

    def _goes_the_dynamic_way(self, name: str, original: torch.Tensor) -> bool:
        if not comfy.memory_management.aimdo_enabled or mm.is_device_cpu(self._patcher.load_device):
            return False
        module, attribute = comfy.utils.resolve_attr(self._patcher.model, name)
        if attribute not in ("weight", "bias") or not hasattr(module, "comfy_cast_weights"):
            return False
        shape = comfy.lora.calculate_shape(self._patcher.patches[name], original, name)
        return mm.module_size(module) > PRELOADED_MODULE_BYTES and shape == original.shape

    def _compute_when_run(self, name: str, original: torch.Tensor) -> torch.Tensor:
        """As the host's cast of a dynamic weight does just before its layer runs."""
        dtype = self._patcher.model.get_dtype_inference()
        weight = original.to(device=self._patcher.load_device, dtype=dtype, copy=True)
        patched = comfy.lora.calculate_weight(self._patcher.patches[name], weight, name, intermediate_dtype=dtype)
        seed = comfy.utils.string_to_seed(name.rpartition(".")[0])
        return comfy.float.stochastic_rounding(patched, original.dtype, seed=seed)


@contextmanager
def _weight_in_place(model: torch.nn.Module, name: str, weight: torch.Tensor) -> Iterator[None]:
    """The host reads the weight to patch from the model, so it is there for as long as that takes."""
    holder, attribute = comfy.utils.resolve_attr(model, name)
    before = holder._parameters[attribute]
    with torch.inference_mode(False):
        holder._parameters[attribute] = torch.nn.Parameter(weight.detach(), requires_grad=False)
    try:
        yield
    finally:
        holder._parameters[attribute] = before
