"""Host memory that holds the master copies of what is streamed: page-locked where that is allowed and works."""

from __future__ import annotations

import mmap
import threading
import weakref

import torch

from .backend import Backend
from .config import format_bytes


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

    def lock(self, backend: Backend) -> str | None:
        """Page-lock; gives None, or the reason why not."""
        reason = backend.register(self.memory)
        if reason is None:
            self.pinned = True
            # Memory that is freed while registered makes a later registration of other memory fail, so the
            # unlocking hangs on this object's end and holds the memory until then. Not at exit: the process's
            # pages go anyway, and the driver may be gone.
            self._unlock = weakref.finalize(self, _unlock, backend, self.memory)
            self._unlock.atexit = False
        return reason

    def close(self) -> None:
        """Undo the locking. The memory goes with the last view of it. No copy from it may be under way."""
        if self._unlock is not None:
            self._unlock()
            self._unlock = None
        self.pinned = False


def _unlock(backend: Backend, memory: torch.Tensor) -> None:
    backend.unregister(memory.data_ptr())


class Arena:
    """Hands out host buffers and counts them.

    Attributes:
        pinned_bytes, pageable_bytes: bytes in live buffers, by kind.
        reason: why something is not page-locked, in words; None when everything is.
    """

    def __init__(self, backend: Backend, pin_memory: bool = True, pin_limit: int | None = None) -> None:
        self._backend = backend
        self._pin_limit = pin_limit
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
        with self._counting:
            if self._pin_limit is not None and self.pinned_bytes + buffer.nbytes > self._pin_limit:
                self.reason = f"the limit of {format_bytes(self._pin_limit)} page-locked memory is reached"
                return
            self.pinned_bytes += buffer.nbytes
            self.pageable_bytes -= buffer.nbytes
        reason = buffer.lock(self._backend)
        if reason is not None:
            with self._counting:
                self.pinned_bytes -= buffer.nbytes
                self.pageable_bytes += buffer.nbytes
                self.reason = reason

    def release(self, buffer: HostBuffer) -> None:
        """Take ``buffer`` back."""
        with self._counting:
            if buffer.pinned:
                self.pinned_bytes -= buffer.nbytes
            else:
                self.pageable_bytes -= buffer.nbytes
        buffer.close()
