"""Host memory that holds the master copies of what is streamed: page-locked where that is allowed and works."""

from __future__ import annotations

import mmap
import threading
import weakref
from collections.abc import Callable

import torch

from .backend import Backend
from .config import format_bytes


class PinBudget:
    """Page-locked bytes that all arenas of a process may have together.

    Args:
        limit: bytes; None sets no limit of our own.
        others: tells how many bytes of the same kind others in the process have locked.
    """

    def __init__(self, limit: int | None = None, others: Callable[[], int] = lambda: 0) -> None:
        self.limit = limit
        self.used = 0
        self._others = others
        self._counting = threading.Lock()

    def take(self, nbytes: int) -> bool:
        """Whether ``nbytes`` more may be locked; they count as locked if so."""
        with self._counting:
            if self.limit is not None and self.used + self._others() + nbytes > self.limit:
                return False
            self.used += nbytes
            return True

    def give(self, nbytes: int) -> None:
        with self._counting:
            self.used -= nbytes


class HostBuffer:
    """Anonymous host memory, page-locked by :meth:`Arena.lock` once it has been filled.

    Attributes:
        memory: uint8 tensor over the whole buffer. Views of it keep the memory mapped; only this object keeps it
            page-locked.
        pinned: whether it is page-locked.
    """

    def __init__(self, nbytes: int) -> None:
        with torch.inference_mode(False):
            self.memory = torch.frombuffer(mmap.mmap(-1, max(1, nbytes)), dtype=torch.uint8)[:nbytes]
        self.nbytes = nbytes
        self.pinned = False
        self._unlock: weakref.finalize | None = None

    def lock(self, backend: Backend, budget: PinBudget) -> str | None:
        """Page-lock; gives None, or the reason why not."""
        if not budget.take(self.nbytes):
            return f"the limit of {format_bytes(budget.limit or 0)} page-locked memory is reached"
        try:
            reason = backend.register(self.memory)
        except BaseException:
            budget.give(self.nbytes)
            raise
        if reason is not None:
            budget.give(self.nbytes)
            return reason
        self.pinned = True
        # Memory that is freed while registered makes a later registration of other memory fail, so the unlocking
        # hangs on this object's end and holds the memory until then. Not at exit: the process's pages go anyway,
        # and the driver may be gone.
        self._unlock = weakref.finalize(self, _unlock, backend, self.memory, budget)
        self._unlock.atexit = False
        return None

    def close(self) -> None:
        """Undo the locking. The memory goes with the last view of it. No copy from it may be under way."""
        if self._unlock is not None:
            self._unlock()
            self._unlock = None
        self.pinned = False


def _unlock(backend: Backend, memory: torch.Tensor, budget: PinBudget) -> None:
    backend.unregister(memory.data_ptr())
    budget.give(memory.nbytes)


class Arena:
    """Hands out host buffers and counts them.

    Attributes:
        pinned_bytes, pageable_bytes: bytes in live buffers, by kind.
        reason: why something is not page-locked, in words; None when everything is.
    """

    def __init__(self, backend: Backend, pin_memory: bool = True, budget: PinBudget | None = None) -> None:
        self._backend = backend
        self._budget = budget or PinBudget()
        self._pin_memory = pin_memory
        self._counting = threading.Lock()
        self.pinned_bytes = 0
        self.pageable_bytes = 0
        self.reason: str | None = None if pin_memory else "page-locking is switched off"

    def allocate(self, nbytes: int) -> HostBuffer:
        """Pageable memory. Fill it, then :meth:`lock` it: registering touched pages is several times faster."""
        buffer = HostBuffer(nbytes)
        with self._counting:
            self.pageable_bytes += nbytes
        return buffer

    def lock(self, buffer: HostBuffer) -> None:
        """Page-lock ``buffer`` if that is allowed and works; else it stays pageable and :attr:`reason` says why."""
        if not self._pin_memory or buffer.nbytes == 0:
            return
        reason = buffer.lock(self._backend, self._budget)
        with self._counting:
            if reason is None:
                self.pinned_bytes += buffer.nbytes
                self.pageable_bytes -= buffer.nbytes
            else:
                self.reason = reason

    def release(self, buffer: HostBuffer) -> None:
        """Take ``buffer`` back."""
        with self._counting:
            if buffer.pinned:
                self.pinned_bytes -= buffer.nbytes
            else:
                self.pageable_bytes -= buffer.nbytes
        buffer.close()
