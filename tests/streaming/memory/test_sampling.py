"""How large a unit is packed is known from a few of its values."""

from __future__ import annotations

import pytest
import torch
from race import NumberedModel, RaceBackend
from torch import nn
from weights_to_pack import normal
from weightstream.streaming import CpuBackend, Streamer, StreamingConfig, VirtualMemory, cut_model
from weightstream.streaming.memory import sampling
from weightstream.streaming.model.packed_units import measure_unit
from weightstream.streaming.packing.packers import TorchPacker

WIDTH = 512


class Scaled(nn.Module):
    """Blocks of one matrix, whose rows differ in scale; the last is too wide to be packed."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        rows = torch.logspace(-2, 2, WIDTH)
        values = normal(WIDTH * WIDTH, torch.float32).view(WIDTH, WIDTH)
        with torch.no_grad():
            self.blocks[0].weight.copy_(values)
            self.blocks[1].weight.copy_(values * rows[:, None])
            self.blocks[2].weight.copy_(values * torch.logspace(-36, 36, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def make() -> Streamer:
    model = Scaled().to(torch.bfloat16)
    return Streamer(model, cut_model(model), CpuBackend(VirtualMemory(10**8)), StreamingConfig())


@pytest.mark.parametrize("built", [False, True], ids=["from the file", "from master copies"])
def test_a_sample_tells_how_large_each_unit_is(built: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    streamer = make()
    weight_copies = streamer.site.weight_copies
    if built:
        streamer.site.supply.build_needed([weight_copies.copies(unit) for unit in range(3)])
        weight_copies.adopt()
        monkeypatch.setattr(sampling, "read_range", None)
    planned = weight_copies.packed_sizes(lambda: None)
    for unit, most in enumerate(planned):
        layout = weight_copies.copies(unit).unit.layout
        memory = torch.empty(layout.nbytes, dtype=torch.uint8)
        for spec, view in zip(layout.specs, layout.views(memory), strict=True):
            view.copy_(spec.original)
        measured = measure_unit(layout, memory, TorchPacker(""), layout.nbytes).layout.nbytes
        assert measured <= most <= 1.02 * measured
    assert planned[0] < planned[1] < planned[2] == streamer.outline.unit_bytes[2]


def test_small_tensors_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = NumberedModel(2, RaceBackend())
    streamer = Streamer(model, cut_model(model), CpuBackend(VirtualMemory(10**8)), StreamingConfig())
    monkeypatch.setattr(sampling, "read_range", None)
    assert streamer.site.weight_copies.packed_sizes(lambda: None) == streamer.outline.unit_bytes
