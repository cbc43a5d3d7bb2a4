"""How much of a file the system has in its page cache, and how to have all of it there, or nothing.

A loader that reads 24 GB takes half a second where they are cached and a quarter of a minute where they are not, and
who ran before decides which: comfy-aimdo's host buffers have the system forget what they have read, and so does our
loader where RAM is short. So the state is set before each process, and what it was is part of the result.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path

DROP_CACHES = Path("/proc/sys/vm/drop_caches")
MB = 1 << 20
# A file is asked about in windows, since a private mapping of it all might be refused.
WINDOW = 1 << 30
# A file of which no more than this is cached counts as cold: some of its pages may be in use at the moment.
COLD_SHARE = 0.01


class PageCache(Enum):
    """What a process that is measured finds of its file in the page cache."""

    WARM = "warm"
    """All of it."""
    COLD = "cold"
    """Nothing."""
    AS_IT_IS = "as it is"
    """Whatever is there: it does not read the file."""


@contextlib.contextmanager
def prepared(path: Path, state: PageCache) -> Iterator[dict[str, float | None]]:
    """Bring the page cache to ``state`` for the process that is started in the block.

    Gives which part of the file was cached: ``before`` anything was done about it, at the ``start`` of the process and
    at its ``end``.

    Raises:
        OSError: the file stays in the page cache where it should not.
    """
    shares = {"before": share(path)}
    if state is PageCache.WARM:
        warm(path)
    elif state is PageCache.COLD and not cool(path):
        raise OSError(f"{path} stays in the page cache: only root can drop that")
    shares["start"] = share(path)
    yield shares
    shares["end"] = share(path)


def share(path: Path) -> float | None:
    """Which part of the file's pages is cached, 0 to 1; None where the system does not say.

    Linux says it of files that one may write to, and of all others that everything is cached.
    """
    if sys.platform != "linux" or not os.access(path, os.W_OK):
        return None
    size = path.stat().st_size
    with open(path, "rb") as file:
        counts = [_cached_pages(file.fileno(), at, min(WINDOW, size - at)) for at in range(0, size, WINDOW)]
    return sum(counts) / max(1, -(-size // mmap.PAGESIZE))


def _cached_pages(descriptor: int, offset: int, nbytes: int) -> int:
    found = (ctypes.c_ubyte * -(-nbytes // mmap.PAGESIZE))()
    libc = ctypes.CDLL(None, use_errno=True)
    # Copy-on-write, as ctypes gives no address of memory that cannot be written to. Nothing touches a page of it.
    with mmap.mmap(descriptor, nbytes, access=mmap.ACCESS_COPY, offset=offset) as mapping:
        first = ctypes.c_ubyte.from_buffer(mapping)
        code = libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(nbytes), found)
        del first  # A mapping that somebody points into cannot be closed.
    if code:
        raise OSError(ctypes.get_errno(), "mincore failed")
    return bytes(found).count(1)


def warm(path: Path) -> None:
    """Have the whole file in the page cache."""
    if share(path) != 1.0:
        read_through(path, 16, 16 * MB)


def cool(path: Path) -> bool:
    """Have nothing of the file in the page cache; whether that is so now.

    First this file alone is dropped, then, by root, everything.
    """
    with open(path, "rb") as file, contextlib.suppress(OSError):
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if not _is_cold(path):
        with contextlib.suppress(OSError):
            DROP_CACHES.write_text("3")
    return _is_cold(path)


def _is_cold(path: Path) -> bool:
    found = share(path)
    return found is not None and found <= COLD_SHARE


def read_through(path: Path, threads: int, chunk: int) -> float:
    """Read a file to its end; gives bytes per second."""
    size = path.stat().st_size

    def read(number: int) -> None:
        buffer = memoryview(bytearray(chunk))
        with open(path, "rb", buffering=0) as file:
            for offset in range(number * chunk, size, threads * chunk):
                file.seek(offset)
                file.readinto(buffer)

    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        list(pool.map(read, range(threads)))
        return size / (time.perf_counter() - started)
