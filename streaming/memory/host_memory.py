"""Host memory that may be page-locked, and how much of it a process may have."""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Protocol

import torch

from ..config import format_bytes
from ..devices.backend import Backend
from ..sharing.share import NO_SHARE, NoShare

# Asking the system how much memory is spare takes a millisecond and holds the budget's lock. An answer is reused for
# this long, less what was taken since.
SPARE_SECONDS = 0.1

# After a registration has failed, the limit is this share of what was page-locked then. Each later attempt raises it by
# so many bytes, because what the system allows changes.
BACK_OFF = 0.95
PROBE_BYTES = 256 * 1024**2


class PinOwner(Protocol):
    """A model that has page-locked memory and can give it up."""

    last_used: float

    def give_up_masters(self, nbytes: int) -> int:
        """Free at least ``nbytes`` of page-locked memory, or all; returns the bytes that were freed."""


class PinBudget:
    """Page-locked bytes that all arenas of a process may have together.

    Args:
        limit: bytes; None sets no limit of our own.
        others: returns how many bytes other code in the process has page-locked.
        spare: returns how many more bytes of host memory may be taken; None where nobody counts them.
        ask_others: asks other code in the process to unlock so many bytes.
        share: where copies come from that other processes have too.

    Attributes:
        used: bytes that are locked, or about to be.
        locked: bytes that are locked.
        shared: those of them that other processes may have locked too: the machine has them once.
        failures: registrations that the system refused.
    """

    def __init__(
        self,
        limit: int | None = None,
        others: Callable[[], int] = lambda: 0,
        spare: Callable[[], int] | None = None,
        ask_others: Callable[[int], None] = lambda nbytes: None,
        share: NoShare = NO_SHARE,
    ) -> None:
        self.limit = limit
        self.share = share
        self.used = 0
        self.locked = 0
        self.shared = 0
        self.failures = 0
        self._others = others
        self._spare = spare
        self._ask_others = ask_others
        self._left = 0
        self._asked = -math.inf
        self._ceiling: int | None = None
        self._refused = ""
        self._owners: weakref.WeakSet[PinOwner] = weakref.WeakSet()
        # Of shared copies: how many buffers of this process claim and lock each.
        self._claims: Counter[bytes] = Counter()
        self._locks: Counter[bytes] = Counter()
        # Reentrant: the garbage collector may free a buffer, and so call ``give``, on the thread that holds the lock.
        self._counting = threading.RLock()

    def take(self, nbytes: int, are_there: bool = False, key: bytes | None = None) -> str | None:
        """Count ``nbytes`` more as used; returns None, or the reason why that is not allowed.

        Args:
            are_there: they are in memory already, as another process has them.
            key: of the copy, if it is a shared one. What several models of this process share is counted once.
        """
        with self._counting:
            if key is not None and self._claims[key]:
                self._claims[key] += 1
                return None
            reason = self._refusal(nbytes, are_there)
            if reason is None:
                self._claims.update(_known(key))
                self.used += nbytes
                self._left -= 0 if are_there else nbytes
            return reason

    def _refusal(self, nbytes: int, are_there: bool) -> str | None:
        if self.limit is not None and self.used + self._others() + nbytes > self.limit:
            return f"the limit of {format_bytes(self.limit)} page-locked memory is reached"
        if self._ceiling is not None and self.used + nbytes > self._ceiling:
            return self._refused
        if not (are_there or self.has_room(nbytes)):
            return "host memory is nearly full"
        return None

    def has_room(self, nbytes: int) -> bool:
        """Whether host memory has room for ``nbytes`` more, page-locked or not."""
        if self._spare is None:
            return True
        with self._counting:
            now = time.monotonic()
            if nbytes > self._left or now - self._asked > SPARE_SECONDS:
                self._left, self._asked = self._spare(), now
            return nbytes <= self._left

    def give(self, nbytes: int, key: bytes | None = None) -> None:
        with self._counting:
            if _still_held(self._claims, key):
                return
            self.used -= nbytes
            if self.used == 0:
                self._ceiling = None  # The system may allow more by now: try again.

    def register(self, backend: Backend, buffer: HostBuffer) -> str | None:
        """Page-lock memory that was counted by :meth:`take`; returns None, or the reason why that failed."""
        memory = buffer.memory
        reason = backend.register_read_only(memory) if buffer.read_only else backend.register(memory)
        with self._counting:
            if reason is None:
                if buffer.key is None or not self._locks[buffer.key]:
                    self.locked += memory.nbytes
                    self.shared += buffer.shared_bytes
                self._locks.update(_known(buffer.key))
            else:
                self.failures += 1
                self._ceiling = int(self.locked * BACK_OFF)
                self._refused = reason
        return reason

    def probe(self) -> None:
        """A new attempt begins: the system may allow more by now than it refused before."""
        with self._counting:
            if self._ceiling is not None:
                self._ceiling += PROBE_BYTES

    def unlocked(self, nbytes: int, shared: int = 0, key: bytes | None = None) -> None:
        with self._counting:
            if _still_held(self._locks, key):
                return
            self.locked -= nbytes
            self.shared -= shared

    def join(self, owner: PinOwner) -> None:
        """Let :meth:`make_room` ask ``owner``, on the caller's thread, to give memory up for others."""
        self._owners.add(owner)

    def make_room(self, nbytes: int, keep: PinOwner, there: int = 0) -> None:
        """Have others than ``keep`` give up memory until ``nbytes`` more fit, the least recently used model first.

        So many of them are ``there`` already, as other processes have them.
        """
        short = self._shortage(nbytes, there)
        if short > 0:
            self._ask_others(short)
        for owner in sorted(self._owners, key=lambda owner: owner.last_used):
            if (short := self._shortage(nbytes, there)) <= 0:
                return
            if owner is not keep:
                owner.give_up_masters(short)

    def _shortage(self, nbytes: int, there: int) -> int:
        limits = [limit for limit in (self.limit, self._ceiling) if limit is not None]
        by_limit = self.used + self._others() + nbytes - min(limits) if limits else 0
        by_memory = nbytes - there - self._spare() if self._spare is not None else 0
        return max(by_limit, by_memory)


