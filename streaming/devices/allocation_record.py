"""A record that a host keeps of the allocations of a step, to give the same memory out again in the next.

[Note: what must not be recorded]
ComfyUI's "compiler" (0.35 and newer) records what a thread allocates on its compute stream between two calls, and from
the next time on gives out the same addresses in the same order. An allocation that stays when the record ends, or that
is made in one step and not in the next, breaks it. One on another GPU is worse: streams are told apart by their handle,
and the default stream of every GPU has the same, so a tensor of the second GPU would get memory of the first. So the
record pauses for what is allocated here while a step runs (slots, residents, sums that are compared, activations that
change devices), and for everything that a block on another device does. Functions that such a block calls at home are
recorded as usual: the record must know what they allocated while it was recorded before, and free now.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch


class AllocationRecord:
    """No record, the default of :class:`Backend` and :class:`Boundary`; hosts that keep one override its methods."""

    def paused(self) -> AbstractContextManager[None]:
        """While it lasts, what this thread allocates is not recorded."""
        return contextlib.nullcontext()

    def resumed(self) -> AbstractContextManager[None]:
        """While it lasts, what this thread allocates is recorded, also inside of :meth:`paused`."""
        return contextlib.nullcontext()

    def held_bytes(self, device: torch.device) -> int:
        """Return the bytes of ``device`` that are kept for this thread's next step, and that nothing else can use."""
        return 0


NO_RECORD = AllocationRecord()
