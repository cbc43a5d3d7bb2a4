"""Small transformers for the engine's tests: real modules with real weights, no host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn
from weightstream.streaming import Counters, CpuBackend, Plan, Streamer, StreamingConfig, VirtualMemory, split_model
from weightstream.streaming.segments import cut


class Layer(nn.Module):
    """Pre-norm attention and MLP, with a buffer, as a transformer block has them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.register_buffer("scale", torch.rand(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v)) * self.scale
        return x + self.mlp(x)


class Transformer(nn.Module):
    """An input layer, ``depth`` blocks, an output layer."""

    def __init__(self, depth: int = 6, width: int = 32) -> None:
        super().__init__()
        self.input = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Layer(width) for _ in range(depth))
        self.output = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, order: list[int] | None = None) -> torch.Tensor:
        """``order`` runs the blocks in another order, or only some of them, or some of them twice."""
        x = self.input(x)
        for index in range(len(self.blocks)) if order is None else order:
            x = self.blocks[index](x)
        return self.output(x)


def make_transformer(depth: int = 6, width: int = 32, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(depth, width).requires_grad_(False).eval()


X = torch.linspace(-1, 1, 3 * 5 * 32).reshape(3, 5, 32)


# Nothing may hang on how fast this machine computes.
SETTINGS = {"slots": 2, "segment_bytes": 10_000, "headroom_bytes": 0, "thrifty": False}


def make_streamer(model: Transformer, budget: int = 10**9, learned: bool = False, **settings: int) -> Streamer:
    """A streamer on a virtual device; with ``learned`` it knows the order of the units, and streams parts of blocks."""
    config = StreamingConfig(**{**SETTINGS, **settings})
    streamer = Streamer(model, split_model(model), CpuBackend(VirtualMemory(budget)), config)
    if learned:
        learn(streamer, lambda: model(X))
    return streamer


def learn(streamer: Streamer, forward: Callable[[], object]) -> None:
    """Run the steps that teach a streamer its model, and leave it unloaded with fresh counters."""
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    for _ in range(3):
        streamer.run(forward)
    assert streamer.profile.learned
    streamer.close()
    streamer.counters = streamer._stalls._counters = Counters()


def hand_plan(streamer: Streamer, streamed: Iterable[int], slots: int) -> Plan:
    """A plan that streams exactly these units."""
    segments = cut(streamer.outline, frozenset(streamed), streamer.profile, streamer.config.segment_bytes)
    slot_bytes = max(segment.nbytes for segment in segments)
    return Plan(streamer.outline, segments, min(slots, len(segments)), slot_bytes)


def units_of(streamer: Streamer, blocks: Iterable[int]) -> list[int]:
    return [unit for block in blocks for unit in streamer.outline.block_units[block]]


def budgets(streamer: Streamer) -> Iterator[int]:
    """From everything resident down to one slot."""
    for step in range(9):
        yield streamer.model_bytes - (streamer.model_bytes - streamer.minimum_bytes) * step // 8
