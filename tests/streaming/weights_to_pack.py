"""Weights of all kinds, for the code that packs them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from weightstream.streaming.model.layout import Layout, NamedTensor, Place, make_layout
from weightstream.streaming.packing.codec import GROUP

DTYPES = [torch.bfloat16, torch.float16]


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16)


def every_value(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)


def normal(count: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return (torch.randn(count, generator=random(seed)) * 0.02).to(dtype)


WEIGHTS: dict[str, Callable[[int], torch.Tensor]] = {
    "zeros": torch.zeros,
    "minus zeros": lambda count: -torch.zeros(count),
    "one value": lambda count: torch.full((count,), -1.5),
    "heavy tails": lambda count: torch.distributions.StudentT(3.0).sample((count,)),
    "channels of other scales": lambda count: (
        torch.randn(count, generator=random(2)).view(-1, 8) * torch.logspace(-3, 3, 8)
    ).flatten(),
    "dead channels": lambda count: torch.randn(count, generator=random(3)) * (torch.arange(count) // 256 % 2) * 1e-20,
    "all of a group escaped": lambda count: torch.where(
        torch.arange(count) // GROUP == 1, torch.logspace(-30, -20, count), torch.randn(count, generator=random(4))
    ),
    "subnormal": lambda count: torch.randn(count, generator=random(5)) * 1e-40,
    "infinite": lambda count: torch.where(torch.arange(count) % 97 == 0, torch.inf, torch.ones(count)),
}


def layout_of(*tensors: torch.Tensor) -> Layout:
    module = nn.Module()
    for number, tensor in enumerate(tensors):
        module.register_buffer(f"b{number}", tensor)
    return make_layout(
        NamedTensor((name,), tensor, tensor.dtype, (Place(module._buffers, name, False),))
        for name, tensor in module._buffers.items()
    )


def filled(layout: Layout) -> torch.Tensor:
    unit = torch.full((layout.nbytes,), 9, dtype=torch.uint8)
    for spec, view in zip(layout.specs, layout.views(unit), strict=True):
        view.copy_(spec.original)
    return unit
