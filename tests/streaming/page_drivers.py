"""A driver of pages that is strict, and has their memory in RAM."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import torch
from weightstream.streaming.devices.lasting_memory import Memory
from weightstream.streaming.devices.pages import OutOfPagesError

# What a page holds that nobody has written to, and one that is gone.
NEW, GONE = 0xAA, 0xDD


class RamPages:
    """Maps what was reserved and is not mapped, unmaps what was mapped as a whole, and nothing else.

    Attributes:
        mapped: what is mapped now, as it was: sizes by addresses.
        reserved: what is reserved now, likewise.
        free_pages: how many can still be mapped.
        maps: how often memory was mapped.
        before_map, before_unmap: called first, with address and size.
    """

    def __init__(self, page_bytes: int = 2048, free_pages: int = 1 << 30) -> None:
        self.page_bytes = page_bytes
        self.free_pages = free_pages
        self.mapped: dict[int, int] = {}
        self.reserved: dict[int, int] = {}
        self.maps = 0
        self.before_map: Callable[[int, int], None] = _nothing
        self.before_unmap: Callable[[int, int], None] = _nothing
        self._memory: list[np.ndarray] = []  # All of it, so that no address comes back.

    def reserve(self, nbytes: int) -> int:
        memory = np.full(nbytes + self.page_bytes, GONE, np.uint8)
        address = memory.ctypes.data + -memory.ctypes.data % self.page_bytes
        self._memory.append(memory)
        self._check_pages(address, nbytes)
        self.reserved[address] = nbytes
        return address

    def unreserve(self, address: int, nbytes: int) -> None:
        assert self.reserved.pop(address) == nbytes
        assert not any(address <= mapped < address + nbytes for mapped in self.mapped), "something is mapped there"

    def map(self, address: int, nbytes: int) -> None:
        self.before_map(address, nbytes)
        self._check_pages(address, nbytes)
        span = range(address, address + nbytes)
        assert any(start <= span.start and span.stop <= start + size for start, size in self.reserved.items())
        for start, size in self.mapped.items():
            assert span.stop <= start or start + size <= span.start, "mapped twice"
        if nbytes > self.free_pages * self.page_bytes:
            raise OutOfPagesError
        self.free_pages -= nbytes // self.page_bytes
        self.mapped[address] = nbytes
        self.maps += 1
        ctypes.memset(address, NEW, nbytes)

    def unmap(self, address: int, nbytes: int) -> None:
        self.before_unmap(address, nbytes)
        assert self.mapped.pop(address, None) == nbytes, "not what was mapped"
        self.free_pages += nbytes // self.page_bytes
        ctypes.memset(address, GONE, nbytes)

    def _check_pages(self, address: int, nbytes: int) -> None:
        assert nbytes > 0
        assert address % self.page_bytes == nbytes % self.page_bytes == 0, "not whole pages"

    @property
    def mapped_pages(self) -> set[int]:
        return {page for start, size in self.mapped.items() for page in range(start, start + size, self.page_bytes)}


def as_tensor(memory: Memory) -> torch.Tensor:
    """A tensor in RAM, which keeps ``memory``."""
    array = (ctypes.c_uint8 * memory.nbytes).from_address(memory.address)
    array.owner = memory
    return torch.frombuffer(array, dtype=torch.uint8)


def _nothing(address: int, nbytes: int) -> None:
    """Nobody looks on."""
