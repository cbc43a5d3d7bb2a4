"""A CUDA device. ROCm's builds of torch use the same names."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch

from ..config import format_bytes
from ..planning.vram_budget import DeviceMemory
from .allocation_record import NO_RECORD, AllocationRecord
from .backend import Backend, is_out_of_memory
from .copies import CopyTime, Event, Moment, Pair, Stall, count_bytes
from .cuda_pages import lasting_memory, opened_memory
from .cuda_pool import pool_of

logger = logging.getLogger(__name__)

# cudaHostRegisterPortable: page-locked for every device's context, not only for the current one (CUDA runtime API).
HOST_REGISTER_PORTABLE = 1
# cudaHostRegisterReadOnly: the device only reads it. Without this the driver asks the system for pages to write to, and
# gets none of a mapping that is read-only.
HOST_REGISTER_READ_ONLY = 8
# About the clock of any GPU: they run at 1.2 to 2.8 GHz.
CYCLES_PER_SECOND = 1.7e9


class CudaBackend(Backend):
    """A CUDA device. The host is blocked by :meth:`synchronize`, :meth:`finish` and when dropped memory is freed."""

    def __init__(self, device: torch.device, record: AllocationRecord = NO_RECORD) -> None:
        index = device.index if device.index is not None else torch.cuda.current_device()
        super().__init__(torch.device("cuda", index), f"gpu:{index}", record)
        self._out: torch.cuda.Stream | None = None

    def _lasting(self, nbytes: int) -> torch.Tensor:
        memory = lasting_memory(self.device.index) if nbytes else None
        if memory is None:
            return self._empty(nbytes)
        buffer = memory.allocate(nbytes)
        if buffer is None:
            self.trim()  # torch's cache may have what is missing.
            buffer = memory.allocate(nbytes)
        # If torch allocates, the host may make room for it; if there is none, torch's error says what there was.
        return self._empty(nbytes) if buffer is None else buffer

    def _create_stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    def _copy_now(self, stream: torch.cuda.Stream | None, pairs: Sequence[Pair], waits: Sequence[Event]) -> Event:
        stream = stream or torch.cuda.current_stream(self.device)
        with torch.cuda.stream(stream):
            for event in waits:
                # Race: the kernels that used the target before may still be reading it, and an earlier
                # copy into the same slot may not be done.
                stream.wait_event(event)
            times = self._times
            begin = self._timestamp(stream) if times is not None else None
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            # Blocking: a thread that waits for it (finish) sleeps, and takes no core from the others.
            done = torch.cuda.Event(enable_timing=times is not None, blocking=True)
            done.record(stream)
            if times is not None:
                times.append(CopyTime(count_bytes(pairs), begin, done))
            return done

    def _timestamp(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    def bring(self, pairs: Sequence[Pair], after: Sequence[Event] = (), fine: bool = False) -> Event:
        times = self._copy_times
        if times is None or self.links == 1:
            return super().bring(pairs, after, fine)
        before = len(times)
        done = super().bring(pairs, after, fine)
        if parts := times[before:]:
            times[before:] = [CopyTime(count_bytes(pairs), parts[0].begin, parts[-1].end)]
        return done

    def passing_on(self) -> AbstractContextManager[object]:
        # torch copies from one GPU to another on the current stream of the first.
        if self._out is None:
            self._out = self._create_stream()
        return torch.cuda.stream(self._out)

    def current(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.device)

    def memory(self) -> DeviceMemory:
        self.give_back()
        held = self.record.held_bytes(self.device)
        return DeviceMemory(torch.cuda.mem_get_info(self.device)[0], self._kept_bytes() + held)

    def _kept_bytes(self) -> int:
        stats = torch.cuda.memory_stats(self.device)
        return max(0, stats.get("reserved_bytes.all.current", 0) - stats.get("active_bytes.all.current", 0))

    def give_back(self) -> None:
        memory = opened_memory(self.device.index)
        if memory is not None:
            memory.give_back()

    def trim(self) -> int:
        self.give_back()
        pool = pool_of(self.device.index)
        with torch.cuda.device(self.device):
            if pool is None:
                torch.cuda.empty_cache()
            else:
                torch.cuda.synchronize(self.device)
                pool.trim()
        return self._kept_bytes()

    def watch_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int | None:
        if self.record.held_bytes(self.device):
            return None  # Activations in a record have memory that is not torch's.
        stats = torch.cuda.memory_stats(self.device)
        peak, now = (stats.get(f"allocated_bytes.all.{which}", 0) for which in ("peak", "current"))
        return peak - now if peak else None

    def keep(self, nbytes: int) -> None:
        try:
            with self.record.paused():
                self._empty(nbytes)  # Dropped at once: torch keeps the memory.
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            logger.debug("%s has no %s in one piece: %s", self.name, format_bytes(nbytes), error)

    def hold_back(self, seconds: float) -> None:
        with torch.cuda.device(self.device):
            torch.cuda._sleep(int(seconds * CYCLES_PER_SECOND))

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
        return partial(self.seconds, before, after)

    def finish(self, event: Event) -> None:
        if not event.query():  # A query is quick; a thread that waits releases the interpreter.
            event.synchronize()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def register(self, buffer: torch.Tensor) -> str | None:
        return self._register(buffer, HOST_REGISTER_PORTABLE)

    def register_read_only(self, buffer: torch.Tensor) -> str | None:
        return self._register(buffer, HOST_REGISTER_PORTABLE | HOST_REGISTER_READ_ONLY)

    def _register(self, buffer: torch.Tensor, flags: int) -> str | None:
        if buffer.is_pinned():
            return "the memory is page-locked by somebody else already"
        # Threads that fill memory start on the first GPU, where this would make a context that nobody needs.
        with torch.cuda.device(self.device):
            code = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, flags))
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
        memory = opened_memory(self.device.index)
        if memory is not None:
            memory.orphan(self._live)  # First: buffers that are dropped later are freed by the thread that drops them.
            memory.give_back()
        super().close()

    def _drain_error(self) -> None:
        # A failed (un)register stays behind as the thread's last error and would be raised by the next kernel
        # launch, wherever that is. Launch one here and let it take the error.
        try:
            with self.record.paused():
                torch.ones(1, device=self.device).add_(1)
            torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            logger.debug("drained a CUDA error that was reported already: %s", error)


def _no_stall() -> float:
    return 0.0
