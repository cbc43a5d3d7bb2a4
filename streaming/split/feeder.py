"""Brings weights to a device over the link of another one, which passes them on.

[Note: links that add up]
GPUs that reach each other's memory by something faster than the host's bus (NVLink) can all bring weights to the one
that computes. A feeder takes its part of a copy from host memory into a small ring of chunks on its own GPU, and from
there to where it belongs:
 1. the copy into a chunk waits only until the previous copy out of that chunk is done (``free``): so a feeder runs
    ahead of the device, as far as it has chunks;
 2. the copy out of a chunk waits for the one into it, and for all that the whole copy waits for, because it is the one
    that writes to the device;
 3. copies out of chunks are on one stream of their own, so they end in the order in which they were queued.
The whole copy is done when all of its parts are (``Backend.bring``), and later copies wait for that. So the device sees
the same as if one link had brought everything. Packed weights are divided as bytes, wherever a part ends: the device
that computes unpacks them when all parts are there (unpacking.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import Any

import torch

from ..devices.backend import Backend
from ..devices.copies import Event, Pair

# A copy of 16 MB and more has all of a link's bandwidth, and costs the host as much as a small one.
CHUNK_BYTES = 32 * 1024**2
CHUNKS = 4


class _Chunk:
    """Memory on the feeder's device.

    Attributes:
        free: the event after which it may be overwritten, such as the end of the last copy out of it.
    """

    def __init__(self, memory: torch.Tensor, free: Event) -> None:
        self.memory = memory
        self.free = free


class Feeder:
    """Brings copies through ``helper``, a backend of another device, which serves this feeder alone.

    Args:
        chunk_bytes, chunks: size and number of the chunks in its ring.

    Attributes:
        is_open: whether it has its ring.
    """

    def __init__(self, helper: Backend, chunk_bytes: int = CHUNK_BYTES, chunks: int = CHUNKS) -> None:
        self.helper = helper
        self._chunk_bytes, self._count = chunk_bytes, chunks
        self._stream: Any = None
        self._chunks: list[_Chunk] = []
        self._next: Iterator[_Chunk] = iter(())

    @property
    def is_open(self) -> bool:
        return bool(self._chunks)

    def open(self, home: Backend) -> None:
        """Allocate the ring, unless there is one."""
        if self._chunks:
            return
        self.helper.open(1)
        self._stream = self._stream or home.create_stream()  # torch has few streams, so this one is kept.
        try:
            for _ in range(self._count):
                # Race: kernels that used this memory before may still be under way.
                self._chunks.append(_Chunk(self.helper.allocate(self._chunk_bytes), self.helper.mark()))
            self._next = cycle(self._chunks)
        except BaseException:
            self.close()
            raise

    def bring(self, home: Backend, pairs: Sequence[Pair], waits: Sequence[Event]) -> Event:
        """Queue copies, at least one, from host memory to ``home``, behind ``waits``; return the event of their end."""
        events = []
        for target, source in self._in_chunks(pairs):
            chunk = next(self._next)
            memory = chunk.memory[: target.nbytes]
            sent = self.helper.copy([(memory, source)], [chunk.free])
            with self.helper.passing_on():
                chunk.free = home.copy_on(self._stream, [(target, memory)], [sent, *waits])
            events += [sent, chunk.free]
            waits = ()
        return home.all_of(events)

    def _in_chunks(self, pairs: Sequence[Pair]) -> Iterator[Pair]:
        for target, source in pairs:
            yield from zip(target.split(self._chunk_bytes), source.split(self._chunk_bytes), strict=True)

    def all_queued(self, home: Backend) -> list[Event]:
        """Return events that happen when all that was queued here is done, also copies whose event got lost."""
        return [home.copy_on(self._stream, [], []), self.helper.copy([])] if self._chunks else []

    def close(self) -> None:
        """Free the ring. No copy may be under way on the home's device."""
        if self._chunks:
            self.helper.close()  # Waits for copies into chunks that were not copied any further.
            self._chunks.clear()
            self._next = iter(())
