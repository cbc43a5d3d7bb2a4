"""A diffusion model that is in no list: as a new one that the host gets, or another pack brings."""

from __future__ import annotations

from typing import Any, ClassVar

import comfy.latent_formats
import comfy.model_base
import comfy.supported_models_base
import torch
from family import Family
from family_models import build_config
from torch import nn


class Part(nn.Module):
    """A layer that the model calls, or enters by a method; ``alone``: only what is in it is called."""

    def __init__(self, width: int, alone: bool, operations: Any, **where: Any) -> None:
        super().__init__()
        self.alone = alone
        self.norm = operations.LayerNorm(width, **where)
        self.inner = operations.Linear(width, 2 * width, **where)
        self.outer = operations.Linear(2 * width, width, **where)
        self.context = operations.Linear(64, width, **where)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        assert not self.alone
        return self.with_state(x, context)[0]

    def with_state(self, x: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert not self.alone
        state = self.context(context).mean(1, keepdim=True)
        return x + self.outer(nn.functional.silu(self.inner(self.norm(x + state)))), state


class Transformer(nn.Module):
    """Called, entered by a method, or called and then entered by a method; some parts are left out in some steps."""

    def __init__(
        self, width: int, depth: int, dtype: Any, device: Any, operations: Any, alone: bool = False, **_: Any
    ) -> None:
        super().__init__()
        where = {"dtype": dtype, "device": device}
        self.dtype = dtype
        self.first = operations.Linear(4, width, **where)
        self.parts = nn.ModuleList(Part(width, alone, operations, **where) for _ in range(depth))
        self.last = operations.Linear(width, 4, **where)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor, **_: Any) -> torch.Tensor:
        tokens = self.first(x.flatten(2).transpose(1, 2)) * (1 + timestep[:, None, None] / 1000)
        for number, part in enumerate(self.parts):
            if part.alone:
                tokens = tokens + part.outer(part.inner(part.norm(tokens)))
            elif number % 3 == 0:
                tokens = part(tokens, context)
            elif number % 3 == 1:
                tokens, _ = part.with_state(tokens, context)
            elif timestep[0] > 0.5:
                tokens, state = part.with_state(tokens, context)
                tokens = part(tokens + state, context)
        return self.last(tokens).transpose(1, 2).reshape(x.shape)


class Unknown(comfy.supported_models_base.BASE):
    unet_config: ClassVar = {"image_model": "unknown"}
    sampling_settings: ClassVar = {"shift": 1.0}
    latent_format = comfy.latent_formats.SD15

    def get_model(self, state_dict: Any, prefix: str = "", device: Any = None) -> torch.nn.Module:
        return comfy.model_base.BaseModel(self, comfy.model_base.ModelType.FLOW, device, unet_model=Transformer)


FAMILY = Family({"image_model": "unknown", "width": 64, "depth": 7}, {})


def build(family: Family = FAMILY) -> torch.nn.Module:
    return build_config(Unknown, family, {}, torch.float32)
