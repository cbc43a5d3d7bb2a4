"""Transformer blocks of plain torch, in the shapes of FLUX and Qwen-Image, and two ways to shard them over two GPUs.

[Note: head after head]
The rows of a fused weight lie head after head (query, key and value of the first head, then those of the second; of a
single block's last layer the columns likewise), so half of the features are half of the heads, and torch's own styles
can shard them. In a checkpoint they lie query after key after value: sharding a real model means to lay them out anew.
"""

from __future__ import annotations

import torch
from tensor_parallel_shapes import Shape
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.nn import functional as F

# A pair of layers as in Megatron: the first by its outputs, the second by its inputs, and sums are added up. Or every
# layer by its outputs, so that no sum is cut, and activations are put together before each second layer and after it.
WAYS = ("pairs", "columns")


class Heads(nn.Module):
    """Query, key and value: norms and the rotary embedding, then attention over as many heads as are given."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.width = shape.head_width
        self.query_norm = nn.RMSNorm(self.width)
        self.key_norm = nn.RMSNorm(self.width)

    def split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value = qkv.unflatten(-1, (-1, 3, self.width)).transpose(1, 2).unbind(-2)
        return self.query_norm(query), self.key_norm(key), value

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        """Gives batch, tokens, heads, width."""
        return F.scaled_dot_product_attention(rotate(query, rotary), rotate(key, rotary), value).transpose(1, 2)


def rotate(x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    cos, sin = rotary
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


def modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Stream(nn.Module):
    """What a double block has for the image, and again for the text."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.modulation = nn.Linear(shape.hidden, 6 * shape.hidden)
        self.qkv = nn.Linear(shape.hidden, 3 * shape.hidden)
        self.projection = nn.Linear(shape.hidden, shape.hidden)
        self.up = nn.Linear(shape.hidden, shape.mlp)
        self.down = nn.Linear(shape.mlp, shape.hidden)
        self.heads = Heads(shape)

    def begin(self, x: torch.Tensor, vector: torch.Tensor) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
        changes = list(self.modulation(F.silu(vector)).chunk(6, -1))
        return changes, self.heads.split(self.qkv(modulated(x, *changes[:2])))

    def finish(self, x: torch.Tensor, changes: list[torch.Tensor], attended: torch.Tensor) -> torch.Tensor:
        x = x + changes[2] * self.projection(attended.flatten(2))
        inner = F.gelu(self.up(modulated(x, *changes[3:5])), approximate="tanh")
        return x + changes[5] * self.down(inner)


class DoubleBlock(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.text_tokens = shape.text_tokens
        self.text, self.image = Stream(shape), Stream(shape)

    def forward(self, x: torch.Tensor, vector: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        text, image = x[:, : self.text_tokens], x[:, self.text_tokens :]
        text_changes, of_text = self.text.begin(text, vector)
        image_changes, of_image = self.image.begin(image, vector)
        joined = (torch.cat(pair, 2) for pair in zip(of_text, of_image, strict=True))
        attended = self.image.heads.attend(*joined, rotary)
        text = self.text.finish(text, text_changes, attended[:, : self.text_tokens])
        image = self.image.finish(image, image_changes, attended[:, self.text_tokens :])
        return torch.cat((text, image), 1)


class SingleBlock(nn.Module):
    """Attention and MLP beside each other. FLUX has the first two layers in one; torch's styles cannot shard that."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.modulation = nn.Linear(shape.hidden, 3 * shape.hidden)
        self.qkv = nn.Linear(shape.hidden, 3 * shape.hidden)
        self.up = nn.Linear(shape.hidden, shape.mlp)
        self.out = nn.Linear(shape.hidden + shape.mlp, shape.hidden)
        self.heads = Heads(shape)
        self.mlp_of_head = shape.mlp // shape.heads

    def forward(self, x: torch.Tensor, vector: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        shift, scale, gate = self.modulation(F.silu(vector)).chunk(3, -1)
        normed = modulated(x, shift, scale)
        attended = self.heads.attend(*self.heads.split(self.qkv(normed)), rotary)
        inner = F.gelu(self.up(normed), approximate="tanh").unflatten(-1, (-1, self.mlp_of_head))
        return x + gate * self.out(torch.cat((attended, inner), -1).flatten(2))


BLOCKS = {"double": DoubleBlock, "single": SingleBlock}
FIRST, LAST = ("qkv", "up"), ("projection", "down", "out")


def build(shape: Shape, kind: str, device: torch.device) -> nn.Module:
    """The same random weights on every device of one kind."""
    torch.manual_seed(0)
    with device:
        return BLOCKS[kind](shape).to(torch.bfloat16).eval().requires_grad_(False)


def inputs(shape: Shape, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a block is called with: tokens, the vector that modulates, cosines and sines."""
    generator = torch.Generator(device).manual_seed(1)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator, device=device).to(torch.bfloat16)

    angles = random(shape.tokens, shape.head_width)
    return random(1, shape.tokens, shape.hidden), random(1, 1, shape.hidden), torch.stack((angles.cos(), angles.sin()))


def style(name: str, way: str) -> ParallelStyle | None:
    """How the layer of that name is sharded; None where it is no linear layer."""
    last = name.rpartition(".")[2]
    if last == "modulation":
        return ColwiseParallel(output_layouts=Replicate())
    if last in FIRST:
        return ColwiseParallel()
    if last in LAST and way == "pairs":
        return RowwiseParallel()
    return ColwiseParallel(input_layouts=Shard(-1), output_layouts=Replicate()) if last in LAST else None


def shard(block: nn.Module, way: str, mesh: DeviceMesh) -> nn.Module:
    """Each device takes its half of what it has itself: all of them were made with the same weights."""
    styles = {name: style(name, way) for name, _ in block.named_modules()}
    plan = {name: chosen for name, chosen in styles.items() if chosen is not None}
    return parallelize_module(block, mesh, plan, src_data_rank=None)
