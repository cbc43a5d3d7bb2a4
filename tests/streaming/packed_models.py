"""A small transformer in bfloat16 whose weights stream packed."""

from __future__ import annotations

import torch
from models import SETTINGS, Transformer, make_transformer
from weightstream.streaming import CpuBackend, PinBudget, Streamer, StreamingConfig, VirtualMemory, cut_model
from weightstream.streaming.config import PackingMode
from weightstream.streaming.planning.plan import Plan

WIDTH = 128
X = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(7)).to(torch.bfloat16)
# Room for a ring, and to unpack in, and for little else: of 1.1 MB of weights.
BUDGET = 450_000
# Of each block qkv, out and both layers of the MLP; the norm and the biases are too small.
PACKED_IN_BLOCK = 4


def make_model(seed: int = 0) -> Transformer:
    return make_transformer(4, WIDTH, seed).to(torch.bfloat16)


def spread(shape: torch.Size) -> torch.Tensor:
    """Values with forty exponents, equally often."""
    random = torch.Generator().manual_seed(3)
    exponents = torch.randint(-43, -3, shape, generator=random)
    return torch.randn(shape, generator=random).sign() * 2.0**exponents


def make(
    model: Transformer, backend: CpuBackend | None = None, pins: PinBudget | None = None, **settings: object
) -> Streamer:
    """A streamer that packs and keeps nothing, unless ``settings`` say otherwise."""
    packing = {"packing": PackingMode.ON, "stream_all": True, "adaptive": False}
    config = StreamingConfig(**{**SETTINGS, **packing, **settings})
    return Streamer(model, cut_model(model), backend or CpuBackend(VirtualMemory(10**9)), config, pins)


def step(streamer: Streamer, model: Transformer, **options: object) -> torch.Tensor:
    return streamer.run(lambda: model(X, **options), shape="x", reload=streamer.load)


def learned(streamer: Streamer, model: Transformer) -> Plan:
    """Load and run until weights are packed; returns the plan."""
    streamer.load(streamer.plan_for(BUDGET))
    for _ in range(3):
        step(streamer, model)
    assert streamer.plan is not None
    return streamer.plan


def why(streamer: Streamer) -> str:
    """Why weights do not stream packed, as the status says it, and the line too, once."""
    text, line = streamer.snapshot().why_unpacked, streamer.explain()
    assert line.endswith(text)
    assert line.count("packed: ") == text.count("packed: ") <= 1
    return text
