"""A segment that is bound: its modules use it on the device."""

from __future__ import annotations

import operator

import torch

from .places import Ways


class OpenSegment:
    """A segment that is bound.

    Attributes:
        active: its units that are running now.
        left: runs of its units until it is released; a segment that its block holds does not count down to zero.
        buffer: the memory in which it is: its slot, or its own.
        unpacked: the memory in which its packed units are once they are unpacked; None without any.
        ways: to that memory.
        writes: how often the memory had been written to when it was bound; None before that.
    """

    __slots__ = ("active", "buffer", "left", "unpacked", "ways", "writes")

    def __init__(self, left: int, buffer: torch.Tensor, unpacked: torch.Tensor | None, ways: Ways) -> None:
        self.active = 0
        self.left = left
        self.buffer = buffer
        self.unpacked = unpacked
        self.ways = ways
        self.writes: tuple[int, int] | None = None

    def unpack(self) -> None:
        """Queue the unpacking of what is packed."""
        for unpack in self.ways.unpacking:
            unpack()

    def bind(self) -> None:
        """Point the modules at the memory."""
        for binding in self.ways.bindings:
            binding.apply()
        self.writes = self._versions

    @property
    def _versions(self) -> tuple[int, int]:
        return self.buffer._version, self.unpacked._version if self.unpacked is not None else 0

    @property
    def is_written(self) -> bool:
        """Whether the memory was written to since then, or other weights were put in its place."""
        if self.writes is None:
            return False
        return self._versions != self.writes or not all(map(_is_in_place, self.ways.bindings))


_is_in_place = operator.methodcaller("is_in_place")
