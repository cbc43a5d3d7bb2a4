"""Slots of one device: all of them or none, and nothing stays behind."""

from __future__ import annotations

import pytest
import torch
from weightstream.streaming import CpuBackend, DeviceMemoryError, VirtualMemory
from weightstream.streaming.ring import Ring


def test_a_ring_that_does_not_fit_takes_nothing() -> None:
    backend = CpuBackend(VirtualMemory(3 * 512))
    with pytest.raises(DeviceMemoryError):
        Ring(backend, 4, 512)
    assert backend.allocated == backend.store.allocated == 0


def test_memory_that_the_system_does_not_give_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = CpuBackend(VirtualMemory(3 * 512))

    def refuse(nbytes: int) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(backend, "_empty", refuse)
        with pytest.raises(torch.OutOfMemoryError):
            Ring(backend, 3, 512)
    assert backend.allocated == backend.store.allocated == 0
    Ring(backend, 3, 512).release()


def test_a_ring_is_given_back() -> None:
    backend = CpuBackend(VirtualMemory(3 * 512))
    for _ in range(2):
        ring = Ring(backend, 3, 512)
        assert backend.allocated == 3 * 512
        ring.release()
        ring.release()
    assert backend.allocated == backend.store.allocated == 0
