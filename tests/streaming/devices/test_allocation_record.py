"""A record of allocations that somebody else keeps, as the engine asks it."""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from weightstream.streaming import CpuBackend, CudaBackend, DeviceMemory, VirtualMemory
from weightstream.streaming.devices.allocation_record import NO_RECORD, AllocationRecord

GPU = torch.device("cuda", 0)


class Record(AllocationRecord):
    """Holds memory of the first GPU, and counts how often it was paused."""

    def __init__(self) -> None:
        self.pauses = 0

    def paused(self) -> AbstractContextManager[None]:
        @contextmanager
        def pause():
            self.pauses += 1
            yield

        return pause()

    def held_bytes(self, device: torch.device) -> int:
        return 300 if device == GPU else 0


@pytest.mark.parametrize(("record", "cached"), [(NO_RECORD, 50), (Record(), 350)])
def test_what_it_holds_counts_as_kept_for_the_next_step(
    monkeypatch: pytest.MonkeyPatch, record: AllocationRecord, cached: int
) -> None:
    reserved = {"reserved_bytes.all.current": 150, "active_bytes.all.current": 100}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: reserved)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    assert CudaBackend(GPU, record).memory() == DeviceMemory(free=1000, cached=cached)


def test_each_allocation_pauses_it() -> None:
    record = Record()
    backend = CpuBackend(VirtualMemory(100), record=record)
    buffers = [backend.allocate(10), backend.allocate(20)]
    assert record.pauses == len(buffers) == 2


def test_without_one_nothing_pauses_and_nothing_is_held() -> None:
    with NO_RECORD.paused():
        assert NO_RECORD.held_bytes(GPU) == 0
