"""Staging memory on the device, in which each segment has a slot. Slots that overlap are used one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..devices.backend import Backend
from ..devices.copies import Event
from ..memory.transfer import Transfer


@dataclass(eq=False)
class Slot:
    """The memory of one segment, with the events that guard it.

    Attributes:
        span: its bytes in the ring.
        buffer: uint8 memory on the device, of which torch counts the writes apart from those to other slots.
        ready: the event behind the last copy into the slot; a transfer while a reader has not queued that copy yet.
        behind: what the copy into the slot waits for: slots and their events at that time.
    """

    span: range
    buffer: torch.Tensor = field(repr=False)
    ready: Event | Transfer | None = None
    behind: list[tuple[Slot, Event]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self._start, self._stop = self.span.start, self.span.stop

    def overlaps(self, other: Slot) -> bool:
        return self.lies_in(other._start, other._stop)

    def lies_in(self, start: int, stop: int) -> bool:
        """Whether some of it is in these bytes of the ring."""
        return self._start < stop and start < self._stop


class Ring:
    """``nbytes`` on one device, with a slot for each of ``spans``."""

    def __init__(self, backend: Backend, nbytes: int, spans: Sequence[range]) -> None:
        self._backend = backend
        self._memory = backend.allocate(nbytes, lasting=not backend.feeders)
        try:
            self.slots = [Slot(span, _part(self._memory, span)) for span in spans]
            # Race: kernels may still read what lies in these slots. At first these are kernels of the memory's previous
            # user, which are queued already: a slot that is the whole memory stands for them.
            self._read = {Slot(range(nbytes), self._memory): backend.mark()}
        except BaseException:
            backend.free(self._memory)
            raise

    def guards(self, slot: Slot) -> list[Event]:
        """The events that a copy into ``slot`` must wait for (lane.py, Note: two events guard a slot)."""
        start, stop = slot.span.start, slot.span.stop
        slot.behind = [(other, event) for other, event in self._read.items() if other.lies_in(start, stop)]
        return [event for _, event in slot.behind]

    def filled(self, slot: Slot) -> None:
        """The copy into ``slot`` is queued. Later ones come after it, so they need not wait for the same again."""
        for other, event in slot.behind:
            if self._read.get(other) is event:
                del self._read[other]
        slot.behind = []

    def release(self, slot: Slot) -> None:
        """Kernels that are queued by now are the last to read what is in ``slot``."""
        self._read[slot] = self._backend.mark()

    def close(self) -> None:
        """Give the memory back. No copy into it may be under way."""
        self._backend.free(self._memory)
        self.slots.clear()
        self._read.clear()
        del self._memory


def _part(memory: torch.Tensor, span: range) -> torch.Tensor:
    """A part of ``memory`` that counts its own writes: a view would count those to all of it."""
    with torch.inference_mode(False):
        return memory[span.start : span.stop].data
