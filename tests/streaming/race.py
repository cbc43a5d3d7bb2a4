"""A backend that proves the order of every access to staging memory, instead of hoping to hit a bad moment.

Each stream has a vector clock. An event carries the clock of its stream at the time of its record; a wait joins it
into the waiting stream's clock. Two accesses to one slot, at least one of them a write, race unless the clock of the
later one has seen the earlier. That holds for every possible timing at once, so one run of a program is enough.

Threads that read ahead have clocks too: ``finish`` joins a copy's clock into the one of the thread that waited. So a
chunk of the reader's ring is checked as a slot is: it is written by a thread, and read by copies. That a thread is done
with it before a copy is queued is checked as it happens.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch
from torch import nn
from weightstream.streaming import Backend, DeviceMemory, reader
from weightstream.streaming.layout import Layout

COMPUTE = 0
Clock = dict[int, int]


class RaceBackend(Backend):
    """Copies take place at once; what is checked is whether anything would have made them wait."""

    fine_bytes = 256  # A unit of this file's models takes 512 bytes: two pieces.

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), "race")
        self.clocks: dict[int, Clock] = {COMPUTE: {}}
        self.writes: dict[int, list[Clock]] = {}
        self.reads: dict[int, list[Clock]] = {}
        self.accesses = 0
        self.chunk_accesses = 0
        self._slots: list[range] = []
        self._reading_ahead: dict[threading.Thread, Clock] = {}
        self._chunks: dict[int, range] = {}
        self._chunk_reads: dict[int, list[Clock]] = {}
        self._being_written: set[int] = set()
        # Who reads ahead, who queues copies and who computes are threads of their own.
        self._checking = threading.RLock()

    def watch_chunks(self, patch: pytest.MonkeyPatch) -> None:
        """Check what the reader writes to chunks. Where something is given up, synchronize: else a chunk that one
        thread waited for may be written by another."""
        read_range = reader.read_range

        def write(layout: Layout, start: int, stop: int, target: torch.Tensor, forget: bool = False) -> None:
            chunk = target.data_ptr()
            with self._checking:
                self.chunk_accesses += 1
                now = self._reading_ahead.setdefault(threading.current_thread(), {})
                self._check(now, self._chunk_reads.get(chunk, []), "a chunk is overwritten before the copy out of it")
                self._chunks[chunk], self._chunk_reads[chunk] = range(chunk, chunk + target.nbytes), []
                self._being_written.add(chunk)
            read_range(layout, start, stop, target, forget)
            with self._checking:
                self._being_written.discard(chunk)

        patch.setattr(reader, "read_range", write)

    def allocate(self, nbytes: int) -> torch.Tensor:
        buffer = super().allocate(nbytes)
        self._slots.append(range(buffer.data_ptr(), buffer.data_ptr() + nbytes))
        return buffer

    def free(self, buffer: torch.Tensor) -> int:
        """The memory may come back as part of another slot. Who frees it must have let all accesses finish."""
        start = buffer.data_ptr()
        compute = {**self.clocks[COMPUTE], -1: COMPUTE}
        for accesses in (self.writes.pop(start, []), self.reads.pop(start, [])):
            self._check(compute, accesses, "staging memory is freed while it may be in use")
        self._slots = [slot for slot in self._slots if slot.start != start]
        return super().free(buffer)

    def _slot(self, tensor: torch.Tensor) -> int | None:
        """The start of the allocation that ``tensor`` lies in."""
        return next((slot.start for slot in self._slots if tensor.data_ptr() in slot), None)

    def _create_stream(self) -> int:
        stream = len(self.clocks)
        self.clocks[stream] = {}
        return stream

    def _copy_now(
        self, stream: int | None, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], waits: Sequence[Clock]
    ) -> Clock:
        with self._checking:
            return self._copy_in_order(COMPUTE if stream is None else stream, pairs, waits)

    def _copy_in_order(
        self, stream: int, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], waits: Sequence[Clock]
    ) -> Clock:
        for event in waits:
            self._join(stream, event)
        for target, source in pairs:
            slot = self._slot(target)
            assert slot is not None, "a copy outside of the ring"
            now = self._tick(stream)
            self._check(now, self.reads.get(slot, []), "a copy overwrites a slot that may still be read")
            self._check(now, self.writes.get(slot, []), "a copy may be overtaken by an earlier one into its slot")
            self.writes.setdefault(slot, []).append(now)
            self._read_chunk(source, now)
            target.copy_(source)
        return dict(now)

    def _read_chunk(self, source: torch.Tensor, now: Clock) -> None:
        for start, chunk in self._chunks.items():
            if source.data_ptr() in chunk:
                assert start not in self._being_written, "a copy reads a chunk that is not filled yet"
                self._chunk_reads[start].append(now)

    def mark(self) -> Clock:
        with self._checking:
            return dict(self.clocks[COMPUTE])

    def wait(self, event: Clock):
        with self._checking:
            self._join(COMPUTE, event)
        return lambda: 0.0

    def memory(self) -> DeviceMemory:
        return DeviceMemory(1 << 40, 0)

    def trim(self) -> None:
        """Nothing is kept for later."""

    def moment(self) -> float:
        return 0.0

    def seconds(self, begin: float, end: float) -> float:
        return end - begin

    def finish(self, event: Clock) -> None:
        """Every copy has taken place already; who waits for one has seen it."""
        with self._checking:
            clock = self._reading_ahead.setdefault(threading.current_thread(), {})
            self._join_clock(clock, event)

    def synchronize(self) -> None:
        with self._checking:
            self._join_all()
            self._chunks.clear()  # All copies out of them are over; the next ring may be elsewhere.
            self._chunk_reads.clear()

    def _join_all(self) -> None:
        for stream, clock in self.clocks.items():
            if stream != COMPUTE:
                self._join(COMPUTE, clock)
        for stream in self.clocks:
            self._join(stream, self.clocks[COMPUTE])

    def register(self, buffer: torch.Tensor) -> str | None:
        return None

    def unregister(self, address: int) -> None:
        """Nothing was locked."""

    def read(self, tensor: torch.Tensor) -> None:
        """Compute reads the slot that ``tensor`` lies in, if it lies in one."""
        with self._checking:
            slot = self._slot(tensor)
            now = self._tick(COMPUTE)
            if slot in self.writes:
                self._check(now, self.writes[slot], "a block reads a slot before the copy into it is done")
                self.reads.setdefault(slot, []).append(now)

    def _tick(self, stream: int) -> Clock:
        self.accesses += 1
        clock = self.clocks[stream]
        clock[stream] = clock.get(stream, 0) + 1
        return {**clock, -1: stream}

    def _join(self, stream: int, other: Clock) -> None:
        self._join_clock(self.clocks[stream], other)

    @staticmethod
    def _join_clock(clock: Clock, other: Clock) -> None:
        for key, value in other.items():
            if key != -1:
                clock[key] = max(clock.get(key, 0), value)

    @staticmethod
    def _check(now: Clock, earlier: list[Clock], message: str) -> None:
        for access in earlier:
            stream = access[-1]
            assert now.get(stream, 0) >= access[stream], message


class NumberedPart(nn.Module):
    """A unit whose weight is its number: a wrong weight is seen at once."""

    def __init__(self, number: int, backend: RaceBackend) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), float(number)), requires_grad=False)
        self.number = number
        self.backend = backend

    def read(self) -> None:
        self.backend.read(self.weight)
        assert self.weight.tolist() == [float(self.number)] * 4, f"unit {self.number} computed with {self.weight}"

    def forward(self) -> None:
        self.read()


class NumberedBlock(nn.Module):
    """A block of three units, and one that it reads without running it where ``reads_directly``."""

    def __init__(self, number: int, backend: RaceBackend, reads_directly: bool) -> None:
        super().__init__()
        # No list: a block that is nothing but a list of layers would be taken apart.
        self.part0, self.part1, self.part2 = (NumberedPart(10 * number + part, backend) for part in range(3))
        self.direct = NumberedPart(10 * number + 9, backend) if reads_directly else None
        self.number = number

    def forward(self, seen: list[int], parts: str) -> list[int]:
        for part in parts:
            getattr(self, f"part{part}")()
        if self.direct is not None:
            self.direct.read()
        return [*seen, self.number]


class NumberedModel(nn.Module):
    def __init__(self, count: int, backend: RaceBackend, reads_directly: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(NumberedBlock(number, backend, reads_directly) for number in range(count))

    def forward(self, order: list[int], parts: str = "012") -> list[int]:
        """Run blocks in ``order``, each with its ``parts`` in their order; parts may be left out or repeated."""
        seen: list[int] = []
        for index in order:
            seen = self.blocks[index](seen, parts)
        return seen
