"""Small transformers for the engine's tests: real modules with real weights, no host."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn
from weightstream.streaming import (
    Checkpoint,
    Counters,
    CpuBackend,
    PinBudget,
    Plan,
    Streamer,
    StreamingConfig,
    VirtualMemory,
    cut_model,
)
from weightstream.streaming.planning.segments import cut
from weightstream.streaming.sharing.share import NoShare


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
SETTINGS = {"slots": 2, "segment_bytes": 10_000, "headroom_bytes": 0}


def make_streamer(model: Transformer, budget: int = 10**9, learned: bool = False, **settings: int) -> Streamer:
    """A streamer on a virtual device; with ``learned`` it knows the order of the units, and streams parts of blocks."""
    config = StreamingConfig(**{**SETTINGS, **settings})
    streamer = Streamer(model, cut_model(model), CpuBackend(VirtualMemory(budget)), config)
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
    vars(streamer.counters).update(vars(Counters()))


def hand_plan(streamer: Streamer, streamed: Iterable[int], slots: int) -> Plan:
    """A plan that streams exactly these units."""
    segments = cut(streamer.outline, frozenset(streamed), streamer.profile, streamer.config.segment_bytes)
    slot_bytes = max(segment.nbytes for segment in segments)
    return Plan.streaming(streamer.outline, segments, slots * slot_bytes)


def units_of(streamer: Streamer, blocks: Iterable[int]) -> list[int]:
    return [unit for block in blocks for unit in streamer.outline.block_units[block]]


def budgets(streamer: Streamer) -> Iterator[int]:
    """From everything resident down to one slot."""
    for step in range(9):
        yield streamer.model_bytes - (streamer.model_bytes - streamer.minimum_bytes) * step // 8


class Doubled:
    """A patch that doubles some weights."""

    def __init__(self, names: set[str]) -> None:
        self.names = names
        self.computed: list[str] = []

    def signature(self, name: str) -> object | None:
        return "doubled" if name in self.names else None

    def compute(self, name: str, original: torch.Tensor) -> torch.Tensor:
        self.computed.append(name)
        return original * 2


class Strength(NamedTuple):
    """A number by which a weight is multiplied, and whether other processes know it by that."""

    number: float
    known: bool

    def identity(self) -> bytes | None:
        return repr(self.number).encode() if self.known else None


class Scaled:
    """A patch that multiplies some weights by numbers, by which other processes know it too if it is ``known``."""

    def __init__(self, strengths: dict[str, float], known: bool = True) -> None:
        self.strengths = strengths
        self.known = known
        self.computed: list[str] = []

    def signature(self, name: str) -> object | None:
        return Strength(self.strengths[name], self.known) if name in self.strengths else None

    def compute(self, name: str, original: torch.Tensor) -> torch.Tensor:
        self.computed.append(name)
        return original * self.strengths[name]


class PinningBackend(CpuBackend):
    """Knows what is page-locked, and locks no more than it is told to.

    Attributes:
        registered: bytes by address.
        requests: registrations asked for.
        refused: numbers of those that fail, from 1 on.
        permits: registrations that may go on; None where all may. Others wait.
        waits: one release for each that waits, or has waited.
    """

    def __init__(self, refused: Iterable[int] = (), permits: int | None = None, budget: int = 10**9) -> None:
        super().__init__(VirtualMemory(budget))
        self.registered: dict[int, int] = {}
        self.requests = 0
        self.refused = refused
        self.permits = threading.Semaphore(permits) if permits is not None else None
        self.waits = threading.Semaphore(0)

    def register(self, buffer: torch.Tensor) -> str | None:
        self.requests += 1
        if self.requests in self.refused:
            return "page-locking failed (error 2)"
        self.waits.release()
        if self.permits is not None:
            self.permits.acquire()
        self.registered[buffer.data_ptr()] = buffer.nbytes
        return None

    def unregister(self, address: int) -> None:
        del self.registered[address]

    def let_go_on(self) -> None:
        """Nobody waits any more."""
        assert self.permits is not None
        self.permits.release(10_000)


# Many pieces, few chunks: everything that can wait for another does.
SMALL_RING = {"chunk_bytes": 2048, "chunks": 3, "read_threads": 2, "build_threads": 1, "fill_threads": 2}


def output_with(model: nn.Module, strengths: Mapping[str, float], x: torch.Tensor) -> torch.Tensor:
    """What a model gives while these of its weights are so many times as large."""
    before = {name: model.get_parameter(name).clone() for name in strengths}
    for name, strength in strengths.items():
        model.get_parameter(name).mul_(strength)
    output = model(x)
    for name, tensor in before.items():
        model.get_parameter(name).copy_(tensor)
    return output


class Stored:
    """A transformer whose weights are views of a file.

    Attributes:
        plain: the same weights in memory, for comparison.
        written: its output for ``X``, or for what ``X`` is in its dtype.
    """

    def __init__(
        self,
        folder: Path,
        backend: CpuBackend | None = None,
        pins: PinBudget | None = None,
        watch: Callable[[object], None] = lambda progress: None,
        change: Callable[[Transformer], None] = lambda model: None,
        stored: torch.dtype = torch.float32,
        dtype: torch.dtype | None = None,
        seed: int = 0,
        depth: int = 6,
        width: int = 32,
        share: NoShare | None = None,
        **settings: Any,
    ) -> None:
        self.path = folder / f"model-{seed}.safetensors"
        self.plain = make_transformer(depth, width, seed).to(stored)
        if not self.path.exists():
            save_file(self.plain.state_dict(), self.path)
        self.checkpoint = Checkpoint.open(self.path)
        self.model = make_transformer(depth, width, seed + 1)
        self.model.load_state_dict(self.checkpoint.state_dict(), assign=True)
        self.model.requires_grad_(False)
        for model in (self.plain, self.model):
            change(model)
        self.plain.to(dtype or stored)
        self.x = torch.linspace(-1, 1, 3 * 5 * width).reshape(3, 5, width).to(dtype or stored)
        self.expected = self.plain(self.x)
        self.backend = backend or PinningBackend()
        self.pins = pins or PinBudget()
        blocks = cut_model(self.model, (lambda module, name, tensor: dtype or stored), self.checkpoint.locate)
        config = StreamingConfig(**{**SETTINGS, **SMALL_RING, "adaptive": False, **settings})
        self.streamer = Streamer(self.model, blocks, self.backend, config, self.pins, watch=watch, share=share)

    @property
    def half(self) -> Plan:
        """Some blocks resident, some streamed."""
        return self.streamer.plan_for(self.streamer.minimum_bytes + 2 * self.streamer.outline.block_bytes(0))

    @property
    def least(self) -> Plan:
        """As much streamed as possible."""
        return self.streamer.plan_for(self.streamer.minimum_bytes)

    def tensor_bytes(self, units: list[int] | None = None) -> int:
        """Bytes of tensors, as they are in the file, of units and of the rest."""
        blocks = self.streamer.blocks
        chosen = blocks.units if units is None else [blocks.units[unit] for unit in units]
        return sum(spec.original.nbytes for unit in (*chosen, blocks.rest) for spec in unit.layout.specs)

    def empty_mapping(self) -> None:
        """Zero the mapping, which is private, where nobody sees it; the file has the weights still."""
        for spec in self.streamer.blocks.specs:
            spec.original.view(torch.uint8).numpy().fill(0)
        assert not torch.equal(self.model(self.x), self.expected)

    def run(self) -> torch.Tensor:
        return self.streamer.run(lambda: self.model(self.x))

    def check(self, steps: int = 1) -> None:
        """Steps give what the plain model gives, bit by bit."""
        for _ in range(steps):
            assert torch.equal(self.run(), self.expected)

    def check_plain(self) -> None:
        """As :meth:`check`, for two steps after which no other plan is made."""
        for _ in range(2):
            assert torch.equal(self.model(self.x), self.expected)

    def close(self) -> None:
        """Close the streamer; nothing of it is left."""
        self.streamer.close()
        assert self.backend.store.allocated == self.backend.allocated == 0
        arena = self.streamer.site.supply.arena
        assert (arena.pinned_bytes, arena.pageable_bytes) == (0, 0)
        assert self.pins.used == 0
        assert getattr(self.backend, "registered", {}) == {}
