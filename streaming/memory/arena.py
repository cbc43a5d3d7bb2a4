"""Host memory that holds the master copies of what is streamed: page-locked where that is allowed and works."""

from __future__ import annotations

import threading

from ..config import format_bytes
from ..devices.backend import Backend
from ..sharing.share import NoShare
from .host_memory import HostBuffer, PinBudget


class Arena:
    """Hands out host buffers and counts them.

    Args:
        backend: the device to page-lock for.
        pin_memory: whether to page-lock at all.
        budget: page-locked memory that is shared with other arenas.
        limit: bytes that this arena may page-lock; None sets none.
        share: where copies come from that others have too; None takes the budget's.

    Attributes:
        pinned_bytes, pageable_bytes: bytes in live buffers, by kind.
        shared_bytes: those of the former that others may have too.
        reason: why something is not page-locked, in words; None when everything is.
    """

    def __init__(
        self,
        backend: Backend,
        pin_memory: bool = True,
        budget: PinBudget | None = None,
        limit: int | None = None,
        share: NoShare | None = None,
    ) -> None:
        self.budget = budget or PinBudget()
        self.backend = backend
        self._share = share
        self.pin_memory = pin_memory
        self._limit = limit
        self._counting = threading.Lock()
        self._claimed_bytes = 0
        self.pinned_bytes = 0
        self.pageable_bytes = 0
        self.shared_bytes = 0
        self.reason: str | None = None
        self.begin()

    @property
    def share(self) -> NoShare:
        """Where copies come from that others have too."""
        return self.budget.share if self._share is None else self._share

    def begin(self) -> None:
        """Allow page-locking again: what prevented it before may be gone."""
        self.budget.probe()
        self.reason = None if self.pin_memory else "page-locking is switched off"

    def allocate(self, nbytes: int) -> HostBuffer:
        """Pageable memory. Fill it, then :meth:`lock` it: registering touched pages is several times faster."""
        buffer = HostBuffer(nbytes)
        with self._counting:
            self.pageable_bytes += nbytes
        return buffer

    def claim(self, nbytes: int) -> HostBuffer | None:
        """Memory that may be page-locked once it is filled; None, and :attr:`reason`, where that is not allowed.

        So memory that is of use only when it is page-locked is not filled in vain.
        """
        if not self.pin_memory:
            return None
        buffer = HostBuffer(nbytes)
        return buffer if self.take_in(buffer) else None

    def take_in(self, buffer: HostBuffer) -> bool:
        """Count ``buffer`` as one that may be page-locked; where that is not allowed :attr:`reason` says why."""
        if (reason := self._claim(buffer)) is not None:
            self.reason = reason
            return False
        with self._counting:
            self.pageable_bytes += buffer.nbytes
        return True

    def lock(self, buffer: HostBuffer) -> bool:
        """Page-lock ``buffer`` if that is allowed and works; else it stays pageable and :attr:`reason` says why."""
        if not self.pin_memory or buffer.nbytes == 0:
            return False
        if (reason := self._claim(buffer)) is None:
            try:
                reason = buffer.lock(self.backend, self.budget)
            finally:
                self._count_claim(buffer)
        with self._counting:
            if reason is None:
                self.pinned_bytes += buffer.nbytes
                self.pageable_bytes -= buffer.nbytes
                self.shared_bytes += buffer.shared_bytes
            else:
                self.reason = reason
        return reason is None

    def _claim(self, buffer: HostBuffer) -> str | None:
        """Count ``buffer`` towards this arena's limit and the budget; returns None, or the reason for a refusal."""
        if buffer.claimed:
            return None
        with self._counting:
            if self._limit is not None and self._claimed_bytes + buffer.nbytes > self._limit:
                return f"this model's limit of {format_bytes(self._limit)} page-locked memory is reached"
            self._claimed_bytes += buffer.nbytes
        reason = buffer.claim(self.budget)
        self._count_claim(buffer)
        return reason

    def _count_claim(self, buffer: HostBuffer) -> None:
        """Stop counting ``buffer`` towards this arena's limit if its claim has ended."""
        if not buffer.claimed:
            with self._counting:
                self._claimed_bytes -= buffer.nbytes

    def release(self, buffer: HostBuffer) -> None:
        """Take ``buffer`` back."""
        with self._counting:
            if buffer.pinned:
                self.pinned_bytes -= buffer.nbytes
                self.shared_bytes -= buffer.shared_bytes
            else:
                self.pageable_bytes -= buffer.nbytes
            if buffer.claimed:
                self._claimed_bytes -= buffer.nbytes
        buffer.close()
