"""A unit is measured at once, written in one go, and comes back; one that takes more than was planned is not packed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from weights_to_pack import every_value, filled, layout_of, normal
from weightstream.streaming.model.layout import TensorSpec
from weightstream.streaming.model.packed_units import measure_unit, packed_dtype, planned_bytes
from weightstream.streaming.packing.codec import FEWEST_VALUES
from weightstream.streaming.packing.packers import Sized, TorchPacker
from weightstream.streaming.packing.unpackers import TorchUnpacker

COUNT = 2 * FEWEST_VALUES
BEHIND = 64


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
    measured = measure_unit(layout, unit, packer, layout.nbytes)
    assert packer.asked == [5]
    found = measured.layout
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
    layout = layout_of(normal(COUNT, torch.bfloat16))
    measured = measure_unit(layout, filled(layout), TorchPacker(""), layout.nbytes)
    most = measured.layout.nbytes
    assert measure_unit(layout, filled(layout), TorchPacker(""), most) is not None
    assert measure_unit(layout, filled(layout), TorchPacker(""), most - 1) is None


def whole(spec: TensorSpec) -> torch.Tensor:
    return spec.original.flatten()


def test_a_unit_is_planned_with_a_little_more_than_it_takes() -> None:
    """Tensors of both dtypes, a small one, one of another dtype and one that does not shrink."""
    layout = layout_of(
        normal(COUNT, torch.bfloat16), normal(2 * COUNT, torch.float16), torch.rand(5), every_value(torch.bfloat16)
    )
    measured = measure_unit(layout, filled(layout), TorchPacker(""), layout.nbytes)
    planned = planned_bytes(layout, whole)
    assert measured.layout.nbytes < planned < 1.01 * measured.layout.nbytes


@pytest.mark.parametrize(
    "tensors",
    [
        [torch.rand(COUNT)],
        [normal(FEWEST_VALUES - 8, torch.bfloat16)],
        [every_value(torch.bfloat16)],
        [normal(COUNT, torch.bfloat16), torch.rand(4 * COUNT)],
    ],
    ids=["float32", "small", "does not shrink", "a small part shrinks"],
)
def test_what_is_not_worth_it_is_planned_as_it_is(tensors: list[torch.Tensor]) -> None:
    layout = layout_of(*tensors)
    assert planned_bytes(layout, whole) == layout.nbytes


def test_the_dtype_of_most_weights() -> None:
    half, brain = layout_of(normal(2 * COUNT, torch.float16)), layout_of(normal(COUNT, torch.bfloat16))
    assert packed_dtype([half, brain]) is torch.float16
    assert packed_dtype([half, brain, brain, brain]) is torch.bfloat16
    assert packed_dtype([layout_of(torch.rand(COUNT))]) is None