def _known(key: bytes | None) -> tuple[bytes, ...]:
    return () if key is None else (key,)


def _still_held(holds: Counter[bytes], key: bytes | None) -> bool:
    """One hold of a shared copy ends; whether others are left. Without a key there was one."""
    if key is None:
        return False
    holds[key] -= 1
    if holds[key] > 0:
        return True
    del holds[key]
    return False


def _map(nbytes: int) -> mmap.mmap:
    """Map untouched memory, in huge pages where the system has them: these are touched and page-locked faster.

    A child process does not inherit it. Otherwise a write after the fork would move a private page to other memory than
    the device uses.
    """
    if not hasattr(mmap, "MADV_DONTFORK"):
        return mmap.mmap(-1, nbytes)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_DONTFORK)
    with contextlib.suppress(OSError):  # The kernel has no huge pages.
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


class HostBuffer:
    """Anonymous host memory, page-locked by :meth:`Arena.lock` once it has been filled.

    Attributes:
        memory: uint8 tensor over the whole buffer. Views of it keep the memory mapped; only this object keeps it
            page-locked.
        pinned: whether it is page-locked.
        read_only: whether nobody may write to it once it is whole (shared_buffer.py).
        is_shared: whether others may have it too.
        key: what a shared one is known by; None for one that nobody else can have.
        signatures: of the patches that it was filled with, by the names of values.
    """

    read_only = False
    key: bytes | None = None

    def __init__(self, nbytes: int, memory: torch.Tensor | None = None) -> None:
        with torch.inference_mode(False):
            own = torch.frombuffer(_map(max(1, nbytes)), dtype=torch.uint8)[:nbytes] if memory is None else memory
        self.memory = own
        self.nbytes = nbytes
        self.pinned = False
        self.is_shared = False
        self.signatures: dict[str, object] = {}
        self._claim: weakref.finalize | None = None
        self._lock: weakref.finalize | None = None

    @property
    def claimed(self) -> bool:
        """Whether it counts towards a budget."""
        return self._claim is not None

    @property
    def is_there(self) -> bool:
        """Whether all of it was in memory before this process has taken it."""
        return False

    @property
    def shared_bytes(self) -> int:
        """Bytes of it that other processes may have too."""
        return self.nbytes if self.is_shared else 0

    def fill(self, start: int, stop: int, read: Callable[[torch.Tensor], None]) -> None:
        """Have ``read`` write the bytes from ``start`` to ``stop``."""
        read(self.memory[start:stop])

    def finish(self, unchanged: bool = True) -> None:
        """All of it is filled, from a source that is ``unchanged`` or not."""

    def claim(self, budget: PinBudget) -> str | None:
        """Count it towards ``budget`` until it is closed or freed; returns None, or the reason for a refusal."""
        if self._claim is not None:
            return None
        reason = budget.take(self.nbytes, self.is_there, self.key)
        if reason is None:
            self._claim = weakref.finalize(self, budget.give, self.nbytes, self.key)
            self._claim.atexit = False
        return reason

    def lock(self, backend: Backend, budget: PinBudget) -> str | None:
        """Page-lock it; returns None, or the reason for a refusal."""
        if (reason := self.claim(budget)) is not None:
            return reason
        try:
            reason = budget.register(backend, self)
        except BaseException:
            self._end_claim()
            raise
        if reason is not None:
            self._end_claim()
            return reason
        self.pinned = True
        # Memory that is freed while registered makes a later registration of other memory fail. So a finalizer of
        # this object unlocks the memory, and keeps it alive until then. It does not run at exit: the process's pages
        # go anyway, and the driver may be gone.
        self._lock = weakref.finalize(self, _unlock, backend, self.memory, budget, self.shared_bytes, self.key)
        self._lock.atexit = False
        return None

    def close(self) -> None:
        """Unlock it. The memory is freed with the last view of it. No copy from it may be under way."""
        if self._lock is not None:
            self._lock()
            self._lock = None
        self.pinned = False
        self._end_claim()

    def _end_claim(self) -> None:
        if self._claim is not None:
            self._claim()
            self._claim = None


def _unlock(backend: Backend, memory: torch.Tensor, budget: PinBudget, shared: int, key: bytes | None) -> None:
    backend.unregister(memory.data_ptr())
    budget.unlocked(memory.nbytes, shared, key)
