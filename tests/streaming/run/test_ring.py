"""Staging memory of one device: all of it or none, and nothing stays behind; who waits for whom in it."""

from __future__ import annotations

import pytest
import torch
from weightstream.streaming import CpuBackend, DeviceMemoryError, VirtualMemory
from weightstream.streaming.run.ring import Ring
from weightstream.streaming.run.unpacking import UnpackingMemory
from weightstream.streaming.split.feeder import Feeder

SPANS = [range(512), range(512, 1536), range(256, 1024)]


def test_a_ring_that_does_not_fit_takes_nothing() -> None:
    backend = CpuBackend(VirtualMemory(3 * 512))
    with pytest.raises(DeviceMemoryError):
        Ring(backend, 4 * 512, SPANS)
    assert backend.allocated == backend.store.allocated == 0


def test_memory_that_the_system_does_not_give_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = CpuBackend(VirtualMemory(3 * 512))

    def refuse(nbytes: int) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(backend, "_empty", refuse)
        with pytest.raises(torch.OutOfMemoryError):
            Ring(backend, 3 * 512, SPANS)
    assert backend.allocated == backend.store.allocated == 0
    Ring(backend, 3 * 512, SPANS).close()


def test_a_ring_is_given_back() -> None:
    backend = CpuBackend(VirtualMemory(3 * 512))
    for _ in range(2):
        ring = Ring(backend, 3 * 512, SPANS)
        assert backend.allocated == 3 * 512
        ring.close()
    assert backend.allocated == backend.store.allocated == 0


class Marks(CpuBackend):
    """Its events are numbers."""

    count = 0

    def mark(self) -> int:
        self.count += 1
        return self.count


def test_a_copy_waits_for_those_who_read_its_memory_until_another_does() -> None:
    ring = Ring(Marks(VirtualMemory(3 * 512)), 3 * 512, SPANS)
    first, second, both = ring.slots
    assert ring.guards(first) == [1], "of whoever had the memory before"
    ring.filled(first)
    assert ring.guards(second) == []
    ring.filled(second)
    ring.release(first)
    ring.release(second)
    assert ring.guards(both) == [2, 3]
    assert ring.guards(both) == [2, 3], "the copy that asked before has failed"
    ring.filled(both)
    assert ring.guards(both) == ring.guards(first) == []


def test_who_reads_after_a_copy_was_asked_for_is_waited_for_by_the_next() -> None:
    ring = Ring(Marks(VirtualMemory(3 * 512)), 3 * 512, SPANS)
    first, _, both = ring.slots
    ring.release(first)
    assert ring.guards(both) == [1, 2]
    ring.release(first)
    ring.filled(both)
    assert ring.guards(both) == [3]


def test_a_ring_that_cannot_be_made_takes_nothing() -> None:
    class Broken(Marks):
        def mark(self) -> int:
            raise OSError("the device is gone")

    backend = Broken(VirtualMemory(3 * 512))
    with pytest.raises(OSError, match="gone"):
        Ring(backend, 3 * 512, SPANS)
    assert backend.allocated == backend.store.allocated == 0


def test_writes_to_one_slot_do_not_count_for_another() -> None:
    first, second, _ = Ring(CpuBackend(VirtualMemory(3 * 512)), 3 * 512, SPANS).slots
    before = second.buffer._version
    first.buffer.fill_(1)
    assert second.buffer._version == before
    assert first.buffer._version > 0


class Kinds(CpuBackend):
    """Notes for which buffers memory of their own would do."""

    def __init__(self) -> None:
        super().__init__(VirtualMemory(1 << 20))
        self.lasting: list[bool] = []

    def allocate(self, nbytes: int, lasting: bool = False) -> torch.Tensor:
        self.lasting.append(lasting)
        return super().allocate(nbytes, lasting)


def test_slots_have_memory_of_their_own_unless_other_devices_copy_into_them() -> None:
    alone, fed = Kinds(), Kinds()
    fed.feeders.append(Feeder(CpuBackend(VirtualMemory(1 << 20))))
    for backend in (alone, fed):
        Ring(backend, 3 * 512, SPANS).close()
        memory = UnpackingMemory(backend)
        memory.allocate(512)
        memory.close()
    assert alone.lasting == [True, True]
    assert fed.lasting == [False, True], "nobody but the device itself unpacks"
