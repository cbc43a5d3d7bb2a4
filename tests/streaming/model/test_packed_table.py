"""What a table says is what was packed, and one that says anything else is not believed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from weights_to_pack import every_value, filled, layout_of, normal
from weightstream.streaming import SharingError
from weightstream.streaming.model import packed_table
from weightstream.streaming.model.layout import Layout
from weightstream.streaming.model.packed_table import read_table, table_bytes, table_of
from weightstream.streaming.model.packed_units import PackedLayout, measure_unit
from weightstream.streaming.packing.codec import FEWEST_VALUES, format_of
from weightstream.streaming.packing.packers import TorchPacker

COUNT = 2 * FEWEST_VALUES


def tabled() -> tuple[Layout, PackedLayout, torch.Tensor]:
    """A unit with tensors of all kinds, and its packed copy with a table."""
    weights = normal(COUNT, torch.bfloat16).view(128, -1), normal(COUNT + 8, torch.float16)
    layout = layout_of(*weights, torch.rand(5), every_value(torch.bfloat16)[::4].contiguous(), torch.empty(0))
    measured = measure_unit(layout, filled(layout), TorchPacker(""), layout.nbytes)
    assert measured is not None
    packed = measured.layout
    memory = torch.empty(packed.nbytes + table_bytes(layout), dtype=torch.uint8)
    measured.write(memory)
    memory[packed.nbytes :] = torch.frombuffer(bytearray(table_of(packed)), dtype=torch.uint8)
    return layout, packed, memory


def test_what_was_packed_is_read() -> None:
    layout, packed, memory = tabled()
    assert read_table(layout, memory) == packed
    assert {part.packed for part in packed.parts} == {True, False}


def test_no_byte_of_a_table_leads_out_of_the_memory() -> None:
    """Whatever it is: the copy is refused, or all that is read lies where the copy is."""
    layout, packed, memory = tabled()
    refused = 0
    for place in range(packed.nbytes, memory.nbytes):
        for bit in range(8):
            harmed = memory.clone()
            harmed[place] ^= 1 << bit
            try:
                found = read_table(layout, harmed)
            except SharingError:
                refused += 1
                continue
            ends = [0, *(part.offset + part.nbytes for part in found.parts)]
            assert found.nbytes == packed.nbytes >= max(ends)
            assert all(part.offset >= end for part, end in zip(found.parts, ends, strict=False))
    assert refused > 0.9 * 8 * table_bytes(layout)


OTHERS = [("_MAGIC", b"anything", "it has no table"), ("VERSION", 7, "its table is of version 7 instead of")]


@pytest.mark.parametrize(("name", "other", "reason"), OTHERS)
def test_a_table_of_another_kind_or_version_is_refused(
    name: str, other: object, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(packed_table, name, other)
        layout, _, memory = tabled()
    with pytest.raises(SharingError, match=reason):
        read_table(layout, memory)


def starts(packed: PackedLayout, memory: torch.Tensor) -> torch.Tensor:
    """Where the escapes of each group of the first tensor begin."""
    part = packed.parts[0]
    form = format_of(COUNT, torch.bfloat16)
    return part.bytes_in(memory)[form.starts :][: 4 * form.groups].view(torch.int32)


HARMS: dict[str, Callable[[torch.Tensor], object]] = {
    "before the first": lambda starts: starts[0].sub_(1),
    "behind the last": lambda starts: starts[-1].add_(1 << 20),
    "all of them far away": lambda starts: starts[1:].add_(1 << 30),
    "backwards": lambda starts: starts[1].fill_(int(starts[2]) + 1),
}


@pytest.mark.parametrize("harm", HARMS)
def test_places_of_escapes_lie_in_their_tensor(harm: str) -> None:
    layout, packed, memory = tabled()
    HARMS[harm](starts(packed, memory))
    with pytest.raises(SharingError, match="the places of its escapes are not in it"):
        read_table(layout, memory)


def test_a_copy_of_another_unit_is_refused() -> None:
    layout, packed, memory = tabled()
    others = {
        "its table is of another unit": layout_of(normal(COUNT, torch.bfloat16)),
        "cannot have": layout_of(*(torch.rand(COUNT) for _ in layout.specs)),
    }
    for reason, other in others.items():
        short = table_bytes(other) - table_bytes(layout)  # So that there is a table where it is looked for.
        with pytest.raises(SharingError, match=reason):
            read_table(other, memory if short == 0 else memory[: memory.nbytes + short])
    longer = packed._replace(
        parts=(packed.parts[0], packed.parts[1]._replace(nbytes=layout.specs[1].nbytes), *packed.parts[2:])
    )
    memory[packed.nbytes :] = torch.frombuffer(bytearray(table_of(longer)), dtype=torch.uint8)
    with pytest.raises(SharingError, match="its tensors have more bytes than it has"):
        read_table(layout, memory)
    for nbytes in (0, 8, table_bytes(layout) - 1):
        with pytest.raises(SharingError, match="it is shorter than its table"):
            read_table(layout, memory[:nbytes])
