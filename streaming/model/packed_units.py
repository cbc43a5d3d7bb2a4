"""A unit whose weights are packed (packing/codec.py): where its tensors lie then, and how they are unpacked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from ..devices.copies import aligned
from ..packing.codec import LEAST_SAVED, expected_bytes, may_pack
from ..packing.packers import Packer, Sized
from ..packing.unpackers import Unpacker
from .layout import Layout, TensorSpec

# A tensor is planned with so many bits for each value more than a sample of it takes; a unit that takes more than that
# stays as it is. Samples of 8192 values differ by 0.02 bits or less, but patches and channels differ too.
SLACK_BITS = 0.1


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


class PackedLayout(NamedTuple):
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

    def unpack(self, unpacker: Unpacker, packed: torch.Tensor, unpacked: torch.Tensor) -> None:
        """Queue on the current stream what makes the unit itself of a packed one."""
        for part in self.parts:
            if not part.packed:
                begin, end = part.spec.offset, part.spec.offset + part.spec.nbytes
                unpacked[begin:end].copy_(part.bytes_in(packed))
        for unpack in self.unpacking(unpacker, packed, unpacked):
            unpack()


@dataclass(frozen=True)
class MeasuredUnit:
    """A unit of which is known how it lies packed, and which is not packed yet."""

    layout: PackedLayout
    _writes: tuple[Callable[[torch.Tensor], object], ...]

    def write(self, target: torch.Tensor) -> None:
        """Queue packing on the current stream, which is the one on which the unit was measured.

        Args:
            target: uint8, one dimension, at a multiple of 16, of at least as many bytes as the packed unit has. Those
                between its parts become zero; those behind it stay as they are. The unit may not change before.
        """
        for part, write in zip(self.layout.parts, self._writes, strict=True):
            end = part.offset + part.nbytes
            write(target[part.offset : end])
            target[end : part.offset + aligned(part.nbytes)] = 0


def packed_dtype(layouts: Iterable[Layout]) -> torch.dtype | None:
    """Return the dtype of most of what may be packed; None where nothing may be."""
    found: Counter[torch.dtype] = Counter()
    for layout in layouts:
        for spec in filter(_may_pack, layout.specs):
            found[spec.dtype] += spec.nbytes
    return max(found, key=found.__getitem__, default=None)


def planned_bytes(layout: Layout, sample_of: Callable[[TensorSpec], torch.Tensor]) -> int:
    """Return the most bytes that a unit takes when it is packed; those of the layout where it is not worth it.

    Args:
        sample_of: returns some values of a tensor, on the host.
    """
    total = sum(aligned(_planned_bytes(spec, sample_of)) for spec in layout.specs)
    return total if total <= layout.nbytes * (1 - LEAST_SAVED) else layout.nbytes


def _planned_bytes(spec: TensorSpec, sample_of: Callable[[TensorSpec], torch.Tensor]) -> int:
    if not _may_pack(spec):
        return spec.nbytes
    values = spec.shape.numel()
    return min(spec.nbytes, int(expected_bytes(values, sample_of(spec)) + values * SLACK_BITS / 8))


def measure_unit(layout: Layout, unit: torch.Tensor, packer: Packer, most: int) -> MeasuredUnit | None:
    """Find out how a unit lies packed; the host waits for the current stream, once.

    Returns None if it takes more than ``most`` bytes.

    Args:
        unit: uint8, one dimension: the unit as its layout has it.
        packer: of its device.
    """
    parts: list[PackedPart] = []
    writes: list[Callable[[torch.Tensor], object]] = []
    offset = 0
    for spec, sized in zip(layout.specs, _sizes(layout, unit, packer), strict=True):
        packed = sized is not None and sized.nbytes is not None
        nbytes = sized.nbytes if packed else spec.nbytes
        parts.append(PackedPart(spec, offset, nbytes, packed))
        writes.append(sized.write if packed else partial(_copy, _bytes(spec, unit)))
        offset += aligned(nbytes)
    return MeasuredUnit(PackedLayout(tuple(parts), offset), tuple(writes)) if offset <= most else None


def _sizes(layout: Layout, unit: torch.Tensor, packer: Packer) -> list[Sized | None]:
    """How large the tensors of a unit are packed; None for one that is never packed."""
    sizes = iter(packer.sizes([_flat(spec, unit) for spec in layout.specs if _may_pack(spec)]))
    return [next(sizes) if _may_pack(spec) else None for spec in layout.specs]


def _may_pack(spec: TensorSpec) -> bool:
    return may_pack(spec.shape.numel(), spec.dtype)


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    target.copy_(source)


def _bytes(spec: TensorSpec, unit: torch.Tensor) -> torch.Tensor:
    return unit[spec.offset : spec.offset + spec.nbytes]


def _flat(spec: TensorSpec, unit: torch.Tensor) -> torch.Tensor:
    return _bytes(spec, unit).view(spec.dtype)
