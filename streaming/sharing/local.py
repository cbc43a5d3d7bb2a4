"""Copies that models of one process share without a broker: a ledger in this process is asked (docs/sharing.md).

[Note: ends that wait for nobody]
Holds end in finalizers, which the garbage collector may run on any thread, at any allocation: also on the thread that
is asking the ledger at this moment and holds its lock. So an end is put into a queue, which needs no lock, and whoever
can have the lock at once settles what is queued. If nobody can, the thread that has it does so when it lets go of it:
it looks into the queue again after that, so an end that came too late for its last look finds the lock free.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from .descriptors import raise_descriptors
from .ledger import Answer, Kind, Ledger, Limits
from .pages import why_not_here
from .share import NoShare

logger = logging.getLogger(__name__)

# Everybody here is the same worker: nobody leaves before the process does.
_WORKER = 0
# Descriptors of this process that stay for others: a copy takes one.
OTHER_DESCRIPTORS = 512

T = TypeVar("T")


class LocalShare(NoShare):
    """Copies that models of this process share. It is asked by any thread."""

    is_local = True

    def __init__(self) -> None:
        super().__init__()
        self.address = "this process"
        self._asking = threading.Lock()
        self._trying = threading.RLock()
        self._ended: deque[tuple[Callable[[Ledger, int, bytes], None], bytes]] = deque()
        self._ledger: Ledger | None = None
        self._over = False
        self._tried = False
        _living.add(self)

    @property
    def is_on(self) -> bool:
        return self._open() is not None and not self._over

    @property
    def nbytes(self) -> int:
        """Bytes of whole copies, each once."""
        return self._ask(lambda ledger: ledger.nbytes, 0)

    @property
    def copies(self) -> int:
        """How many copies there are."""
        return self._ask(lambda ledger: len(ledger.copies), 0)

    def try_out(self, attempt: Callable[[], str | None]) -> None:
        with self._trying:
            if not self._tried and self.is_on:
                self._tried = True
                if (reason := attempt()) is not None:
                    self.give_up(reason)

    def want(self, key: bytes, nbytes: int, within: bool = False) -> Answer:
        if self._over:
            return Answer(Kind.REFUSED, reason=self.reason)
        answer = self._ask(lambda ledger: _with_own_descriptor(ledger, key, nbytes, within), Answer(Kind.REFUSED))
        if answer.kind is Kind.REFUSED:
            self.complain(answer.reason)
        return answer

    def give(self, key: bytes, nbytes: int, descriptor: int) -> bool:
        kept = os.dup(descriptor)
        answer = self._ask(lambda ledger: ledger.give(_WORKER, key, nbytes, kept), None)
        if answer is None:
            os.close(kept)
            return False
        return answer.kind is Kind.DONE

    def drop(self, key: bytes) -> None:
        self._end(Ledger.drop, key)

    def stop_building(self, key: bytes) -> None:
        self._end(Ledger.stop_building, key)

    def is_whole(self, key: bytes) -> bool:
        return self._ask(lambda ledger: key in ledger.copies, False)

    def moves(self) -> int:
        return self._ask(lambda ledger: ledger.moves, 0)

    def give_up(self, reason: str) -> None:
        """Share nothing more. What is shared stays so until its holds end."""
        self._over = True
        self.complain(reason)

    def _open(self) -> Ledger | None:
        with self._trying:
            if self._ledger is None and not self._over:
                if (reason := why_not_here()) is not None:
                    self.give_up(reason)
                else:
                    self._ledger = _make_ledger()
            return self._ledger

    def _ask(self, question: Callable[[Ledger], T], otherwise: T) -> T:
        ledger = self._open()
        if ledger is None:
            return otherwise
        with self._asking:
            self._settle_queue()  # An end that was queued before this question counts.
            answer = question(ledger)
        self._settle()
        return answer

    def _end(self, end: Callable[[Ledger, int, bytes], None], key: bytes) -> None:
        """End a hold (Note: ends that wait for nobody)."""
        self._ended.append((end, key))
        self._settle()

    def _settle(self) -> None:
        """Settle what is queued, unless another thread, or this one further up, has the lock and will do so."""
        while self._ended and self._asking.acquire(blocking=False):
            try:
                self._settle_queue()
            finally:
                self._asking.release()

    def _settle_queue(self) -> None:
        while self._ended:
            end, key = self._ended.popleft()
            if self._ledger is not None:
                end(self._ledger, _WORKER, key)

    def complain(self, reason: str) -> None:
        """Keep why something is not shared, and log it once."""
        if reason and reason != self.reason:
            self.reason = reason
            logger.warning("the GPUs that work in parallel each have page-locked copies of their own: %s", reason)

    def forget(self) -> None:
        """In a process that was forked off: close what its parent holds. Another thread may have had the lock then."""
        self._asking, self._over = threading.Lock(), True
        if self._ledger is not None:
            self._ledger.clear()


def _with_own_descriptor(ledger: Ledger, key: bytes, nbytes: int, within: bool) -> Answer:
    """The ledger's answer, with a descriptor that is the caller's."""
    answer = ledger.want(_WORKER, key, nbytes, within)
    if answer.descriptor is None:
        return answer
    try:
        return answer._replace(descriptor=os.dup(answer.descriptor))
    except OSError as error:  # No descriptor is left.
        ledger.drop(_WORKER, key)
        return Answer(Kind.REFUSED, reason=error.strerror or str(error))


def _make_ledger() -> Ledger:
    ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    copies = raise_descriptors(Limits.copies + OTHER_DESCRIPTORS) - OTHER_DESCRIPTORS
    return Ledger(Limits(ram, max(1, min(Limits.copies, copies))), os.close)


_living: weakref.WeakSet[LocalShare] = weakref.WeakSet()


def _forget_all() -> None:
    for share in list(_living):
        share.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
