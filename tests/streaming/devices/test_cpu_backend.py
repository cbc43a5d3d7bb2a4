"""Copies of a virtual device, on threads, keep the order in which they were queued."""

from __future__ import annotations

import time

import pytest
import torch
from weightstream.streaming import CpuBackend, VirtualMemory


def test_a_copy_waits_for_the_one_before_on_another_stream() -> None:
    backend = CpuBackend(VirtualMemory(4096))
    backend.open(2)
    target = backend.allocate(64)
    for number in (1, 2):
        backend._streams[0].submit(time.sleep, 0.02)  # The first of two begins late.
        backend.copy([(target, torch.full((64,), number, dtype=torch.uint8))])
        backend.wait(backend.copy([(target, torch.full((64,), 10 * number, dtype=torch.uint8))]))
        backend.synchronize()
        assert target.tolist() == [10 * number] * 64


def test_all_of_several_copies_fails_with_any() -> None:
    backend = CpuBackend(VirtualMemory(4096))
    backend.open(1)
    target, wrong = backend.allocate(64), torch.zeros(63, dtype=torch.uint8)
    copies = [backend.copy([(target, source)]) for source in (wrong, torch.zeros_like(target))]
    with pytest.raises(RuntimeError, match="size"):
        backend.wait(backend.all_of(copies))
