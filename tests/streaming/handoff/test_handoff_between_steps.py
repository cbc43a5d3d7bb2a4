"""What one step has moved to another device is not what the next one finds there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from weightstream.streaming.handoff.boundary import Boundary
from weightstream.streaming.split.links import Links

HOME, SECOND = torch.device("cpu", 0), torch.device("cpu", 1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, table: torch.Tensor, options: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.linear(x) * table + options["mask"]


class Model(nn.Module):
    """Keeps what it gives its blocks from step to step, and writes to it in between."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.table = torch.ones(8)
        self.options = {"mask": torch.zeros(8)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.table += 1
        self.options["mask"].add_(0.5)
        for block in self.blocks:
            x = block(x, self.table, self.options)
        return x


def steps(split: bool) -> list[torch.Tensor]:
    """What some steps give, the blocks on one device or by turns on two. One in the middle is interrupted."""
    torch.manual_seed(4)
    model, boundary = Model(), Boundary(HOME, Links())
    if split:
        boundary.attach(model, [(block, (HOME, SECOND)[number % 2]) for number, block in enumerate(model.blocks)])
    x, outputs = torch.linspace(-1, 1, 32).view(4, 8), []
    for number in range(4):
        if number == 2:
            stop = model.blocks[2].linear.register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(x)
            stop.remove()
        outputs.append(model(x))
    return outputs


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture(params=[False, True], ids=["", "inference mode"], autouse=True)
def mode(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.inference_mode(request.param):
        yield


def test_what_a_model_keeps_and_writes_to_is_moved_anew_in_every_step() -> None:
    for found, expected in zip(steps(split=True), steps(split=False), strict=True):
        assert torch.equal(found, expected)
