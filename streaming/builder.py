"""Builds master copies behind the steps, so that nobody waits for page-locked memory.

[Note: handed over, not shared]
A thread of the builder works on host memory that nobody else knows of: it fills it from the file, page-locks it and
leaves it in :attr:`UnitCopies.built`, in one assignment. The thread that runs the model takes it from there between two
copies (``adopt``), and from then on only that thread touches it. Loading and unloading stop the builder first, so
whatever they change nobody is building on.
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
from .reader import Tick, wait_for

logger = logging.getLogger(__name__)

# A driver keeps its lock while it page-locks memory, and kernels cannot be launched then. Without a pause behind each
# registration one thread starves the other: steps of 0.16 s took 11 s; with 1 ms behind pieces of 64 MB nothing shows
# (H200, docs/design.md).
LOCK_PAUSE_SECONDS = 0.001


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
        self._holding = threading.Lock()
        self._locking = threading.Lock()
        self._held = False
        self._filled: list[UnitCopies] = []
        self._futures: list[Future[None]] = []
        self._pool: ThreadPoolExecutor | None = None

    @property
    def active(self) -> bool:
        return bool(self._filled) or any(not future.done() for future in self._futures)

    def hold(self) -> None:
        """Only fill memory, and page-lock none until :meth:`release`.

        In a first step the driver loads kernels, and builders slowed that down: a first step of FLUX took 2.8 s with
        7.3 GB page-locked beside it, where everything was done after 2.8 s, loading included, with next to nothing
        page-locked (H200). Which lock it is was not looked into.
        """
        with self._holding:
            self._held = True

    def release(self) -> None:
        """Page-lock what was filled meanwhile, and what will be."""
        if not self._held:
            return
        with self._holding:
            self._held = False
            filled, self._filled = self._filled, []
        if self._pool is not None:
            self._futures += [self._pool.submit(self._lock_and_pause, copies) for copies in filled]

    def start(self, copies: Sequence[UnitCopies]) -> None:
        """Build the master copies of these units, in this order, as far as memory may be page-locked."""
        if not copies:
            return
        self._stopping.clear()
        self._full.clear()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="weightstream-build")
        self._futures = [self._pool.submit(self._build, item) for item in copies]

    def lock_filled(self, copies: Sequence[UnitCopies], tick: Tick) -> None:
        """Page-lock what was filled of these units, now and without pauses: for when nobody launches kernels.

        The builder is at rest. After a first step nearly everything that streams was filled (:meth:`hold`), and to
        page-lock it costs less before the next step than in it.
        """
        filled = [item for item in copies if item.filled]
        if not filled:
            return
        self._full.clear()
        with ThreadPoolExecutor(self._threads, thread_name_prefix="weightstream-lock") as pool:
            futures = [pool.submit(self._lock, item) for item in filled]
            try:
                for future in futures:
                    wait_for(future, tick)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def wait(self, tick: Tick) -> None:
        """Wait until all that was started is built."""
        self.release()
        for future in self._futures:
            wait_for(future, tick)

    def stop(self) -> None:
        """Stop, soon: nothing is being built when this returns. What was begun is taken up again by the next start."""
        self._stopping.set()
        futures, self._futures = self._futures, []
        for future in futures:
            future.cancel()
        wait_for_futures([future for future in futures if not future.cancelled()])
        self._filled.clear()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def forsake(self) -> None:
        """As :meth:`stop`, for an owner that the garbage collector takes: waits for nothing."""
        self._stopping.set()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _build(self, copies: UnitCopies) -> None:
        if self._stopping.is_set():
            return
        if self._full.is_set():
            copies.give_up_begun(self._arena)
            return
        if not self._try(copies, lambda: copies.fill_master(self._arena, self._stopping.is_set, self.drop_behind)):
            return
        with self._holding:
            if self._held:
                self._filled.append(copies)
                return
        self._lock_and_pause(copies)

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
