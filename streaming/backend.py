"""One device: its memory, its copy streams, its events, and how host memory is page-locked for it.

[Note: copies take turns]
Copies take turns on the copy streams, and each waits for the one before it. So they are carried out in the order in
which they were queued, whichever stream each is on. The turns are not for bandwidth, one stream has all of it. They
are for others: a GPU's copy engine stays with a stream until that stream has nothing to do, and a host copies small
tensors to the device in every step (the time step, conditioning). Behind a stream with two blocks of FLUX in its queue
such a copy waited 21 ms. At the end of each of our copies the engine must look for another stream, and takes the small
copy then. Around the begin of a step, where a host makes its small copies, ours are cut into fine pieces, so that none
of them waits long; elsewhere nobody waits, and a turn costs 4 to 5 us on the bus.

Two backends: CUDA (ROCm's builds of torch answer to the same names), and a real one on the CPU whose copy streams
are worker threads and whose memory has a byte budget. The CPU backend lets everything above it run, stream, evict
and fail without a GPU.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures
from typing import Any, NamedTuple

import torch

from .config import format_bytes
from .errors import DeviceMemoryError

logger = logging.getLogger(__name__)

# An event is opaque above this file: a torch.cuda.Event or a Future.
Event = Any
# A function that gives the seconds that compute waited, or None while the device has not got there.
Stall = Callable[[], float | None]

# A moment of compute, opaque like an event: a torch.cuda.Event with a time, or seconds.
Moment = Any

# cudaHostRegisterPortable: page-locked for every device's context, not only for the current one (CUDA runtime API).
HOST_REGISTER_PORTABLE = 1


class DeviceMemory(NamedTuple):
    """Bytes of a device at one moment.

    Attributes:
        free: nobody has them.
        cached: torch keeps them for its next allocations. After a step that is what its activations need.
    """

    free: int
    cached: int


# Where to copy, and from where.
Pair = tuple[torch.Tensor, torch.Tensor]


class CopyTime(NamedTuple):
    """A copy that was timed: bytes, and the moments at which it began and ended on its stream."""

    nbytes: int
    begin: Moment
    end: Moment


def _nbytes(pairs: Sequence[Pair]) -> int:
    return sum(target.nbytes for target, _ in pairs)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that a device has no room; libraries under torch say it in their own words."""
    if isinstance(error, (torch.OutOfMemoryError, DeviceMemoryError)):
        return True
    text = str(error) if isinstance(error, RuntimeError) else ""
    return "CUDA error: out of memory" in text or "_STATUS_ALLOC_FAILED" in text


