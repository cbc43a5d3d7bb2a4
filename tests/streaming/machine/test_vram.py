"""Reading how a GPU's memory is used: from NVML where that is, and never by making a context."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from weightstream.streaming import Vram, VramReader
from weightstream.streaming.devices.lasting_memory import PageCounts
from weightstream.streaming.machine import vram

GB = 10**9


class Library:
    """NVML that knows a figure, or nothing."""

    def __init__(self, total: int | None = None, free: int | None = None) -> None:
        self._memory = total, free

    def memory(self, uuid: str | None) -> tuple[int | None, int | None]:
        assert uuid == "GPU-0af1"
        return self._memory


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A GPU of 24 GB of which torch has 4 GB, 3 GB of it given out; and who asked CUDA for what is free."""
    asked: list[int] = []

    def free(index: int) -> tuple[int, int]:
        asked.append(index)
        return 10 * GB, 24 * GB

    statistics = {"allocated_bytes.all.current": 3 * GB, "reserved_bytes.all.current": 4 * GB}
    properties = SimpleNamespace(uuid="0af1", total_memory=24 * GB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda index: statistics)
    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    return asked


def has_context(monkeypatch: pytest.MonkeyPatch, answer: bool) -> None:
    monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda index: answer, raising=False)


def test_nvml_is_asked_first(asked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    has_context(monkeypatch, True)
    reader: Any = VramReader(Library(25 * GB, 9 * GB))
    assert reader.read(1) == Vram(25 * GB, 9 * GB, 3 * GB, 4 * GB)
    assert asked == []


@pytest.mark.parametrize("context", [False, True])
def test_without_nvml_a_gpu_without_context_gets_none(
    asked: list[int], monkeypatch: pytest.MonkeyPatch, context: bool
) -> None:
    has_context(monkeypatch, context)
    reader: Any = VramReader(Library())
    assert reader.read(1) == Vram(24 * GB, 10 * GB if context else None, 3 * GB, 4 * GB)
    assert asked == ([1] if context else [])


def test_weights_in_pages_count_too(asked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    has_context(monkeypatch, True)
    monkeypatch.setattr(vram, "page_counts", lambda index: PageCounts(index * GB, (index + 1) * GB))
    reader: Any = VramReader(Library(25 * GB, 9 * GB))
    assert reader.read(1) == Vram(25 * GB, 9 * GB, 4 * GB, 6 * GB)
