"""Builds master copies behind the steps, and frees old ones, so that nobody waits for page-locked memory.

[Note: handed over, not shared]
A thread of the builder works on host memory that nobody else knows of: it fills it from the file, page-locks it and
leaves it in :attr:`UnitCopies.built`, in one assignment. The thread that runs the model takes it from there between two
copies (``adopt``), and from then on only that thread touches it. Loading and unloading stop the builder first, so
whatever they change nobody is building on.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures

from .arena import Arena, HostBuffer
from .masters import UnitCopies
from .reader import Tick, wait_for

logger = logging.getLogger(__name__)

# Between two unlockings, each of which may hold up a step by some milliseconds.
FREE_PAUSE_SECONDS = 0.05


class Builder:
    """Builds on ``threads`` threads. What it cannot build goes on streaming from where it is, and fails there if so.

    Args:
        arena: where host memory comes from.
        threads: that read and page-lock. Few: the system's threads also run the model.

    Attributes:
        drop_behind: have the system forget the parts of files that were read (RAM is short).
    """

    def __init__(self, arena: Arena, threads: int) -> None:
        self.drop_behind = False
        self._arena = arena
        self._threads = threads
        self._stopping = threading.Event()
        self._full = threading.Event()
        self._futures: list[Future[None]] = []
        self._retired: deque[HostBuffer] = deque()
        self._pool: ThreadPoolExecutor | None = None

    @property
    def active(self) -> bool:
        return any(not future.done() for future in self._futures)

    def start(self, copies: Sequence[UnitCopies]) -> None:
        """Build the master copies of these units, in this order, as far as memory may be page-locked; then free."""
        if not copies and not self._retired:
            return
        self._stopping.clear()
        self._full.clear()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="weightstream-build")
        self._futures = [self._pool.submit(self._build, item) for item in copies]
        if self._retired:
            self._futures.append(self._pool.submit(self._free))

    def retire(self, memory: HostBuffer | None) -> None:
        """Memory that nobody uses any more, to be freed when there is time. The builder is at rest."""
        if memory is not None:
            self._retired.append(memory)

    def free_retired(self) -> int:
        """Free it now; gives its bytes. The builder is at rest."""
        freed = sum(memory.nbytes for memory in self._retired)
        while self._retired:
            self._arena.release(self._retired.popleft())
        return freed

    def wait(self, tick: Tick) -> None:
        """Wait until all that was started is built."""
        for future in self._futures:
            wait_for(future, tick)

    def stop(self) -> None:
        """Stop, soon: nothing is being built when this returns. What was begun is taken up again by the next start."""
        self._stopping.set()
        futures, self._futures = self._futures, []
        for future in futures:
            future.cancel()
        wait_for_futures([future for future in futures if not future.cancelled()])
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def forsake(self) -> None:
        """As :meth:`stop`, for an owner that the garbage collector takes: waits for nothing."""
        self._stopping.set()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _build(self, copies: UnitCopies) -> None:
        if self._stopping.is_set() or self._full.is_set():
            return
        try:
            more = copies.build_master(self._arena, self._stopping.is_set, self.drop_behind)
        except Exception as error:
            # As text: who keeps log records would keep, with the error's frames, the copies and their memory.
            logger.warning("no master copy of %s, which streams from where it is: %s", copies.unit.name, str(error))
            more = False
        if not more:
            self._full.set()  # No more memory may be page-locked, or the file is broken: others need not try.

    def _free(self) -> None:
        while self._retired and not self._stopping.is_set():
            self._arena.release(self._retired.popleft())
            # A driver waits for the device before it unlocks memory, and nobody can launch a kernel meanwhile.
            self._stopping.wait(FREE_PAUSE_SECONDS)
