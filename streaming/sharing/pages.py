"""Memory that several processes map: one of them fills it and seals it, and from then on it is the same for all.

[Note: whole or nobody's]
A copy is made in an anonymous memory file (``memfd_create``), which has no name: no process can reach it but the one
that has made it. That process writes it through its descriptor, seals it, and only then hands a descriptor on. So
 1. before the copy is whole nobody else has a descriptor of it. If its builder dies half-way the kernel closes the only
    one there is, and the memory is freed;
 2. the broker takes a descriptor only if the kernel says that the file is sealed and as long as it should be, and the
    process that maps it asks the kernel once more. A file that can still be written to is refused by both;
 3. a key is of one copy at a time, and the broker answers one request after another. Whoever asks for it is told that
    it is whole, that somebody builds it, or to build it, and nothing between these.

[Note: a write reaches nobody else]
The seals (no writing, no growing, no shrinking, no other seals) are the kernel's, and nobody can take them off. It sets
the one against writing only while no writable mapping of the file exists; here there never is one, as a copy is written
with ``pwrite``. From then on the kernel refuses every ``write`` and every writable shared mapping, also through another
descriptor and in the builder itself. What streams is mapped read-only: a write by mistake would end the process that
makes it, and change nothing. That never happens to code of others, which may write to what modules hold at any moment.
Modules hold what was loaded, or, where patches are in the copy, a second mapping of it, a private one: the kernel gives
a page of its own to the process that writes there (copy on write). Such writes are found when the model is loaded next
(changes.py), and what streams then is memory of this process's own. Page-locking does not change this: it is asked for
with the flag that promises the driver that devices only read.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref
from functools import cache
from typing import Any

try:
    import fcntl
except ImportError:  # Windows, which has no memory files either.
    fcntl = None  # type: ignore[assignment]

# Linux' fcntl.h; Python's module has the names where it was built with them.
_ADD_SEALS, _GET_SEALS = 1033, 1034
_SEALS = 0x1 | 0x2 | 0x4 | 0x8  # No other seals, no shrinking, no growing, no writing.

PAGE_BYTES = mmap.PAGESIZE


def why_not_here() -> str | None:
    """Why this system has no memory that can be shared like this; None where it has."""
    if not sys.platform.startswith("linux") or not hasattr(os, "memfd_create"):
        return f"{sys.platform} has no sealed memory files"
    return None


class Draft:
    """A copy that is being written; it is its process's own until :meth:`seal`.

    Args:
        nbytes: its size.

    Raises:
        OSError: the system gives no such memory.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._descriptor = os.memfd_create("weightstream", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._close = weakref.finalize(self, os.close, self._descriptor)
        os.ftruncate(self._descriptor, nbytes)

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of ``data`` at ``offset``."""
        data, done = data.cast("B"), 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done:], offset + done)

    def seal(self) -> int:
        """End writing for ever; returns a descriptor that can only read, which is the caller's (Notes above)."""
        fcntl.fcntl(self._descriptor, _ADD_SEALS, _SEALS)
        # Older kernels map a sealed file only through a descriptor that was opened for reading.
        reading = os.open(f"/proc/self/fd/{self._descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        self.close()
        return reading

    def close(self) -> None:
        """Give it up; after :meth:`seal` the memory lives with the descriptor that was returned."""
        self._close()


def find_fault(descriptor: int, nbytes: int) -> str | None:
    """Why this is no whole copy of ``nbytes`` bytes; None if it is one (Note: whole or nobody's, 2)."""
    try:
        seals = fcntl.fcntl(descriptor, _GET_SEALS)
    except OSError:
        return "it is no memory file"
    if seals & _SEALS != _SEALS:
        return "it can still be written to"
    size = os.fstat(descriptor).st_size
    return None if size == nbytes else f"it has {size} bytes instead of {nbytes}"


class Mapping:
    """A whole copy, mapped until nothing refers to this object any more.

    A child process does not inherit it: it would keep the memory. Python's own mappings are not used, as each would
    keep a descriptor open, of which a process may have few.

    Args:
        descriptor: of the copy; it stays the caller's, and is not needed any more.
        nbytes: its size.
        private: map it so that it can be written to, by this process and for it alone.

    Attributes:
        address: where it is mapped.

    Raises:
        OSError: it is no whole copy, or cannot be mapped.
    """

    def __init__(self, descriptor: int, nbytes: int, private: bool = False) -> None:
        if (fault := find_fault(descriptor, nbytes)) is not None:
            raise OSError(f"a shared copy cannot be used: {fault}")
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if private else 0)
        flags = mmap.MAP_PRIVATE | _NO_RESERVE if private else mmap.MAP_SHARED
        self.address: int = _libc().mmap(None, nbytes, protection, flags, descriptor, 0)
        if self.address == _FAILED:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self._unmap = weakref.finalize(self, _libc().munmap, self.address, nbytes)
        self._unmap.atexit = False
        _libc().madvise(self.address, nbytes, mmap.MADV_DONTFORK)


# Nobody writes to most of them, so no memory is set aside for that. Python knows the name since 3.13.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
# MAP_FAILED, which is (void *) -1.
_FAILED = ctypes.c_void_p(-1).value


@cache
def _libc() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library
