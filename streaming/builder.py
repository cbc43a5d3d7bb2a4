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
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures

from .arena import Arena
from .masters import UnitCopies
from .reader import Tick, wait_for

logger = logging.getLogger(__name__)


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
            self._futures += [self._pool.submit(self._lock, copies) for copies in filled]

    def start(self, copies: Sequence[UnitCopies]) -> None:
        """Build the master copies of these units, in this order, as far as memory may be page-locked."""
        if not copies:
            return
        self._stopping.clear()
        self._full.clear()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="weightstream-build")
        self._futures = [self._pool.submit(self._build, item) for item in copies]

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
        self._lock(copies)

    def _lock(self, copies: UnitCopies) -> None:
        if self._full.is_set():
            copies.give_up_begun(self._arena)
        elif not self._stopping.is_set():
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
