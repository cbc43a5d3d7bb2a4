"""A model with the habits of real ones: streams of text and image tokens, first apart and then one behind the other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from weightstream.streaming import Backend, CpuBackend, VirtualMemory
from weightstream.streaming.parallel.exchange import Exchange, Wires
from weightstream.streaming.parallel.kinds import Kind
from weightstream.streaming.parallel.relay import Relay, Workers
from weightstream.streaming.parallel.tokens import TokenPart
from weightstream.streaming.split.links import Links

WIDTH, HEADS = 32, 4
WORKERS = Workers()

Attention = Callable[..., torch.Tensor]


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: Any = None, skip_reshape: bool = False
) -> torch.Tensor:
    """As the host's functions do, row by row: on a CPU kernels for other numbers of rows give other bits."""
    if not skip_reshape:
        q, k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (q, k, v))
    found = []
    for row in range(q.shape[2]):
        of_row = mask if mask is None or mask.shape[-2] == 1 else mask[..., row : row + 1, :]
        found.append(nn.functional.scaled_dot_product_attention(q[:, :, row : row + 1], k, v, of_row))
    return torch.cat(found, 2).transpose(1, 2).flatten(2)


class Rows(nn.Linear):
    """A layer that computes each row by itself, for the same reason."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = [nn.functional.linear(row, self.weight, self.bias) for row in x.flatten(0, -2)]
        return torch.stack(rows).reshape(*x.shape[:-1], -1)


class Joint(nn.Module):
    """Two streams that are changed in place, with attention among both."""

    def __init__(self) -> None:
        super().__init__()
        self.txt_qkv, self.img_qkv = Rows(WIDTH, 3 * WIDTH), Rows(WIDTH, 3 * WIDTH)
        self.out = Rows(WIDTH, WIDTH)

    def forward(
        self,
        img: torch.Tensor,
        txt: torch.Tensor,
        table: Any,
        options: dict[str, Attention],
        mask: torch.Tensor | None = None,
        spans: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        both = [self.txt_qkv(txt), self.img_qkv(img)]
        for first, end, factor in spans or ():
            both[1][:, first:end] *= factor
        q, k, v = torch.cat(both, 1).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        table = (table[0] if isinstance(table, tuple) else table)[:, :, : q.shape[2]]
        found = self.out(options["attend"](attend, q * table, k * table, v, HEADS, mask, skip_reshape=True))
        txt += found[:, : txt.shape[1]]
        img += found[:, txt.shape[1] :]
        return img, txt


class Single(nn.Module):
    """One stream, from which another is made; one attention among tokens, and one to something else."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = Attending(), Attending()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(
        self,
        x: torch.Tensor,
        options: dict[str, Attention],
        other: torch.Tensor,
        gate: torch.Tensor,
        begin: int | None = None,
        backwards: bool | None = None,
    ) -> torch.Tensor:
        x = x.flip(1) if backwards else x
        x = x + self.inner(self.norm(x), None, options) * gate
        x = x + self.outer(x, other, options)
        return x if begin is None else torch.cat([x[:, :begin], x[:, begin:] * 2], 1)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = Rows(WIDTH, WIDTH), Rows(WIDTH, 2 * WIDTH)

    def forward(self, x: torch.Tensor, other: torch.Tensor | None, options: dict[str, Attention]) -> torch.Tensor:
        k, v = self.kv(x if other is None else other).chunk(2, -1)
        return options["attend"](attend, self.q(x), k, v, heads=HEADS)


JOINT = Kind(("txt", "img"), ("img", "txt"), along={"table": 2}, spans={"spans": "img"})
SINGLE = Kind(
    ("x",),
    ("x",),
    along_one={"gate": ("x", 1)},
    least_dims=3,
    places={"begin": "x"},
    absent=("backwards",),
    attends=("inner",),
)


class Model(nn.Module):
    """Both kinds of blocks, and what a model does with tokens between them."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.joint = nn.ModuleList(Joint() for _ in range(depth))
        self.single = nn.ModuleList(Single() for _ in range(depth))
        self.skipped: set[int] = set()
        self.single_skipped: set[int] = set()
        self.mask: torch.Tensor | None = None
        self.gate = torch.ones(1, 1, WIDTH)
        self.spans: Any = None
        self.begin: int | None = None
        self.backwards: bool | None = None
        self.in_tuples = False
        self.spare_rows = 0

    def forward(self, img: torch.Tensor, txt: torch.Tensor, attention: Attention) -> torch.Tensor:
        options = {"attend": attention}
        img, txt = img.clone(), txt.clone()
        table = torch.linspace(0.5, 1.5, txt.shape[1] + img.shape[1] + self.spare_rows)[None, None, :, None]
        for number, block in enumerate(self.joint):
            if number not in self.skipped:
                given = (table, "other") if self.in_tuples else table
                img, txt = block(img, txt=txt, table=given, options=options, mask=self.mask, spans=self.spans)
                img[:, :2] += 0.5  # As a ControlNet does.
        x = torch.cat((txt, img), 1)
        for number, block in enumerate(self.single):
            if number not in self.single_skipped:
                x = block(x, options, txt[:, :1] * 0 + 1, self.gate, begin=self.begin, backwards=self.backwards)
        return x[:, txt.shape[1] :].mean(1)  # Takes all rows.


def plain(function: Attention, *args: Any, **kwargs: Any) -> torch.Tensor:
    return function(*args, **kwargs)


def run_divided(
    model: Model,
    img: torch.Tensor,
    txt: torch.Tensor,
    shares: Sequence[float],
    change: Callable[..., None] = lambda *_: None,
    backend: Callable[[int], Backend] = lambda number: CpuBackend(VirtualMemory(1, f"gpu:{number}")),
) -> tuple[list[torch.Tensor], list[TokenPart]]:
    """The outputs of all devices, each with a model of its own, and their parts."""
    count = len(shares)
    models = [copy.deepcopy(model) for _ in range(count)]
    for number, each in enumerate(models):
        change(number, each)
    relay = Relay(range(count))
    exchange = Exchange(Wires([backend(number) for number in range(count)], Links()), relay)
    parts = [TokenPart(me, shares, exchange) for me in range(count)]

    def call(me: int) -> torch.Tensor:
        lists = [(list(models[me].joint), JOINT), (list(models[me].single), SINGLE)]
        with parts[me].watching(models[me], lists):
            return models[me](img, txt, parts[me].attention)

    return relay.run([partial(call, me) for me in range(count)], WORKERS), parts
