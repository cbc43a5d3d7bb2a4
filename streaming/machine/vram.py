"""How the memory of a CUDA device is used now. Reading it waits for no stream."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..devices.cuda_pages import page_counts
from .gpus import Link, Nvml, gpu_uuid, open_nvml


class Vram(NamedTuple):
    """Bytes of one device; None where it is not known.

    Attributes:
        total: in all.
        free: no process has allocated them.
        allocated, reserved: in use by this process, and taken from the device by it; both count torch's allocator and
            the pages for weights (lasting_memory.py).
    """

    total: int | None
    free: int | None
    allocated: int
    reserved: int


class VramReader:
    """Reads the memory of devices, as often as it is asked (:func:`open_vram_reader`).

    It makes no context on a device where this process has none (gpus.py, Note: no context): without NVML the free
    memory there stays unknown.
    """

    def __init__(self, nvml: Nvml) -> None:
        self._nvml = nvml

    def read(self, index: int) -> Vram:
        """Return the memory of the device that torch gives this number."""
        properties = torch.cuda.get_device_properties(index)
        total, free = self._nvml.memory(gpu_uuid(properties))
        if free is None and torch._C._cuda_hasPrimaryContext(index):
            free, total = torch.cuda.mem_get_info(index)
        statistics, pages = torch.cuda.memory_stats(index), page_counts(index)
        return Vram(
            properties.total_memory if total is None else total,
            free,
            statistics.get("allocated_bytes.all.current", 0) + pages.used,
            statistics.get("reserved_bytes.all.current", 0) + pages.mapped,
        )

    def driver(self) -> str | None:
        """Return the driver's version; None where it is not known."""
        return self._nvml.driver()

    def links(self, index: int) -> tuple[Link, Link]:
        """Return the device's link as it is now (slow while the GPU is idle), and the best that the card can do."""
        return self._nvml.links(gpu_uuid(torch.cuda.get_device_properties(index)))


@contextlib.contextmanager
def open_vram_reader() -> Iterator[VramReader]:
    """Open a reader, with NVML where this machine has it."""
    with open_nvml() as nvml:
        yield VramReader(nvml)
