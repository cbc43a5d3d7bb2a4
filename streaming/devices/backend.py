"""One device: its memory, its copy streams, its events, and how host memory is page-locked for it.

[Note: copies take turns]
Copies take turns on the copy streams, and each waits for the one before it. So they are carried out in the order in
which they were queued, whichever stream each is on. The turns are not for bandwidth, since one stream has all of it.
They let other copies through: a GPU's copy engine stays with a stream until that stream has nothing to do, and a host
copies small tensors to the device in every step (the time step, conditioning). Behind a stream with two blocks of FLUX
in its queue such a copy waited 21 ms. At the end of each of our copies the engine must look for another stream, and
takes the small copy then. Around the begin of a step, where a host makes its small copies, ours are cut into fine
pieces, so that no small copy waits long; elsewhere no small copy waits, and a turn costs 4 to 5 us on the bus.

Two kinds: CUDA (cuda_backend.py), and virtual devices in RAM (cpu_backend.py).
"""

from __future__ import annotations

import logging
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch

from ..errors import DeviceMemoryError
from ..planning.vram_budget import DeviceMemory
from .allocation_record import NO_RECORD, AllocationRecord
from .copies import CopyTime, Event, Moment, Pair, Stall, count_bytes, cut

logger = logging.getLogger(__name__)

# A copy of fewer bytes is not worth dividing among links.
LEAST_FED_BYTES = 8 * 1024**2


class Brings(Protocol):
    """Brings weights to a device over the link of another one (split/feeder.py).

    Attributes:
        helper: backend of the other device.
        is_open: whether the memory that this needs is allocated.
    """

    helper: Backend

    @property
    def is_open(self) -> bool: ...

    def open(self, home: Backend) -> None:
        """Allocate that memory, unless this has been done."""

    def bring(self, home: Backend, pairs: Sequence[Pair], waits: Sequence[Event]) -> Event:
        """Queue copies, at least one, from host memory to ``home``, behind ``waits``; return the event of their end."""

    def all_queued(self, home: Backend) -> list[Event]:
        """Return events that happen when all that was queued here is done, also copies whose event got lost."""

    def close(self) -> None:
        """Free the memory. No copy may be under way on the home's device."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that a device is out of memory; libraries below torch have their own words for it."""
    if isinstance(error, (torch.OutOfMemoryError, DeviceMemoryError)):
        return True
    text = str(error) if isinstance(error, RuntimeError) else ""
    return "CUDA error: out of memory" in text or "_STATUS_ALLOC_FAILED" in text


# How torch's two allocators name the device that is out of memory.
_FULL_GPU = re.compile(r"GPU (?P<cached>\d+) has a total capacity|on device (?P<driver>\d+) would exceed")


