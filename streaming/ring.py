"""Reusable staging memory on the device: a few slots, each guarded by two events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .backend import Backend, Event, Pair
from .transfer import Transfer


@dataclass
class Slot:
    """One staging buffer with the events that guard it.

    Attributes:
        buffer: uint8 memory on the device.
        ready: the last copy into the slot is done; a transfer while a reader has not queued it yet.
        free: the last segment that was read from the slot is done.
    """

    buffer: torch.Tensor = field(repr=False)
    free: Event
    ready: Event | Transfer | None = None


class Ring:
    """``count`` slots of ``slot_bytes`` on one device."""

    def __init__(self, backend: Backend, count: int, slot_bytes: int) -> None:
        self._backend = backend
        self.slots: list[Slot] = []
        try:
            for _ in range(count):
                # Whoever had this memory before may have kernels under way in it; they are queued already.
                self.slots.append(Slot(backend.allocate(slot_bytes), free=backend.mark()))
        except BaseException:
            self.release()
            raise

    def fill(self, index: int, pairs: Sequence[Pair], fine: bool) -> None:
        """Make copies whose targets lie in a slot, after the slot's last reader."""
        slot = self.slots[index]
        slot.ready = self._backend.copy(pairs, slot.free, fine)

    def release(self) -> None:
        """Give the memory back. No copy into it may be under way."""
        for slot in self.slots:
            self._backend.free(slot.buffer)
        self.slots.clear()
