"""Some values of each tensor of a unit, which tell how large the unit is packed before it is packed."""

from __future__ import annotations

import torch

from ..model.contents import read_range
from ..model.layout import TensorSpec
from ..model.packed_units import planned_bytes
from .unit_copies import UnitCopies

# Of each tensor so many slices of so many values are read, spread evenly: rows differ, and neighbours are alike.
SLICES, SLICE_VALUES = 32, 256


def planned_bytes_of(copies: UnitCopies) -> int:
    """Return the most bytes that the unit takes when it is packed; its own where it cannot be, or it is not worth it.

    Raises:
        CheckpointError: a file cannot be read, or is not the one that was loaded.
    """
    return planned_bytes(copies.unit.layout, lambda spec: _sample(copies, spec))


def _sample(copies: UnitCopies, spec: TensorSpec) -> torch.Tensor:
    """Values from the master copy, or else as they were loaded."""
    values = spec.shape.numel() // SLICES
    step, size = (count * spec.dtype.itemsize for count in (values, min(values, SLICE_VALUES)))
    master = copies.master if copies.master is not None and copies.master.fills_layout else None
    sample = torch.empty(SLICES, size, dtype=torch.uint8)
    for number, target in enumerate(sample):
        begin = spec.offset + number * step
        if master is not None:
            target.copy_(master.buffer[begin : begin + size])
        else:
            read_range(copies.unit.layout, begin, begin + size, target)
    return sample.view(-1).view(spec.dtype)
