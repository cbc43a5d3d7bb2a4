"""The packed copy of a unit, in host memory."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..model.packed_units import PackedLayout
from .host_memory import HostBuffer


class PackedCopy(NamedTuple):
    """The unit's weights, patches included, packed in host memory.

    Attributes:
        layout: where its tensors lie.
        memory: in which it lies, from the beginning on. If that is this process's own there is as much as the unit may
            take with other patches.
        most_bytes: as much as it was planned to take at most.
        signatures: of the patches in it, by the names of values.
        sums, packed_sums: of the weights before they were packed, and of what was made of them, on the device; None
            where nobody checks that (checks.py).
        spoiled: whether it must not be used, as it was damaged or something else came out.
    """

    layout: PackedLayout
    memory: HostBuffer
    most_bytes: int
    signatures: dict[str, object]
    sums: torch.Tensor | None = None
    packed_sums: torch.Tensor | None = None
    spoiled: bool = False

    @property
    def buffer(self) -> torch.Tensor:
        return self.memory.memory[: self.layout.nbytes]
