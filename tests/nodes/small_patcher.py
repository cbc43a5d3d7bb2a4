"""The host's own patcher around a model of a few numbers."""

from __future__ import annotations

from typing import Any

import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher

CPU = torch.device("cpu")


class SmallModel(torch.nn.Module):
    """Two layers of the host's kind."""

    def __init__(self) -> None:
        super().__init__()
        self.first = comfy.ops.disable_weight_init.Linear(4, 4, dtype=torch.float32)
        self.second = comfy.ops.disable_weight_init.Linear(4, 4, dtype=torch.float32)
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def memory_required(self, input_shape: Any) -> int:
        return 0

    def get_dtype(self) -> torch.dtype:
        return torch.float32


def small_patcher(kind: type[ModelPatcher] = ModelPatcher, **options: Any) -> ModelPatcher:
    return kind(SmallModel(), CPU, CPU, **options)


def difference(value: float = 1.0) -> tuple[str, tuple[torch.Tensor]]:
    """A weight patch that adds ``value`` to a layer of :class:`SmallModel`."""
    return ("diff", (torch.full((4, 4), value),))


WEIGHT = "first.weight"
