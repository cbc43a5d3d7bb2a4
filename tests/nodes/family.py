"""What is known of a diffusion model family: a published size, and what makes it tiny."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

LAYERS = ("comfy.ops.disable_weight_init.Linear", "comfy.ops.disable_weight_init.Conv1d")


@dataclass(frozen=True)
class Family:
    """One entry of the host's list of models.

    Attributes:
        size: the published model's configuration, as the host detects it.
        tiny: what is smaller in the tiny version.
        context: shape of the text conditioning; None for a model without.
        extras: shapes of further conditioning.
        values: further conditioning that is no random tensor.
        latent: shapes of what is sampled, one or several; by default a small one of the model's format.
        conditioners: names of the number embedders that it brings.
        weights: shapes of tensors that the host takes from the checkpoint to build the model.
        narrow: sizes that the host has in its code, and what they are in the tiny version.
        narrow_parts: full names of the host's classes that are given such sizes; by default layers.
        narrow_named: what these classes are given by name.
        sampler: the host's name for the one that it needs, and its options; by default any.
        since: the first of the tested versions of ComfyUI that has it.
    """

    size: dict[str, Any]
    tiny: dict[str, Any]
    context: tuple[int, ...] | None = (1, 8, 64)
    extras: dict[str, tuple[int, ...]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    latent: tuple[tuple[int, ...], ...] = ()
    weights: dict[str, tuple[int, ...]] = field(default_factory=dict)
    conditioners: tuple[str, ...] = ()
    narrow: dict[int, int] = field(default_factory=dict)
    narrow_parts: tuple[str, ...] = LAYERS
    narrow_named: dict[str, int] = field(default_factory=dict)
    sampler: tuple[str, dict[str, Any]] | None = None
    since: str = "0.30"


POOLED = {"pooled_output": (1, 64)}
MASK = {"attention_mask": torch.ones(1, 8, dtype=torch.long)}


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def vision(width: int) -> dict[str, SimpleNamespace]:
    """What CLIP Vision Encode gives."""
    states = noise(1, 5, width)
    return {"clip_vision_output": SimpleNamespace(penultimate_hidden_states=states, last_hidden_state=states)}
