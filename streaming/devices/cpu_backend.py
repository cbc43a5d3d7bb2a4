"""A device in RAM, whose copy streams are worker threads and whose memory has a byte budget.

It is a real one: everything above it runs, streams, evicts and fails on it without a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures
from functools import partial
from typing import NamedTuple

import torch

from ..config import format_bytes
from ..errors import DeviceMemoryError
from ..planning.vram_budget import DeviceMemory
from .allocation_record import NO_RECORD, AllocationRecord
from .backend import Backend
from .copies import CopyTime, Event, Pair, Stall, count_bytes


class VirtualMemory:
    """The memory of a virtual device, shared by the backends of all models on it.

    Attributes:
        name: of the device.
        budget: bytes in all.
        allocated, peak: bytes handed out now, and at most since the peak was last reset.
    """

    def __init__(self, budget: int, name: str = "gpu:0") -> None:
        self.name = name
        self.budget = budget
        self.allocated = 0
        self.peak = 0

    def take(self, nbytes: int) -> None:
        if self.allocated + nbytes > self.budget:
            raise DeviceMemoryError(
                f"{self.name} has {format_bytes(self.budget - self.allocated)} of {format_bytes(self.budget)} free, "
                f"{format_bytes(nbytes)} were asked for"
            )
        self.allocated += nbytes
        self.peak = max(self.peak, self.allocated)

    def give(self, nbytes: int) -> None:
        self.allocated -= nbytes


class _Moment(NamedTuple):
    """A moment of compute. It belongs to a device, as a CUDA event does."""

    device: str
    seconds: float


class _AllOf:
    """Several futures as one."""

    def __init__(self, futures: Sequence[Future[None]]) -> None:
        self._futures = tuple(futures)

    def done(self) -> bool:
        return all(future.done() for future in self._futures)

    def result(self) -> None:
        wait_for_futures([future for future in self._futures if isinstance(future, Future)])
        for future in self._futures:
            future.result()


class CpuBackend(Backend):
    """A virtual device in ordinary RAM: a byte budget, and one worker thread for each copy stream.

    Compute is what the calling thread does, so an event of compute has always happened already, and waiting for a
    copy blocks the caller. Copies are never cut into pieces: nothing else uses these threads, and a copy's event
    must fail when any part of it does.

    Args:
        memory: of the device.
        device: the name that torch and callers use: several virtual devices are CPUs with different indices.
        record: see :class:`Backend`.
    """

    fine_bytes = None

    def __init__(
        self,
        memory: VirtualMemory,
        device: torch.device = torch.device("cpu"),  # noqa: B008
        record: AllocationRecord = NO_RECORD,
    ) -> None:
        super().__init__(device, memory.name, record)
        self.store = memory

    @property
    def budget(self) -> int:
        return self.store.budget

    def _names(self, error: BaseException) -> bool | None:
        if isinstance(error, DeviceMemoryError):
            return str(error).startswith(f"{self.name} has ")
        return super()._names(error)

    def allocate(self, nbytes: int, lasting: bool = False) -> torch.Tensor:
        self.store.take(nbytes)
        try:
            return super().allocate(nbytes, lasting)
        except BaseException:
            self.store.give(nbytes)
            raise

    def free(self, buffer: torch.Tensor) -> int:
        nbytes = super().free(buffer)
        self.store.give(nbytes)
        return nbytes

    def _create_stream(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"weightstream-{self.name}")

    def _copy_now(self, stream: ThreadPoolExecutor | None, pairs: Sequence[Pair], waits: Sequence[Event]) -> Event:
        times = self._times

        def run() -> None:
            # Only for the order: if an earlier copy has failed, that is raised where that copy is waited for.
            wait_for_futures(waits)
            begin = self.moment()
            for target, source in pairs:
                target.copy_(source)
            if times is not None:
                times.append(CopyTime(count_bytes(pairs), begin, self.moment()))

        if stream is not None:
            return stream.submit(run)
        run()
        return self.mark()

    def _all_over(self, stream: ThreadPoolExecutor, events: Sequence[Event]) -> Event:
        return stream.submit(_AllOf(events).result)

    def all_of(self, events: Sequence[Event]) -> Event:
        return _AllOf(events)

    def memory(self) -> DeviceMemory:
        return DeviceMemory(self.store.budget - self.store.allocated, 0)

    def give_back(self) -> None:
        """Memory is freed with the last reference to it."""

    def trim(self) -> int:
        """Nothing is kept for later."""
        return 0

    def keep(self, nbytes: int) -> None:
        """Nothing is kept for later."""

    def watch_peak(self) -> None:
        self.store.peak = self.store.allocated

    def peak_bytes(self) -> int:
        return self.store.peak - self.store.allocated

    def hold_back(self, seconds: float) -> None:
        """Nothing is queued: a virtual device computes at once."""

    def moment(self) -> _Moment:
        return _Moment(self.name, time.perf_counter())

    def seconds(self, begin: _Moment, end: _Moment) -> float:
        if not begin.device == end.device == self.name:
            raise ValueError(f"{self.name} has no time between moments of {begin.device} and {end.device}")
        return end.seconds - begin.seconds

    def mark(self) -> Event:
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def wait(self, event: Event) -> Stall:
        start = self.moment()
        stalled = not event.done()
        event.result()
        return partial(self.seconds, start, self.moment() if stalled else start)

    def finish(self, event: Event) -> None:
        wait_for_futures([event])

    def synchronize(self) -> None:
        # A worker drops its references to what a copy used when it takes up the next task, not when the copy is done.
        wait_for_futures([stream.submit(_nothing) for stream in self._streams])

    def register(self, buffer: torch.Tensor) -> str | None:
        return None  # Every page is as good as locked for a memcpy.

    def unregister(self, address: int) -> None:
        """Nothing was locked."""

    def close(self) -> None:
        # The streams are not shut down: the garbage collector may call this on a thread that holds their lock. They end
        # when nothing refers to them any more. What a copy under way uses stays alive until it is done.
        # The bytes of a model that is dropped without unloading are given back here.
        self.store.give(self.allocated)
        super().close()


def _nothing() -> None:
    """A task that only takes its turn."""
