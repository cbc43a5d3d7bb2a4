"""What a reader is asked to bring, and the pieces in which that is copied."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from ..devices.copies import Event, Pair
from ..model.layout import Layout

# How often a waiting thread checks whether it shall go on.
TICK_SECONDS = 0.05

Tick = Callable[[], None]

T = TypeVar("T")


def wait_for(future: Future[T], tick: Tick) -> T:
    """Return a future's result; ``tick`` is called meanwhile, and may raise."""
    try:
        while True:
            try:
                return future.result(TICK_SECONDS)
            except FutureTimeoutError:
                if future.done():
                    return future.result()  # It has just ended, or its own error is of that class.
            tick()
    finally:
        del future  # Its error refers to this frame: they would keep each other, and what the callers hold, alive.


def copies_from(source: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """Return a function that writes what is in ``source`` to memory of its size, on the calling thread alone."""
    return lambda target: np.copyto(target.numpy(), source.numpy())  # torch would start a team of threads.


class TransferAbandonedError(Exception):
    """A transfer was given up before it was done; no thread should be waiting for it."""


class Load(NamedTuple):
    """Ask for a unit's weights as they were loaded.

    Attributes:
        layout: the unit's.
        target: memory on the device, of the layout's size.
    """

    layout: Layout
    target: torch.Tensor


class Move(NamedTuple):
    """Ask for a copy of host memory.

    Attributes:
        source: host memory; staged through the ring if it is not page-locked.
        target: memory on the device, of the same size.
        pinned: whether ``source`` is page-locked.
    """

    source: torch.Tensor
    target: torch.Tensor
    pinned: bool


class Chunk:
    """A part of the ring, and the event that guards it.

    Attributes:
        memory: uint8 host memory.
        sent: the event behind the last copy out of it.
        free: set when what was read into it is queued, or given up.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.sent: Event | None = None
        self.free = threading.Event()
        self.free.set()


class Transfer:
    """Bytes on their way to the device.

    Attributes:
        queued: the event behind its last copy, once all of its copies are queued; or what went wrong.
        events: of its copies so far.
        background: transfers that are not in the background go before it.
        abandoned: it is not wanted any more.
        error: what went wrong first.
    """

    def __init__(self, after: Sequence[Event], fine: bool, background: bool = False) -> None:
        self.queued: Future[Event] = Future()
        self.events: list[Event] = []
        self.after = after
        self.fine = fine
        self.background = background
        self.abandoned = False
        self.error: BaseException | None = None

    @property
    def stopped(self) -> bool:
        return self.abandoned or self.error is not None

    def fail(self, error: BaseException) -> None:
        """End it with ``error``, unless it has failed before. The error's frames are cleared: they hold memory."""
        traceback.clear_frames(error.__traceback__)
        self.error = self.error or error

    def forget_error(self) -> None:
        """Drop an error that was raised: its traceback has the callers' frames, and would keep their memory alive."""
        if self.queued.done() and self.queued.exception() is not None:
            self.error, self.queued = None, Future()
            self.queued.set_exception(TransferAbandonedError("a transfer has failed"))


class Piece:
    """What one chunk carries, or a copy that needs no chunk.

    Attributes:
        target: memory on the device.
        fill: writes what belongs there to a chunk; None for a copy straight from ``source``.
        ready: the chunk holds it, or needs to hold nothing.
        last: of its transfer.
    """

    __slots__ = ("chunk", "fill", "last", "ready", "source", "target", "transfer")

    def __init__(
        self,
        transfer: Transfer,
        target: torch.Tensor,
        source: torch.Tensor | None,
        fill: Callable[[torch.Tensor], None] | None,
    ) -> None:
        self.transfer = transfer
        self.target = target
        self.source = source
        self.fill = fill
        self.chunk: Chunk | None = None
        self.ready = False
        self.last = False

    @property
    def pair(self) -> Pair:
        """Target and source of the copy, once it is ready."""
        source = self.source if self.chunk is None else self.chunk.memory[: self.target.nbytes]
        assert source is not None
        return self.target, source
