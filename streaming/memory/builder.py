"""Builds master copies: behind other work, or at once while the caller waits.

[Note: handed over, not shared]
A thread of the builder works on host memory that no other thread refers to: it fills the memory from the file,
page-locks it and leaves it in :attr:`MasterCopy.built`, in one assignment. The thread that runs the model stops the
builder, and takes the copy from there (``adopt``), before it loads or runs the model: nothing is built meanwhile.

[Note: when to build]
Nothing is built during a first step: the step reads the whole model, and a builder beside it would read a part of it
once more. A first step took 2.9 s with four threads that filled memory beside it, and 2.1 s without (FLUX, H200).
Before the second step everything is built at once, on all threads, while nothing else runs. That takes about as long as
two steps. Steps with builders beside them were slower by more than that in total: what is not built yet is read for
each of them, and no kernel can be launched while the driver page-locks memory. Before a first step, while the host does
other things with the device, builders work behind it, and pause between registrations.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence

from ..threads import end_with_process
from .arena import Arena
from .transfer import TICK_SECONDS, Tick
from .unit_copies import UnitCopies

logger = logging.getLogger(__name__)

# The driver holds its lock while it page-locks memory, and no kernel can be launched then. Without a pause after each
# registration the builder starves the thread that launches kernels: steps of 0.16 s took 11 s. With 1 ms after pieces
# of 64 MB steps are not measurably slower (H200, docs/design.md).
LOCK_PAUSE_SECONDS = 0.001


# After so many units could not be copied, the builder skips the others: the disk, or the memory, is at fault.
MOST_FAILURES = 3


class Builder:
    """Builds master copies. A unit that it cannot build goes on streaming from its original, and may fail there.

    Args:
        arena: where host memory comes from.
        threads: how many read and page-lock behind other work. Few: the system's threads also run models.

    Attributes:
        drop_behind: have the system forget the parts of files that were read (RAM is short).
        left: units that other processes were building when it came to them.
        needed_bytes: bytes filled so far of master copies that were needed (see :meth:`build`).
        workers: its threads.
    """

    def __init__(self, arena: Arena, threads: int) -> None:
        self.drop_behind = False
        self.needed_bytes = 0
        self.left = 0
        self.workers: list[threading.Thread] = []
        self._arena = arena
        self._threads = threads
        self._queue: deque[UnitCopies] = deque()
        self._left_for_once: deque[UnitCopies] = deque()
        self._needed = False
        self._failures = 0
        self._error: Exception | None = None
        self._stopping = threading.Event()
        self._full = threading.Event()
        self._locking = threading.Lock()
        end_with_process(self)

    @property
    def active(self) -> bool:
        return any(worker.is_alive() for worker in self.workers)

    def start(self, copies: Sequence[UnitCopies]) -> None:
        """Build the master copies of these units, in this order, behind other work. The builder must be idle."""
        self._begin(copies, self._threads, self._lock_and_pause, needed=False)

    def build(self, copies: Sequence[UnitCopies], threads: int, tick: Tick, needed: bool = False) -> None:
        """Build the master copies of these units now, on ``threads`` threads. The builder must be idle.

        Args:
            copies: the units.
            threads: how many.
            tick: is called meanwhile, and may raise; a later build goes on with what was begun.
            needed: they must be built, in pageable memory where no other is available; an error is raised.
        """
        try:
            self._begin(copies, threads, self._lock, needed)
            self.wait(tick)
        finally:
            self.stop()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self, tick: Tick) -> None:
        """Wait until all that was started is built."""
        for worker in self.workers:
            while worker.is_alive():
                worker.join(TICK_SECONDS)
                tick()

    def stop(self) -> None:
        """Stop soon: nothing is being built when this returns. The next start goes on with what was begun."""
        self._stopping.set()
        for worker in self.workers:
            worker.join()
        self.workers.clear()
        self._queue.clear()
        self._left_for_once.clear()

    def forsake(self) -> None:
        """As :meth:`stop`, for an owner that is garbage collected: waits for nothing."""
        self._stopping.set()

    def _begin(
        self, copies: Sequence[UnitCopies], threads: int, lock: Callable[[UnitCopies], None], needed: bool
    ) -> None:
        assert not self.workers
        self._stopping.clear()
        self._full.clear()
        self._queue.extend(copies)
        self._needed, self._failures, self._error = needed, 0, None
        self.left = 0
        try:
            for _ in range(min(threads, len(copies))):
                worker = threading.Thread(target=self._work, args=[lock], name="weightstream-build", daemon=True)
                worker.start()
                self.workers.append(worker)
        except BaseException:
            self.stop()
            raise

    def _work(self, lock: Callable[[UnitCopies], None]) -> None:
        # A call of its own for each unit, so that a waiting thread keeps no memory of the previous one alive.
        while not self._stopping.is_set() and self._build_next(lock):
            """One more."""

    def _build_next(self, lock: Callable[[UnitCopies], None]) -> bool:
        for queue in (self._queue, self._left_for_once):
            try:
                copies = queue.popleft()
            except IndexError:
                continue
            if self._full.is_set():
                copies.master_copy.give_up_begun(self._arena)
                if not copies.master_copy.is_shared_elsewhere(self._arena):
                    return True
            if self._try(copies, self._fill):
                if copies.master_copy.left_to_others:
                    self._leave(copies, again=queue is self._queue)
                else:
                    lock(copies)
            return True
        return False

    def _leave(self, copies: UnitCopies, again: bool) -> None:
        """Another process builds it: look at it ``again`` when all others are built, and then not before the next
        build (share.py, Note: nobody waits)."""
        if again:
            self._left_for_once.append(copies)
        else:
            with self._locking:
                self.left += 1

    def _fill(self, copies: UnitCopies) -> bool:
        filled = copies.master_copy.fill(self._arena, self._stopping.is_set, self.drop_behind, self._needed)
        if self._needed:
            with self._locking:
                self.needed_bytes += copies.unit.nbytes
        return filled

    def _lock_and_pause(self, copies: UnitCopies) -> None:
        with self._locking:
            if not self._stopping.is_set():
                self._lock(copies)
                time.sleep(LOCK_PAUSE_SECONDS)

    def _lock(self, copies: UnitCopies) -> None:
        if self._full.is_set() and not copies.master_copy.begun_is_there:
            copies.master_copy.give_up_begun(self._arena)
        else:
            self._try(copies, lambda copies: copies.master_copy.lock(self._arena, self._needed))

    def _try(self, copies: UnitCopies, step: Callable[[UnitCopies], bool]) -> bool:
        """Run ``step``. Once no more memory may be page-locked, or several units have failed, others are skipped."""
        try:
            more = step(copies)
        except Exception as error:
            self._failed(copies, error)
            return False
        if not more and not self._needed:
            self._full.set()
        return more

    def _failed(self, copies: UnitCopies, error: Exception) -> None:
        """Note an error. Where the copies are needed the first error counts, and ends the rest."""
        traceback.clear_frames(error.__traceback__)  # The frames hold memory.
        if self._needed:
            self._error = self._error or error
            self._stopping.set()
            return
        # As text: a log record that is kept would keep the error's frames alive, and with them the copies' memory.
        logger.warning("no master copy of %s, which streams from where it is: %s", copies.unit.name, str(error))
        self._arena.reason = f"{copies.unit.name} could not be copied ({error})"
        self._failures += 1
        if self._failures >= MOST_FAILURES:
            self._full.set()