class Backend(ABC):
    """A device that computes on one stream and copies on others.

    Attributes:
        device: where tensors live.
        name: for people; it also tells virtual devices apart.
        allocated, peak: bytes that this backend has handed out, now and at most.
        record: of allocations in steps; it must not contain ours.
        feeders: other devices that bring a part of what streams, while they are open (feeder.py).
    """

    # Bytes of a fine piece (Note: copies take turns); None where copies are never cut.
    fine_bytes: int | None = 8 * 1024**2

    def __init__(self, device: torch.device, name: str, record: AllocationRecord = NO_RECORD) -> None:
        self.device = device
        self.name = name
        self.record = record
        self.feeders: list[Brings] = []
        self._open_feeders: list[Brings] = []
        self.allocated = 0
        self.peak = 0
        self._live: dict[int, int] = {}
        self._streams: list[Any] = []
        self._turn = 0
        self._last_copy: Event | None = None
        self._copy_times: list[CopyTime] | None = None
        self._in_thread = threading.local()

    @property
    def budget(self) -> int | None:
        """Bytes that may be allocated in all, where the backend itself sets a limit."""
        return None

    @property
    def is_virtual(self) -> bool:
        """Whether the device is one in RAM, for which no GPU is needed."""
        return self.budget is not None

    def is_full(self, error: BaseException) -> bool:
        """Whether ``error`` says that this device is out of memory, or a device that it does not name."""
        return is_out_of_memory(error) and self._names(error) is not False

    def is_named(self, error: BaseException, broke_on: torch.device | None = None) -> bool:
        """Whether ``error`` says that this very device is out of memory; if it names none, the one that it broke on."""
        named = self._names(error)
        return is_out_of_memory(error) and (broke_on == self.device if named is None else named)

    def _names(self, error: BaseException) -> bool | None:
        """Whether ``error`` names this device; None if it names none."""
        named = _FULL_GPU.search(str(error))
        if named is None or self.device.index is None:
            return None
        return int(named["cached"] or named["driver"]) == self.device.index

    def allocate(self, nbytes: int, lasting: bool = False) -> torch.Tensor:
        """Return a uint8 buffer of ``nbytes`` bytes. It is never an inference tensor, whatever mode the caller is in.

        Args:
            nbytes: its size.
            lasting: whether it stays for many steps and no other GPU copies into it: a GPU may have memory of its own
                for such buffers (lasting_memory.py, Note: weights in pages).

        Raises:
            DeviceMemoryError: a virtual device's budget is exceeded.
            torch.OutOfMemoryError: the GPU is out of memory.
        """
        with self.record.paused():  # A slot or a resident stays longer than the step.
            buffer = self._lasting(nbytes) if lasting else self._empty(nbytes)
        self._live[buffer.data_ptr()] = nbytes
        self.allocated += nbytes
        self.peak = max(self.peak, self.allocated)
        return buffer

    def _empty(self, nbytes: int) -> torch.Tensor:
        with torch.inference_mode(False):
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def _lasting(self, nbytes: int) -> torch.Tensor:
        return self._empty(nbytes)

    def free(self, buffer: torch.Tensor) -> int:
        """Count ``buffer`` as freed; its memory is freed with the last reference to it.

        Returns the bytes that count no longer: 0 if :meth:`close` has taken them off already.
        """
        nbytes = self._live.pop(buffer.data_ptr(), 0)
        self.allocated -= nbytes
        return nbytes

    def open(self, copy_streams: int) -> None:
        """Have ``copy_streams`` streams for copies; with 0 copies run on the compute stream, or on the calling thread.

        If there were more streams before, no copy may be under way.
        """
        del self._streams[copy_streams:]
        self._turn = 0
        while len(self._streams) < copy_streams:
            self._streams.append(self._create_stream())
        if not copy_streams:
            self.close_feeders()
        for feeder in self.feeders if copy_streams else ():
            try:
                feeder.open(self)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                logger.warning("%s has no room for passing weights on to %s", feeder.helper.name, self.name)
        self._open_feeders = [feeder for feeder in self.feeders if feeder.is_open]

    @property
    def links(self) -> int:
        """The number of links that bring weights: its own, and those of open feeders."""
        return 1 + len(self._open_feeders)

    def close_feeders(self) -> None:
        """Free the memory of feeders until the backend is opened again. No copy may be under way."""
        for feeder in self.feeders:
            feeder.close()
        self._open_feeders = []

    def copy(self, pairs: Sequence[Pair], after: Sequence[Event] = (), fine: bool = False) -> Event:
        """Queue copies.

        They start when all of ``after`` has happened, and the returned event happens when all are done. Copies are
        carried out in the order in which they are queued; in ``fine`` pieces where the host may have small copies of
        its own to make (Note: copies take turns).
        """
        last = self._last_copy = self._copy_in_turns(pairs, self._behind(after), fine)
        return last

    def bring(self, pairs: Sequence[Pair], after: Sequence[Event] = (), fine: bool = False) -> Event:
        """As :meth:`copy`, from page-locked memory to the device, over the links of its feeders too."""
        if not self._open_feeders or count_bytes(pairs) < LEAST_FED_BYTES:
            return self.copy(pairs, after, fine)
        waits = self._behind(after)
        own, *others = cut(pairs, self.links)
        try:
            parts = [self._copy_in_turns(own, waits, fine)]
            for feeder, part in zip(self._open_feeders, others, strict=False):
                parts.append(feeder.bring(self, part, waits))
        except BaseException:
            # Race: the copies that were queued may still be under way when the next copy to this memory starts. Their
            # events may be lost, so the next copy waits for all that is on the streams.
            queued = [self._copy_now(stream, [], waits) for stream in self._streams]
            queued += [event for feeder in self._open_feeders for event in feeder.all_queued(self)]
            self._last_copy = self._all_over(self._next_stream(), queued)
            raise
        self._last_copy = self._all_over(self._next_stream(), parts)
        return self._last_copy

    def _behind(self, after: Sequence[Event]) -> list[Event]:
        """Return what a copy waits for: the one before it, and ``after``."""
        return [*after] if self._last_copy is None else [self._last_copy, *after]

    def _copy_in_turns(self, pairs: Sequence[Pair], waits: Sequence[Event], fine: bool) -> Event:
        if not (fine and self.fine_bytes):
            return self._copy_now(self._next_stream(), pairs, waits)
        event = None
        for turn in self._in_pieces(pairs, self.fine_bytes):
            event = self._copy_now(self._next_stream(), turn, waits)
            waits = [event]
        assert event is not None
        return event

    def _next_stream(self) -> Any:
        if not self._streams:
            return None
        self._turn = (self._turn + 1) % len(self._streams)
        return self._streams[self._turn]

    def _all_over(self, stream: Any, events: Sequence[Event]) -> Event:
        """Return an event on ``stream`` that happens when all of ``events`` have, and fails when one of them does."""
        return self._copy_now(stream, [], events)

    def copy_on(self, stream: Any, pairs: Sequence[Pair], waits: Sequence[Event], timed: bool = True) -> Event:
        """Queue copies on a stream of :meth:`create_stream`, outside of the order of other copies.

        Args:
            stream: of this device.
            pairs: where to copy, and from where.
            waits: events that happen before.
            timed: whether they count among :meth:`copy_times`, from which is told how fast weights come.
        """
        self._in_thread.timed = timed
        try:
            return self._copy_now(stream, pairs, waits)
        finally:
            self._in_thread.timed = True

    @property
    def _times(self) -> list[CopyTime] | None:
        """Where the time of a copy goes that this thread queues; None if nobody takes it."""
        return self._copy_times if getattr(self._in_thread, "timed", True) else None

    def create_stream(self) -> Any:
        """Return a stream for copies that takes no part in the turns."""
        return self._create_stream()

    def passing_on(self) -> AbstractContextManager[object]:
        """While this lasts, copies out of this device's memory to another device do not wait for its compute."""
        return nullcontext()

    def current(self) -> AbstractContextManager[object]:
        """While this lasts, what the calling thread runs without naming a device runs on this one."""
        return nullcontext()

    def all_of(self, events: Sequence[Event]) -> Event:
        """Return an event that happens when the copies of all ``events`` are done, and fails when one of them does.

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

    @abstractmethod
    def hold_back(self, seconds: float) -> None:
        """Have compute that is queued from now on begin about so much later."""

    def time_copies(self) -> None:
        """Take the time of every copy from now on."""
        self._copy_times = []

    def copy_times(self) -> list[CopyTime]:
        """Return the times taken since :meth:`time_copies`, and take no more."""
        times, self._copy_times = self._copy_times or [], None
        return times

    @abstractmethod
    def memory(self) -> DeviceMemory:
        """Return what is free now. Waits for the device only if dropped buffers are freed here."""

    @abstractmethod
    def give_back(self) -> None:
        """Free dropped buffers, where that does not happen by itself. Waits for the device if there are any."""

    @abstractmethod
    def trim(self) -> int:
        """As :meth:`give_back`, and have torch free its cache, waiting for the device; with an allocator of torch's own
        it does that on all devices at once (cuda_pool.py). Returns the bytes that it still keeps on this device."""

    @abstractmethod
    def watch_peak(self) -> None:
        """Record the most that is allocated at once from now on (:meth:`peak_bytes`)."""

    @abstractmethod
    def peak_bytes(self) -> int | None:
        """Return by how many bytes the peak since :meth:`watch_peak` exceeds what is allocated now; None if unknown."""

    @abstractmethod
    def keep(self, nbytes: int) -> None:
        """Have torch keep ``nbytes`` for later, in one piece, if there is room for them."""

    @abstractmethod
    def moment(self) -> Moment:
        """Return the moment at which all compute queued so far is done."""

    @abstractmethod
    def seconds(self, begin: Moment, end: Moment) -> float | None:
        """Return the seconds from one moment to another; None while the device has not reached the later one."""

    @abstractmethod
    def _create_stream(self) -> Any:
        """A stream for copies."""

    @abstractmethod
    def _copy_now(self, stream: Any, pairs: Sequence[Pair], waits: Sequence[Event]) -> Event:
        """Queue copies on ``stream`` behind all of ``waits``. The event fails when one of these copies does."""

    @abstractmethod
    def mark(self) -> Event:
        """Return an event that happens when all compute queued so far is done."""

    @abstractmethod
    def wait(self, event: Event) -> Stall:
        """Make compute that is queued from now on start after ``event``; return how long it waits."""

    @abstractmethod
    def finish(self, event: Event) -> None:
        """Wait, on the host, for a copy's event. A failure of the copy is not raised here."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait, on the host, for everything that was queued on this device."""

    @abstractmethod
    def register(self, buffer: torch.Tensor) -> str | None:
        """Page-lock host memory. Returns None, or the reason why that failed."""

    def register_read_only(self, buffer: torch.Tensor) -> str | None:
        """As :meth:`register`, for memory that nobody can write to, the device neither."""
        return self.register(buffer)

    @abstractmethod
    def unregister(self, address: int) -> None:
        """Undo either for the memory that starts at ``address``."""

    def close(self) -> None:
        """Drop streams, threads and what was allocated. No copy uses that memory afterwards."""
        self.close_feeders()
        self._streams.clear()
        self._last_copy = None
        self._live.clear()
        self.allocated = 0
