"""Packed copies on their way to memory that processes share.

[Note: by way of memory between]
A memory file cannot be sealed while anything could still write to its pages, and a device that copies to page-locked
memory could. So what was packed goes down to page-locked memory of this process, to a few places in turn, and from
there threads write it to the file, with its table behind it, while the next units are packed. Then the file is
sealed, given to the broker, mapped and page-locked, as any shared copy is. The unit keeps its master copy until then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch

from ..errors import SharingError
from ..model.packed_table import table_of
from .arena import Arena
from .host_memory import HostBuffer
from .packed_copy import PackedCopy
from .shared_buffer import SharedBuffer, sharing
from .shared_packed import replace_by
from .unit_copies import UnitCopies

# So many copies are on their way at once, at most.
PLACES = 4


class _Written(NamedTuple):
    """A packed copy that a thread writes, from a place."""

    copies: UnitCopies
    packed: PackedCopy
    place: HostBuffer
    memory: Future[HostBuffer | None]


class Drafts:
    """The packed copies that are on their way (Note: by way of memory between).

    Args:
        arena: where memory comes from.
        submit: has a function run by a thread.
        release: takes memory back, behind other work.

    Attributes:
        failed: units for whose copies no more memory may be page-locked.
    """

    def __init__(
        self, arena: Arena, submit: Callable[..., Future[Any]], release: Callable[[HostBuffer], object]
    ) -> None:
        self.failed: list[UnitCopies] = []
        self._arena = arena
        self._submit = submit
        self._release = release
        self._places: list[HostBuffer] = []
        self._free: deque[HostBuffer] = deque()
        self._writing: deque[_Written] = deque()

    def place(self, nbytes: int) -> HostBuffer:
        """Return memory of at least so many bytes for the next unit to go down to, for :meth:`write`. It may be waited
        for."""
        if not self._free and len(self._places) >= PLACES:
            self._finish_first()
        if self._free and self._free[0].nbytes >= nbytes:
            return self._free.popleft()
        if self._free:
            self._forget(self._free.popleft())
        place, reason = self._arena.allocate(nbytes), self._arena.reason
        self._places.append(place)
        place.memory.numpy().fill(0)  # Touched pages are page-locked several times faster.
        self._arena.lock(place)  # Where that is not allowed copies to it are slower.
        self._arena.reason = reason
        return place

    def _forget(self, place: HostBuffer) -> None:
        self._places.remove(place)
        self._arena.release(place)

    def write(self, copies: UnitCopies, packed: PackedCopy, place: HostBuffer, unchanged: bool) -> None:
        """What was packed has arrived in ``place``: have it written to ``packed.memory``.

        Args:
            unchanged: whether it is what others would take it for.
        """
        memory = self._submit(_write, self._arena, packed, place.memory, unchanged)
        self._writing.append(_Written(copies, packed, place, memory))

    def finish(self) -> None:
        """Wait until everything is written, and streams from there."""
        with ExitStack() as each:  # The others also after an error with one.
            for _ in self._writing:
                each.callback(self._finish_first)

    def close(self) -> None:
        """Wait as :meth:`finish` does, and give all places back; none is in use. Later ones are taken anew."""
        try:
            self.finish()
        finally:
            self._free.clear()
            while self._places:
                self._forget(self._places[-1])

    def _finish_first(self) -> None:
        copies, packed, place, written = self._writing.popleft()
        try:
            memory = written.result()
        finally:
            self._free.append(place)
        if memory is None:
            self.failed.append(copies)
        else:
            replace_by(copies, packed._replace(memory=memory), self._release)


def _write(arena: Arena, packed: PackedCopy, content: torch.Tensor, unchanged: bool) -> HostBuffer | None:
    """On a thread: fill the shared memory of ``packed`` and page-lock it. Where the system has no more of such memory
    the copy is this process's own. Returns the memory, or None where no more may be page-locked."""
    memory, content = packed.memory, content[: packed.layout.nbytes]
    assert isinstance(memory, SharedBuffer)
    try:
        memory.write(memoryview(content.numpy()), 0)
        memory.write(memoryview(table_of(packed.layout)), packed.layout.nbytes)
        memory.finish(unchanged)
    except SharingError as error:
        arena.release(memory)
        sharing(arena).give_up(str(error))
        return _locked(arena, _own(arena, content))
    except BaseException:
        arena.release(memory)
        raise
    return _locked(arena, memory)


def _own(arena: Arena, content: torch.Tensor) -> HostBuffer | None:
    """Memory of this process with the same content; None where no more may be page-locked."""
    if (memory := arena.claim(content.nbytes)) is not None:
        memory.memory.copy_(content)
    return memory


def _locked(arena: Arena, memory: HostBuffer | None) -> HostBuffer | None:
    if memory is None or arena.lock(memory):
        return memory
    arena.release(memory)
    return None
