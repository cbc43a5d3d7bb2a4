"""A backend that proves the order of every access to memory on its device, and to what is copied (accesses.py).

Threads that read ahead have clocks too: ``finish`` joins a copy's clock into the one of the thread that waited. So a
chunk of the reader's ring is checked as a slot is: it is written by a thread, and read by copies.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch
from accesses import Accesses, Clock, span_of
from torch import nn
from uncounted import UncountedBackend
from weightstream.streaming.devices.copies import Pair

COMPUTE = "compute"


class RaceBackend(UncountedBackend):
    """Copies take place at once; what is checked is whether anything would have made them wait."""

    fine_bytes = 256  # A unit of this file's models takes 512 bytes: two pieces.

    def __init__(self, accesses: Accesses | None = None, compute: str = COMPUTE) -> None:
        super().__init__(torch.device("cpu"), "race")
        self.memory_accesses = Accesses() if accesses is None else accesses
        self.compute = compute
        self._all_streams = [compute]
        self._locked: dict[int, range] = {}

    @property
    def accesses(self) -> int:
        return self.memory_accesses.count

    @property
    def chunk_accesses(self) -> int:
        return self.memory_accesses.host_writes

    def watch_chunks(self, patch: pytest.MonkeyPatch) -> None:
        """Check what the reader writes to chunks. Where something is given up, synchronize: else a chunk that one
        thread waited for may be written by another."""
        self.memory_accesses.watch_reader(patch)

    def allocate(self, nbytes: int, lasting: bool = False) -> torch.Tensor:
        buffer = super().allocate(nbytes, lasting)
        # Whoever had this memory before has kernels under way in it.
        self.memory_accesses.write(self._launch(self.compute), buffer)
        return buffer

    def free(self, buffer: torch.Tensor) -> int:
        """Compute may get the memory for something else."""
        self.memory_accesses.end(self.compute, span_of(buffer), "gets memory that may be in use")
        return super().free(buffer)

    def _launch(self, stream: str) -> str:
        """``stream`` is given something to do: after all that this thread has seen."""
        self.memory_accesses.see(stream, self.memory_accesses.seen_by(threading.current_thread()))
        return stream

    def _create_stream(self) -> str:
        self._all_streams.append(f"copy stream {len(self._all_streams)} of {id(self)}")
        return self._all_streams[-1]

    def _copy_now(self, stream: str | None, pairs: Sequence[Pair], waits: Sequence[Clock]) -> Clock:
        stream = self._launch(stream or self.compute)
        for event in waits:
            self.memory_accesses.see(stream, event)
        for target, source in pairs:
            self.memory_accesses.read(stream, source)
            self.memory_accesses.write(stream, target)
            target.copy_(source)
        return self.memory_accesses.seen_by(stream)

    def mark(self) -> Clock:
        return self.memory_accesses.seen_by(self._launch(self.compute))

    def wait(self, event: Clock):
        self.memory_accesses.see(self._launch(self.compute), event)
        return lambda: 0.0

    def hold_back(self, seconds: float) -> None:
        """Time does not pass here."""

    def moment(self) -> float:
        return 0.0

    def seconds(self, begin: float, end: float) -> float:
        return end - begin

    def finish(self, event: Clock) -> None:
        """Every copy has taken place already; who waits for one has seen it."""
        self.memory_accesses.see(threading.current_thread(), event)

    def synchronize(self) -> None:
        self.memory_accesses.end_of(self._all_streams)

    def register(self, buffer: torch.Tensor) -> str | None:
        self._locked[buffer.data_ptr()] = span_of(buffer)
        return None

    def unregister(self, address: int) -> None:
        who = threading.current_thread()
        self.memory_accesses.end(who, self._locked.pop(address), "unlocks memory that a copy may be using")

    def close(self) -> None:
        self.synchronize()  # As on a GPU.
        super().close()

    def read(self, tensor: torch.Tensor) -> None:
        """Compute reads ``tensor``."""
        self.memory_accesses.read(self._launch(self.compute), tensor)

    def write(self, tensor: torch.Tensor) -> None:
        """Compute writes to ``tensor``."""
        self.memory_accesses.write(self._launch(self.compute), tensor)


SMALL = torch.ones(4)


class NumberedPart(nn.Module):
    """A unit whose weight is its number, as often as ``like`` has values: a wrong weight is seen at once."""

    def __init__(self, number: int, backend: RaceBackend, like: torch.Tensor = SMALL) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full_like(like, float(number)), requires_grad=False)
        self.number = number
        self.backend = backend

    def read(self) -> None:
        self.backend.read(self.weight)
        assert (self.weight == self.number).all(), f"unit {self.number} computed with {self.weight}"

    def forward(self) -> None:
        self.read()


class NumberedBlock(nn.Module):
    """A block of three units, and one that it reads without running it where ``reads_directly``."""

    def __init__(self, number: int, backend: RaceBackend, reads_directly: bool, like: torch.Tensor = SMALL) -> None:
        super().__init__()
        # No list: a block that is nothing but a list of layers would be taken apart.
        self.part0, self.part1, self.part2 = (NumberedPart(10 * number + part, backend, like) for part in range(3))
        self.direct = NumberedPart(10 * number + 9, backend, like) if reads_directly else None
        self.number = number

    def forward(self, seen: list[int], parts: str) -> list[int]:
        for part in parts:
            getattr(self, f"part{part}")()
        if self.direct is not None:
            self.direct.read()
        return [*seen, self.number]


class NumberedModel(nn.Module):
    def __init__(
        self, count: int, backend: RaceBackend, reads_directly: bool = False, like: torch.Tensor = SMALL
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(NumberedBlock(number, backend, reads_directly, like) for number in range(count))

    def forward(self, order: list[int], parts: str = "012") -> list[int]:
        """Run blocks in ``order``, each with its ``parts`` in their order; parts may be left out or repeated."""
        seen: list[int] = []
        for index in order:
            seen = self.blocks[index](seen, parts)
        return seen
