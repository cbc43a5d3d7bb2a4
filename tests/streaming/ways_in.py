"""Models whose blocks are entered in other ways than by a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import Layer, Transformer, X
from torch import nn
from weightstream.streaming import Streamer


class Stop(BaseException):
    """Like the host's interrupt: no ``Exception``."""


class TwoWays(Layer):
    """Never called: one method gives what the other needs, and runs only a part of the layers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("nobody calls this")

    def keys(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        _, k, v = self._split(x)
        return k, v

    def generate(self, x: torch.Tensor, keys: tuple[torch.Tensor, torch.Tensor], *, scale: float = 1.0) -> torch.Tensor:
        q, _, _ = self._split(x)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, *keys)) * self.scale * scale
        return x + self.mlp(x)

    def _split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.qkv(self.norm(x)).chunk(3, dim=-1)


class ByMethods(Transformer):
    """Its blocks are entered twice in a step, by methods."""

    def __init__(self, depth: int = 6, width: int = 32) -> None:
        super().__init__(depth, width)
        self.blocks = nn.ModuleList(TwoWays(width) for _ in range(depth))

    def forward(self, x: torch.Tensor, order: list[int] | None = None) -> torch.Tensor:
        x = self.input(x)
        for index in range(len(self.blocks)) if order is None else order:
            x = self.blocks[index].generate(x, self.blocks[index].keys(x), scale=0.5)
        return self.output(x)


class LayerByLayer(Transformer):
    """Calls the layers of its blocks one by one, but for those of ``whole`` blocks.

    Attributes:
        fails: is called in the middle of the block ``fails_in``.
    """

    def __init__(self, depth: int = 6, width: int = 32, whole: tuple[int, ...] = ()) -> None:
        super().__init__(depth, width)
        self.whole = whole
        self.fails_in = -1

    def forward(self, x: torch.Tensor, order: list[int] | None = None) -> torch.Tensor:
        x = self.input(x)
        for index in range(len(self.blocks)) if order is None else order:
            block = self.blocks[index]
            if index in self.whole:
                x = block(x)
                continue
            q, k, v = block.qkv(block.norm(x)).chunk(3, dim=-1)
            if index == self.fails_in:
                raise Stop
            x = x + block.out(nn.functional.scaled_dot_product_attention(q, k, v)) * block.scale
            x = x + block.mlp(x)
        return self.output(x)


def make(kind: Callable[..., Transformer], **arguments: Any) -> Transformer:
    torch.manual_seed(0)
    return kind(**arguments).requires_grad_(False).eval()


def run(streamer: Streamer, model: Transformer, order: list[int] | None = None) -> torch.Tensor:
    return streamer.run(lambda: model(X, order), shape=tuple(X.shape), reload=streamer.load)


KINDS = {
    "methods": ByMethods,
    "layers": LayerByLayer,
    "layers of some": lambda **sizes: LayerByLayer(whole=(1, 4), **sizes),
}
