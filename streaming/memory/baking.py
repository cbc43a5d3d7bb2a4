"""Writes patches (LoRA and others) into weights: into residents in place, into master copies by way of the device.

[Note: up, compute, down]
The host's functions compute on the device, so the values of a master copy go up to it, are patched there, and go back
down. Several master copies are under way at once, in memory that the ring gets later. Copies are carried out in the
order in which they are queued (backend.py), so the copy up for the next master copy is queued before the copy down of
this one, which waits for kernels. Otherwise the bus would wait for the kernels of every master copy.
 1. A place on the device is filled again when the copy down out of it is over: the copy up waits for that event.
 2. Kernels wait for the copy up; the copy down waits for the kernels.
 3. A master copy counts as patched once all copies down are over; the host waits for that. Until then, and after an
    error, its patched values count as unfinished and are never used (weights.py, ``Weights.bake``).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from ..devices.backend import Backend
from ..devices.copies import Event, Pair
from ..model.layout import Value
from .transfer import Tick
from .weights import Patches, Weights


def bake_residents(residents: Sequence[Weights], patches: Patches, tick: Tick) -> None:
    """Patch the stale values of buffers on the device, which hold them as they were loaded."""
    for weights in residents:
        weights.sign(weights.bake(weights.stale(patches), patches, tick))


def bake_masters(backend: Backend, masters: Sequence[Weights], patches: Patches, room: int, tick: Tick) -> None:
    """Patch the stale values of buffers in host memory, which hold them as they were loaded (Note: up, compute, down).

    Args:
        backend: the device. No other thread may queue copies meanwhile.
        masters: no larger than ``room`` each.
        patches: changes.
        room: bytes on the device to patch them in.
        tick: called before each value; it may raise.
    """
    if not masters:
        return
    largest = max(weights.buffer.nbytes for weights in masters)
    count = max(1, min(room // max(1, largest), len(masters)))
    ring: list[_BakingPlace] = []
    try:
        for _ in range(count):
            ring.append(_BakingPlace(backend, largest))
        signatures, filled = [], 0
        for number in range(len(masters)):
            # Fill one ahead, where there is a second place.
            while filled < min(len(masters), number + min(2, count)):
                ring[filled % count].fill(masters[filled], patches)
                filled += 1
            signatures.append(ring[number % count].bake(patches, tick))
        backend.synchronize()
        for weights, signed in zip(masters, signatures, strict=True):
            weights.sign(signed)
    finally:
        backend.synchronize()  # Race: copies may still use the places.
        for place in ring:
            backend.free(place.buffer)


class _BakingPlace:
    """Memory on the device in which one master copy at a time is patched."""

    def __init__(self, backend: Backend, nbytes: int) -> None:
        self.buffer = backend.allocate(nbytes)
        self._backend = backend
        # Race: kernels of this memory's previous user may still be under way.
        self._free: Event = backend.mark()
        self._filled: Event | None = None
        self._weights: Weights | None = None
        self._values: list[Value] = []

    def fill(self, weights: Weights, patches: Patches) -> None:
        """Queue the copy of the stale values up to this place."""
        self._weights, self._values = weights, weights.stale(patches)
        self._filled = self._backend.copy([(up, down) for down, up in self._pairs()], [self._free])

    def bake(self, patches: Patches, tick: Tick) -> dict[str, object]:
        """Patch what was copied up, and queue its copy down; returns the signatures for when that is over."""
        assert self._weights is not None
        assert self._filled is not None
        self._backend.wait(self._filled)
        signatures = self._weights.bake(self._values, patches, tick, self.buffer)
        self._free = self._backend.copy(self._pairs(), [self._backend.mark()])
        return signatures

    def _pairs(self) -> list[Pair]:
        """Where each part of the values lies in the master copy, and here."""
        assert self._weights is not None
        specs = chain.from_iterable(value.specs for value in self._values)
        spans = [slice(spec.offset, spec.offset + spec.nbytes) for spec in specs if spec.nbytes]
        return [(self._weights.buffer[span], self.buffer[span]) for span in spans]
