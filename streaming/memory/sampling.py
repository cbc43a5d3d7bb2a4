"""Some values of each tensor of a unit, which tell how large the unit is packed before it is packed."""

from __future__ import annotations

import torch

from ..model.contents import read_range
from ..model.layout import TensorSpec
from ..model.packed_units import planned_bytes
from .transfer import Tick
from .unit_copies import UnitCopies

# Of each tensor so many values are looked at, in slices that are spread evenly: rows differ, and neighbours are alike.
# A file is read in fewer and longer slices, as it may not be in the page cache.
VALUES, SLICES, FILE_SLICES = 8192, 32, 4


def planned_bytes_of(copies: UnitCopies, tick: Tick) -> int:
    """Return the most bytes that the unit takes when it is packed; its own where it cannot be, or it is not worth it.

    Where there is a packed copy that is what it was planned with.

    Raises:
        CheckpointError: a file cannot be read, or is not the one that was loaded.
    """
    tick()
    if copies.packed is not None:
        return copies.packed.most_bytes
    return planned_bytes(copies.unit.layout, lambda spec: _sample(copies, spec))


def _sample(copies: UnitCopies, spec: TensorSpec) -> torch.Tensor:
    """Values from the master copy, or else as they were loaded."""
    master = copies.master if copies.master is not None and copies.master.fills_layout else None
    slices = FILE_SLICES if master is None and spec.source is not None else SLICES
    values = spec.shape.numel() // slices
    step, size = (count * spec.dtype.itemsize for count in (values, min(values, VALUES // slices)))
    sample = torch.empty(slices, size, dtype=torch.uint8)
    if master is not None:
        flat = master.buffer[spec.offset : spec.offset + spec.nbytes]
        return sample.copy_(flat.as_strided((slices, size), (step, 1))).view(-1).view(spec.dtype)
    for number, target in enumerate(sample):
        begin = spec.offset + number * step
        read_range(copies.unit.layout, begin, begin + size, target)
    return sample.view(-1).view(spec.dtype)
