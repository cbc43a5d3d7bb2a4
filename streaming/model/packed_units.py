"""A unit whose weights are packed (packing/codec.py): where its tensors lie then, and how they are unpacked."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..devices.copies import ALIGNMENT
from ..packing.codec import may_pack, pack
from ..packing.unpackers import Unpacker
from .layout import Layout, TensorSpec

# The most bits that a value of so many is planned with: large layers take 11.2 to 11.5 of 16 (docs/packing.md), and a
# unit that takes more stays as it is.
PLANNED_BITS = {torch.bfloat16: 11.6, torch.float16: 14.6}
# A unit is packed only if that saves at least this part of it.
WORTHWHILE = 0.05


class PackedPart(NamedTuple):
    """A tensor of a packed unit.

    Attributes:
        spec: where it lies in the unit itself.
        offset, nbytes: where it lies in the packed unit.
        packed: whether it is packed; a small one, or one of another dtype, is as it was.
    """

    spec: TensorSpec
    offset: int
    nbytes: int
    packed: bool

    def bytes_in(self, buffer: torch.Tensor) -> torch.Tensor:
        """Return its memory in ``buffer``, where the packed unit lies."""
        return buffer[self.offset : self.offset + self.nbytes]


class PackedUnit(NamedTuple):
    """Where the tensors of a packed unit lie, in the order of its layout, and its bytes."""

    parts: tuple[PackedPart, ...]
    nbytes: int

    def views(self, packed: torch.Tensor, unpacked: torch.Tensor) -> list[torch.Tensor]:
        """Return the tensors of the unit, as they are once it is unpacked.

        Args:
            packed: uint8, where the packed unit lies.
            unpacked: uint8, as large as the unit itself, where it is unpacked.
        """
        return [part.spec.view(unpacked) if part.packed else part.spec.view(packed, part.offset) for part in self.parts]

    def parts_in(self, packed: torch.Tensor) -> list[torch.Tensor]:
        """Return the memory of its tensors as they are packed."""
        return [part.bytes_in(packed) for part in self.parts]

    def bytes_in(self, packed: torch.Tensor, unpacked: torch.Tensor) -> list[torch.Tensor]:
        """Return the memory of what :meth:`views` returns."""
        return [
            unpacked[part.spec.offset : part.spec.offset + part.spec.nbytes] if part.packed else part.bytes_in(packed)
            for part in self.parts
        ]

    def unpacking(self, unpacker: Unpacker, packed: torch.Tensor, unpacked: torch.Tensor) -> list[Callable[[], None]]:
        """Return functions that queue the unpacking from ``packed`` to ``unpacked`` on the current stream."""
        return [
            unpacker.prepare(part.bytes_in(packed), _flat(part.spec, unpacked)) for part in self.parts if part.packed
        ]


def planned_bytes(layout: Layout) -> int:
    """Return the most bytes that a unit takes when it is packed; those of the layout where it is not worth it."""
    total = 0
    for spec in layout.specs:
        packs = may_pack(spec.shape.numel(), spec.dtype)
        nbytes = int(spec.shape.numel() * PLANNED_BITS[spec.dtype] / 8) if packs else spec.nbytes
        total += _aligned(nbytes)
    return total if total <= layout.nbytes * (1 - WORTHWHILE) else layout.nbytes


def pack_unit(layout: Layout, unit: torch.Tensor) -> tuple[PackedUnit, torch.Tensor] | None:
    """Return a unit packed, on its device; None where it takes more than :func:`planned_bytes`.

    Args:
        unit: uint8, one dimension: the unit as its layout has it.
    """
    parts: list[PackedPart] = []
    found: list[torch.Tensor] = []
    offset = 0
    for spec in layout.specs:
        packed = pack(_flat(spec, unit)) if may_pack(spec.shape.numel(), spec.dtype) else None
        data = unit[spec.offset : spec.offset + spec.nbytes] if packed is None else packed
        parts.append(PackedPart(spec, offset, data.numel(), packed is not None))
        found.append(data)
        offset += _aligned(data.numel())
    most = planned_bytes(layout)
    if offset > most or most == layout.nbytes:
        return None
    whole = torch.zeros(offset, dtype=torch.uint8, device=unit.device)
    for part, data in zip(parts, found, strict=True):
        whole[part.offset : part.offset + part.nbytes] = data
    return PackedUnit(tuple(parts), offset), whole


def _flat(spec: TensorSpec, unit: torch.Tensor) -> torch.Tensor:
    return unit[spec.offset : spec.offset + spec.nbytes].view(spec.dtype)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
