"""Builds master copies: behind other work, or at once while somebody waits.

[Note: handed over, not shared]
A thread of the builder works on host memory that nobody else knows of: it fills it from the file, page-locks it and
leaves it in :attr:`UnitCopies.built`, in one assignment. The thread that runs the model stops the builder, and takes it
from there (``adopt``), before it loads or runs the model: while it does so nobody is building.

[Note: when to build]
Nothing is built in a first step: it reads the whole model, and a builder beside it reads a part of it once more. It
took 2.9 s with four threads that filled memory beside it, and 2.1 s without (FLUX, H200). Before the second step
everything is built at once, on all threads, while nothing else runs. That takes as long as about two steps; steps with
builders beside them were slower by more than that in all, since what is not built yet is read for each of them, and a
driver that page-locks memory keeps kernels from being launched. Before a first step, while the host does other things
with the device, builders work behind it, and pause between registrations.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures

from .arena import Arena
from .masters import UnitCopies
from .transfer import Tick, wait_for

logger = logging.getLogger(__name__)

# A driver keeps its lock while it page-locks memory, and kernels cannot be launched then. Without a pause behind each
# registration one thread starves the other: steps of 0.16 s took 11 s; with 1 ms behind pieces of 64 MB nothing shows
# (H200, docs/design.md).
LOCK_PAUSE_SECONDS = 0.001


class Builder:
    """Builds master copies. What it cannot build goes on streaming from where it is, and fails there if so.

    Args:
        arena: where host memory comes from.
        threads: that read and page-lock behind other work. Few: the system's threads also run models.

    Attributes:
        drop_behind: have the system forget the parts of files that were read (RAM is short).
    """

    def __init__(self, arena: Arena, threads: int) -> None:
        self.drop_behind = False
        self._arena = arena
        self._threads = threads
        self._stopping = threading.Event()
        self._full = threading.Event()
        self._locking = threading.Lock()
        self._futures: list[Future[None]] = []
        self._pool: ThreadPoolExecutor | None = None

    @property
    def active(self) -> bool:
        return any(not future.done() for future in self._futures)

    def start(self, copies: Sequence[UnitCopies]) -> None:
        """Build the master copies of these units, in this order, behind other work. The builder is at rest."""
        if not copies:
            return
        try:
            self._begin(copies, self._threads, self._lock_and_pause)
        except BaseException:
            self.stop()
            raise

    def build(self, copies: Sequence[UnitCopies], threads: int, tick: Tick) -> None:
        """Build the master copies of these units now, on ``threads`` threads. The builder is at rest.

        ``tick`` is called meanwhile, and may raise: what is begun then is taken up again another time.
        """
        if not copies:
            return
        try:
            self._begin(copies, threads, self._lock)
            self.wait(tick)
        finally:
            self.stop()

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

    def _begin(self, copies: Sequence[UnitCopies], threads: int, lock: Callable[[UnitCopies], None]) -> None:
        self._stopping.clear()
        self._full.clear()
        assert self._pool is None
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="weightstream-build")
        for item in copies:
            self._futures.append(self._pool.submit(self._build, item, lock))

    def _build(self, copies: UnitCopies, lock: Callable[[UnitCopies], None]) -> None:
        if self._stopping.is_set():
            return
        if self._full.is_set():
            copies.give_up_begun(self._arena)
        elif self._try(copies, lambda: copies.fill_master(self._arena, self._stopping.is_set, self.drop_behind)):
            lock(copies)

    def _lock_and_pause(self, copies: UnitCopies) -> None:
        with self._locking:
            if not self._stopping.is_set():
                self._lock(copies)
                time.sleep(LOCK_PAUSE_SECONDS)

    def _lock(self, copies: UnitCopies) -> None:
        if self._full.is_set():
            copies.give_up_begun(self._arena)
        else:
            self._try(copies, lambda: copies.lock_master(self._arena))

    def _try(self, copies: UnitCopies, step: Callable[[], bool]) -> bool:
        """Where no more memory may be page-locked, or the file is broken, others need not try."""
        try:
            more = step()
        except Exception as error:
            # As text: who keeps log records would keep, with the error's frames, the copies and their memory.
            logger.warning("no master copy of %s, which streams from where it is: %s", copies.unit.name, str(error))
            more = False
        if not more:
            self._full.set()
        return more