class Backend(ABC):
    """A device that computes on one stream and copies on others.

    Attributes:
        device: where tensors live.
        name: for people; virtual devices are told apart by it.
        allocated, peak: bytes that this backend has handed out, now and at most.
    """

    # Bytes of a fine piece (Note: copies take turns); None where copies are never cut.
    fine_bytes: int | None = 8 * 1024**2

    def __init__(self, device: torch.device, name: str) -> None:
        self.device = device
        self.name = name
        self.allocated = 0
        self.peak = 0
        self._live: dict[int, int] = {}
        self._streams: list[Any] = []
        self._turn = 0
        self._last_copy: Event | None = None
        self._copy_times: list[CopyTime] | None = None

    @property
    def budget(self) -> int | None:
        """Bytes that may be allocated in all, where the backend itself sets a limit."""
        return None

    def allocate(self, nbytes: int) -> torch.Tensor:
        """A uint8 buffer of ``nbytes``. It is never an inference tensor, whatever mode the caller is in.

        Raises:
            DeviceMemoryError: a virtual device's budget is exceeded.
            torch.OutOfMemoryError: the GPU has no room.
        """
        buffer = self._empty(nbytes)
        self._live[buffer.data_ptr()] = nbytes
        self.allocated += nbytes
        self.peak = max(self.peak, self.allocated)
        return buffer

    def _empty(self, nbytes: int) -> torch.Tensor:
        with torch.inference_mode(False):
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def free(self, buffer: torch.Tensor) -> int:
        """Count ``buffer`` as given back; its memory goes when the last reference does.

        Gives the bytes that count no longer: none for what :meth:`close` has given back already.
        """
        nbytes = self._live.pop(buffer.data_ptr(), 0)
        self.allocated -= nbytes
        return nbytes

    def open(self, copy_streams: int) -> None:
        """Have ``copy_streams`` streams for copies; with 0 they run on the compute stream, or in the caller."""
        while len(self._streams) < copy_streams:
            self._streams.append(self._create_stream())

    def copy(self, pairs: Sequence[Pair], after: Event | None, fine: bool = False) -> Event:
        """Queue copies.

        They start when ``after`` has happened, and the event that is given back says when all are done. Copies are
        carried out in the order in which they are queued; in ``fine`` pieces where the device's user may have small
        copies of its own to make (Note: copies take turns).
        """
        for turn in self._in_pieces(pairs, self.fine_bytes) if fine and self.fine_bytes else [pairs]:
            stream = self._streams[self._turn] if self._streams else None
            self._turn = (self._turn + 1) % max(1, len(self._streams))
            waits = [event for event in (self._last_copy, after) if event is not None]
            self._last_copy = self._copy_now(stream, turn, waits)
            after = None
        assert self._last_copy is not None
        return self._last_copy

    def all_of(self, events: Sequence[Event]) -> Event:
        """An event that happens when the copies behind all of ``events`` are done, and fails when one of them does.

        Args:
            events: of copies, in the order in which they were queued.
        """
        return events[-1]

    @staticmethod
    def _in_pieces(pairs: Sequence[Pair], nbytes: int) -> Iterator[Sequence[Pair]]:
        for target, source in pairs:
            # The last piece takes the remainder along: a short copy uses the bus badly.
            count = max(1, target.nbytes // nbytes)
            sizes = [nbytes] * (count - 1) + [target.nbytes - nbytes * (count - 1)]
            for pair in zip(target.split(sizes), source.split(sizes), strict=True):
                yield [pair]

    def time_copies(self) -> None:
        """Take the time of every copy from now on."""
        self._copy_times = []

    def copy_times(self) -> list[CopyTime]:
        """The times taken since :meth:`time_copies`, and no more."""
        times, self._copy_times = self._copy_times or [], None
        return times

    @abstractmethod
    def memory(self) -> DeviceMemory:
        """What is free now. Waits for nothing."""

    @abstractmethod
    def trim(self) -> None:
        """Have torch give back the memory that it keeps for later."""

    @abstractmethod
    def moment(self) -> Moment:
        """The moment at which all compute queued so far is done."""

    @abstractmethod
    def seconds(self, begin: Moment, end: Moment) -> float | None:
        """From one moment to another; None while the device has not got there."""

    @abstractmethod
    def _create_stream(self) -> Any:
        """A stream for copies."""

    @abstractmethod
    def _copy_now(self, stream: Any, pairs: Sequence[Pair], waits: Sequence[Event]) -> Event:
        """Queue copies on ``stream`` behind all of ``waits``. The event fails when one of them does."""

    @abstractmethod
    def mark(self) -> Event:
        """An event that happens when all compute queued so far is done."""

    @abstractmethod
    def wait(self, event: Event) -> Stall:
        """Make compute that is queued from now on start after ``event``."""

    @abstractmethod
    def finish(self, event: Event) -> None:
        """Wait, on the host, for a copy's event; whether the copy failed is the concern of others."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait, on the host, for everything that was queued on this device."""

    @abstractmethod
    def register(self, buffer: torch.Tensor) -> str | None:
        """Page-lock host memory. Gives None, or the reason why it could not be done."""

    @abstractmethod
    def unregister(self, address: int) -> None:
        """Undo :meth:`register` for the memory that starts at ``address``."""

    def close(self) -> None:
        """Let go of streams and threads, and of what was allocated. No copy uses that memory afterwards."""
        self._streams.clear()
        self._last_copy = None
        self._live.clear()
        self.allocated = 0


class CudaBackend(Backend):
    """A CUDA device. Nothing here blocks the host but :meth:`synchronize`."""

    def __init__(self, device: torch.device) -> None:
        index = device.index if device.index is not None else torch.cuda.current_device()
        super().__init__(torch.device("cuda", index), f"cuda:{index}")

    def _create_stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    def _copy_now(self, stream: torch.cuda.Stream | None, pairs: Sequence[Pair], waits: Sequence[Event]) -> Event:
        stream = stream or torch.cuda.current_stream(self.device)
        with torch.cuda.stream(stream):
            for event in waits:
                # Race: the kernels that used the target before may still be reading it, and an earlier
                # copy into the same slot may not be done.
                stream.wait_event(event)
            times = self._copy_times
            begin = self._timestamp(stream) if times is not None else None
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            # Blocking: a thread that waits for it (finish) sleeps, and takes no core from the others.
            done = torch.cuda.Event(enable_timing=times is not None, blocking=True)
            done.record(stream)
            if times is not None:
                times.append(CopyTime(_nbytes(pairs), begin, done))
            return done

    def _timestamp(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    def memory(self) -> DeviceMemory:
        stats = torch.cuda.memory_stats(self.device)
        cached = stats.get("reserved_bytes.all.current", 0) - stats.get("active_bytes.all.current", 0)
        return DeviceMemory(torch.cuda.mem_get_info(self.device)[0], max(0, cached))

    def trim(self) -> None:
        with torch.cuda.device(self.device):
            torch.cuda.empty_cache()

    def moment(self) -> Moment:
        return self._timestamp(torch.cuda.current_stream(self.device))

    def seconds(self, begin: Moment, end: Moment) -> float | None:
        return begin.elapsed_time(end) / 1000 if end.query() else None

    def mark(self) -> Event:
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, event: Event) -> Stall:
        stream = torch.cuda.current_stream(self.device)
        if event.query():
            return _no_stall
        before = self._timestamp(stream)
        # Race: the block's kernels must not read the slot before the copy into it is done.
        stream.wait_event(event)
        after = self._timestamp(stream)
        return lambda: self.seconds(before, after)

    def finish(self, event: Event) -> None:
        event.synchronize()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def register(self, buffer: torch.Tensor) -> str | None:
        if buffer.is_pinned():
            return "the memory is page-locked by somebody else already"
        # Threads that fill memory start on the first GPU, where this would make a context that nobody needs.
        with torch.cuda.device(self.device):
            code = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, HOST_REGISTER_PORTABLE))
        if code == 0:
            return None
        self._drain_error()
        return f"page-locking {format_bytes(buffer.nbytes)} failed (CUDA error {code})"

    def unregister(self, address: int) -> None:
        with torch.cuda.device(self.device):
            code = int(torch.cuda.cudart().cudaHostUnregister(address))
        if code != 0:
            self._drain_error()

    def close(self) -> None:
        self.synchronize()
        super().close()

    def _drain_error(self) -> None:
        # A failed (un)register stays behind as the thread's last error and would be raised by the next kernel
        # launch, wherever that is. Launch one here and let it take the error.
        try:
            torch.ones(1, device=self.device).add_(1)
            torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            logger.debug("drained a CUDA error that was reported already: %s", error)


