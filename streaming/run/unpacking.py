"""Memory on the device to which packed segments are unpacked.

[Note: unpacked in turn]
What is packed is unpacked when its segment begins, by kernels on the compute stream, behind the wait for ``ready``
(lane.py), into memory that all packed segments use in turn. They queue their kernels on that stream one after another,
so unpacking the next comes behind all that reads this one: no event is needed. By rule 1 of *Note: two events guard a
slot* the slot is written again behind both. ``ready`` stands for the whole copy, whichever links have brought its parts
(feeder.py).
A segment that begins while another packed one runs still gets memory of its own for that time.
"""

from __future__ import annotations

import torch

from ..devices.backend import Backend


class UnpackingMemory:
    """The memory that packed segments use in turn.

    Attributes:
        memory: uint8; None where nothing is packed.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._in_use = False
        self.memory: torch.Tensor | None = None

    def allocate(self, nbytes: int) -> None:
        """Take so much memory, if any, on the device."""
        if nbytes:
            self.memory = self._backend.allocate(nbytes, lasting=True)

    def take(self) -> torch.Tensor | None:
        """Return the memory for a segment that begins; None while another one has it."""
        if self._in_use:
            return None
        self._in_use = True
        return self.memory

    def leave(self, memory: torch.Tensor | None) -> None:
        """What reads a segment's unpacked weights is queued, on the stream on which others will be unpacked there.

        Args:
            memory: where they are, this memory or the segment's own; None for a segment without any.
        """
        if memory is None:
            return
        if memory is self.memory:
            self._in_use = False
        else:
            self._backend.free(memory)

    def close(self) -> None:
        """Give the memory back; no segment is bound."""
        if self.memory is not None:
            self._backend.free(self.memory)
            self.memory = None
