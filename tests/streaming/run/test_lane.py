"""Segments of modules that run inside of others: none is let go of while somebody needs it still."""

from __future__ import annotations

import pytest
import torch
from fake_cuda import FakeCuda, cuda
from models import hand_plan, learn
from torch import nn
from weightstream.streaming import CudaBackend, Streamer, StreamingConfig, cut_model

__all__ = ["cuda"]

UNIT = 512


class Unit(nn.Module):
    """Reads its weight at its begin and at its end, on the device; a weight elsewhere is an error."""

    def __init__(self, number: int, cuda: FakeCuda, inner: list[nn.Module] | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), float(number)), requires_grad=False)
        self.number = number
        for index, each in enumerate(inner or []):
            self.add_module(f"inner{index}", each)
        self._cuda = cuda

    def read(self) -> None:
        self._cuda.kernel(reads=[self.weight])
        assert self.weight.tolist() == [float(self.number)] * 4

    def forward(self, order: str = "") -> str:
        self.read()
        for index in order:
            getattr(self, f"inner{index}")()
        self.read()
        return order  # What gives nothing has failed.


class Block(nn.Module):
    """One unit with two more inside, which run there, or behind it where they are asked for after a bar."""

    def __init__(self, number: int, cuda: FakeCuda) -> None:
        super().__init__()
        inner = [Unit(10 * number + 1, cuda), Unit(10 * number + 2, cuda)]
        self.outer = Unit(10 * number, cuda, inner)

    def forward(self, order: str) -> str:
        inside, _, behind = order.partition("|")
        self.outer(inside)
        for index in behind:
            getattr(self.outer, f"inner{index}")()
        return order


class Model(nn.Module):
    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(number, cuda) for number in range(3))

    def forward(self, order: str) -> list[str]:
        return [block(order) for block in self.blocks]


def make(cuda: FakeCuda, model: nn.Module, slots: int, segment_bytes: int) -> Streamer:
    config = StreamingConfig(slots=slots, segment_bytes=segment_bytes, adaptive=False)
    return Streamer(model, cut_model(model), CudaBackend(torch.device("cuda", 1)), config)


@pytest.mark.parametrize("segment_bytes", [0, 2 * UNIT, 3 * UNIT], ids=["one unit", "two units", "three units"])
@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("learned", ["|01", "|0011"])
def test_a_unit_keeps_its_weights_while_others_run_inside(
    cuda: FakeCuda, learned: str, slots: int, segment_bytes: int
) -> None:
    """Where none did so before, and those that do run more often than before, or less, and others need their slots."""
    model = Model(cuda)
    streamer = make(cuda, model, slots, segment_bytes)
    learn(streamer, lambda: model(learned))
    streamer.load(hand_plan(streamer, range(9), slots))
    for order in ("01", "0101", "1|0", "0011", "10", "|01", "0|0111", "01"):
        model(order)
    assert streamer.counters.hits > 0
    streamer.close()


class Nested(nn.Module):
    """A block that runs another one inside, if it has any."""

    def __init__(self, number: int, cuda: FakeCuda) -> None:
        super().__init__()
        self.unit = Unit(number, cuda)
        self.then: list[nn.Module] = []  # Not a module of this one: it is a block of its own.

    def forward(self) -> int:
        self.unit.read()  # Nobody runs it, so its block holds it.
        for block in self.then:
            block()
        self.unit.read()
        return self.unit.number


class NestedModel(nn.Module):
    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Nested(number, cuda) for number in range(3))

    def forward(self, depth: int) -> int:
        for number in range(2):
            self.blocks[number].then = [self.blocks[number + 1]] if number + 1 < depth else []
        return self.blocks[0]()


def test_what_a_running_block_holds_makes_way_for_nobody(cuda: FakeCuda) -> None:
    model = NestedModel(cuda)
    streamer = make(cuda, model, slots=2, segment_bytes=0)
    streamer.load(hand_plan(streamer, range(3), 2))
    for depth in (2, 2, 3, 3, 2):
        model(depth)
    streamer.close()
    assert streamer.backend.allocated == 0