def _no_stall() -> float:
    return 0.0


def _nothing() -> None:
    """A task that only takes its turn."""


class VirtualMemory:
    """The memory of a virtual device, shared by the backends of all models on it.

    Attributes:
        name: of the device.
        budget: bytes in all.
        allocated: bytes handed out now.
    """

    def __init__(self, budget: int, name: str = "virtual:0") -> None:
        self.name = name
        self.budget = budget
        self.allocated = 0

    def take(self, nbytes: int) -> None:
        if self.allocated + nbytes > self.budget:
            raise DeviceMemoryError(
                f"{self.name} has {format_bytes(self.budget - self.allocated)} of {format_bytes(self.budget)} free, "
                f"{format_bytes(nbytes)} were asked for"
            )
        self.allocated += nbytes

    def give(self, nbytes: int) -> None:
        self.allocated -= nbytes


class _AllOf:
    """Several futures, asked as one."""

    def __init__(self, futures: Sequence[Future[None]]) -> None:
        self._futures = tuple(futures)

    def done(self) -> bool:
        return all(future.done() for future in self._futures)

    def result(self) -> None:
        for future in self._futures:
            future.result()


class CpuBackend(Backend):
    """A virtual device in ordinary RAM: a byte budget, and one worker thread for each copy stream.

    Compute is what the calling thread does, so an event of compute has always happened already, and waiting for a
    copy blocks the caller. Copies are never cut into pieces: nobody else uses these threads, and a copy's event
    must fail when any part of it does.
    """

    fine_bytes = None

    def __init__(self, memory: VirtualMemory) -> None:
        super().__init__(torch.device("cpu"), memory.name)
        self.store = memory

    @property
    def budget(self) -> int:
        return self.store.budget

    def allocate(self, nbytes: int) -> torch.Tensor:
        self.store.take(nbytes)
        return super().allocate(nbytes)

    def free(self, buffer: torch.Tensor) -> int:
        nbytes = super().free(buffer)
        self.store.give(nbytes)
        return nbytes

    def _create_stream(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"weightstream-{self.name}")

    def _copy_now(self, stream: ThreadPoolExecutor | None, pairs: Sequence[Pair], waits: Sequence[Event]) -> Event:
        times = self._copy_times

        def run() -> None:
            # Only for the order: that an earlier copy failed is the concern of who waits for that one.
            wait_for_futures(waits)
            begin = time.perf_counter()
            for target, source in pairs:
                target.copy_(source)
            if times is not None:
                times.append(CopyTime(_nbytes(pairs), begin, time.perf_counter()))

        if stream is not None:
            return stream.submit(run)
        run()
        return self.mark()

    def all_of(self, events: Sequence[Event]) -> Event:
        return _AllOf(events)

    def memory(self) -> DeviceMemory:
        return DeviceMemory(self.store.budget - self.store.allocated, 0)

    def trim(self) -> None:
        """Nothing is kept for later."""

    def moment(self) -> Moment:
        return time.perf_counter()

    def seconds(self, begin: Moment, end: Moment) -> float | None:
        return end - begin

    def mark(self) -> Event:
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def wait(self, event: Event) -> Stall:
        start = time.perf_counter()
        stalled = not event.done()
        event.result()
        seconds = time.perf_counter() - start if stalled else 0.0
        return lambda: seconds

    def finish(self, event: Event) -> None:
        wait_for_futures([event])

    def synchronize(self) -> None:
        # A worker lets go of what a copy used when it takes up the next task, not when the copy is done.
        wait_for_futures([stream.submit(_nothing) for stream in self._streams])

    def register(self, buffer: torch.Tensor) -> str | None:
        return None  # Every page is as good as locked for a memcpy.

    def unregister(self, address: int) -> None:
        """Nothing was locked."""

    def close(self) -> None:
        for stream in self._streams:
            # Without waiting: the garbage collector may bring us here on one of these threads. What a copy under way
            # uses stays alive until it is done.
            stream.shutdown(wait=False)
        # A model that is dropped without unloading gives its share back here.
        self.store.give(self.allocated)
        super().close()
