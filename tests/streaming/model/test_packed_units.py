"""A unit is measured at once, written in one go, and comes back; one that takes more than was planned is not packed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn
from weights_to_pack import bits, every_value, normal
from weightstream.streaming.model.layout import Layout, NamedTensor, Place, make_layout
from weightstream.streaming.model.packed_units import measure_unit, planned_bytes
from weightstream.streaming.packing.codec import FEWEST_VALUES
from weightstream.streaming.packing.packers import Sized, TorchPacker
from weightstream.streaming.packing.unpackers import TorchUnpacker

COUNT = 2 * FEWEST_VALUES
BEHIND = 64


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


class CountingPacker(TorchPacker):
    """Knows how many tensors it was asked for, each time."""

    def __init__(self) -> None:
        super().__init__("")
        self.asked: list[int] = []

    def sizes(self, tensors: Sequence[torch.Tensor]) -> list[Sized]:
        self.asked.append(len(tensors))
        return super().sizes(tensors)


def test_a_unit_is_measured_at_once_and_comes_back() -> None:
    """With tensors of all kinds: packed, of both dtypes; too small; of another dtype; and one that does not shrink."""
    weights = [
        normal(COUNT, torch.bfloat16).view(128, -1),
        normal(COUNT + 8, torch.float16),
        every_value(torch.bfloat16)[::4].contiguous(),
    ]
    layout = layout_of(*weights, torch.rand(5), *(normal(8 * COUNT, torch.bfloat16, seed) for seed in (1, 2)))
    unit, packer = filled(layout), CountingPacker()
    measured = measure_unit(layout, unit, packer)
    assert packer.asked == [5]
    found = measured.packed_unit
    assert [part.packed for part in found.parts] == [True, True, False, False, True, True]
    memory = torch.full((found.nbytes + BEHIND,), 7, dtype=torch.uint8)
    measured.write(memory)
    assert (memory[found.nbytes :] == 7).all()
    ends = [part.offset for part in found.parts[1:]] + [found.nbytes]
    for part, end in zip(found.parts, ends, strict=True):
        assert (memory[part.offset + part.nbytes : end] == 0).all()
    unpacked = torch.full_like(unit, 3)
    for unpack in found.unpacking(TorchUnpacker(""), memory[: found.nbytes], unpacked):
        unpack()
    for spec, view in zip(layout.specs, found.views(memory, unpacked), strict=True):
        assert torch.equal(view.flatten().view(torch.uint8), spec.original.flatten().view(torch.uint8))


def test_what_takes_more_than_planned_stays_as_it_is() -> None:
    wide = torch.where(torch.arange(COUNT) % 5 == 0, torch.logspace(-30, 30, COUNT), normal(COUNT, torch.float32))
    layout = layout_of(wide.to(torch.bfloat16))
    (sized,) = TorchPacker("").sizes([bits(layout.specs[0].original).view(torch.bfloat16)])
    assert planned_bytes(layout) < sized.nbytes < layout.nbytes
    assert measure_unit(layout, filled(layout), TorchPacker("")) is None


@pytest.mark.parametrize(
    "tensor", [torch.rand(COUNT), normal(FEWEST_VALUES - 8, torch.bfloat16)], ids=["float32", "small"]
)
def test_where_nothing_can_be_packed_nobody_measures(tensor: torch.Tensor) -> None:
    layout, packer = layout_of(tensor), CountingPacker()
    assert measure_unit(layout, filled(layout), packer) is None
    assert packer.asked == []
