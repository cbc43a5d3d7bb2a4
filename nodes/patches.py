"""LoRA and other weight patches, as the engine asks for them. The host's own function computes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import comfy.utils
import torch

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


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
        """The patched weight exactly as the host computes it, on the load device."""
        with _weight_in_place(self._patcher.model, name, original):
            return self._patcher.patch_weight_to_device(name, device_to=self._patcher.load_device, return_weight=True)


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
