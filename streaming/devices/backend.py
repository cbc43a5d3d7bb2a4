"""One device: its memory, its copy streams, its events, and how host memory is page-locked for it.

[Note: copies take turns]
Copies take turns on the copy streams, and each waits for the one before it. So they are carried out in the order in
which they were queued, whichever stream each is on. The turns are not for bandwidth, one stream has all of it. They
are for others: a GPU's copy engine stays with a stream until that stream has nothing to do, and a host copies small
tensors to the device in every step (the time step, conditioning). Behind a stream with two blocks of FLUX in its queue
such a copy waited 21 ms. At the end of each of our copies the engine must look for another stream, and takes the small
copy then. Around the begin of a step, where a host makes its small copies, ours are cut into fine pieces, so that none
of them waits long; elsewhere nobody waits, and a turn costs 4 to 5 us on the bus.

Two kinds: CUDA (cuda_backend.py), and virtual devices in RAM (cpu_backend.py).
"""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch

from ..errors import DeviceMemoryError
from ..planning.residency import DeviceMemory
from .allocation_record import NO_RECORD, AllocationRecord
from .copies import CopyTime, Event, Moment, Pair, Stall, count_bytes, cut

logger = logging.getLogger(__name__)

# Less is not worth cutting up.
LEAST_FED_BYTES = 8 * 1024**2


class Brings(Protocol):
    """Brings weights to a device over the link of another one (split/feeder.py).

    Attributes:
        helper: the other one.
        is_open: whether it has the memory that it needs.
    """

    helper: Backend

    @property
    def is_open(self) -> bool: ...

    def open(self, home: Backend) -> None:
        """Take that memory, if it has none."""

    def bring(self, home: Backend, pairs: Sequence[Pair], waits: Sequence[Event]) -> Event:
        """Queue copies from host memory to ``home``, behind ``waits``; at least one."""

    def all_queued(self, home: Backend) -> list[Event]:
        """Events that happen when everything is over that was queued here, whoever was told of it."""

    def close(self) -> None:
        """Give the memory back. No copy may be under way on the home's device."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that a device has no room; libraries under torch say it in their own words."""
    if isinstance(error, (torch.OutOfMemoryError, DeviceMemoryError)):
        return True
    text = str(error) if isinstance(error, RuntimeError) else ""
    return "CUDA error: out of memory" in text or "_STATUS_ALLOC_FAILED" in text


# How torch's two allocators name the device that has no room.
_FULL_GPU = re.compile(r"GPU (?P<cached>\d+) has a total capacity|on device (?P<driver>\d+) would exceed")


class Backend(ABC):
    """A device that computes on one stream and copies on others.

    Attributes:
        device: where tensors live.
        name: for people; virtual devices are told apart by it.
        allocated, peak: bytes that this backend has handed out, now and at most.
        record: of allocations in steps, which ours must not be part of.
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

    @property
    def budget(self) -> int | None:
        """Bytes that may be allocated in all, where the backend itself sets a limit."""
        return None

    def is_full(self, error: BaseException) -> bool:
        """Whether ``error`` says that this device has no room, or one that it does not name."""
        return is_out_of_memory(error) and self._names(error) is not False

    def is_named(self, error: BaseException, broke_on: torch.device | None = None) -> bool:
        """Whether ``error`` says that just this device has no room; where it names none, it ``broke_on`` that one."""
        named = self._names(error)
        return is_out_of_memory(error) and (broke_on == self.device if named is None else named)

    def _names(self, error: BaseException) -> bool | None:
        """Whether this is the device that ``error`` speaks of; None if it speaks of none."""
        named = _FULL_GPU.search(str(error))
        if named is None or self.device.index is None:
            return None
        return int(named["cached"] or named["driver"]) == self.device.index

    def allocate(self, nbytes: int, lasting: bool = False) -> torch.Tensor:
        """A uint8 buffer of ``nbytes``. It is never an inference tensor, whatever mode the caller is in.

        Args:
            nbytes: its size.
            lasting: it stays for many steps, and no other GPU copies into it: a GPU may have memory of its own for that
                (lasting_memory.py, Note: weights in pages).

        Raises:
            DeviceMemoryError: a virtual device's budget is exceeded.
            torch.OutOfMemoryError: the GPU has no room.
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
        """Count ``buffer`` as given back; its memory goes when the last reference does.

        Gives the bytes that count no longer: none for what :meth:`close` has given back already.
        """
        nbytes = self._live.pop(buffer.data_ptr(), 0)
        self.allocated -= nbytes
        return nbytes

    def open(self, copy_streams: int) -> None:
        """Have ``copy_streams`` streams for copies; with 0 they run on the compute stream, or in the caller.

        No copy may be under way where there were more.
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
        """Over so many links weights come: its own, and those of open feeders."""
        return 1 + len(self._open_feeders)

    def close_feeders(self) -> None:
        """Give back what feeders hold, until the backend is opened again. No copy may be under way."""
        for feeder in self.feeders:
            feeder.close()
        self._open_feeders = []

    def copy(self, pairs: Sequence[Pair], after: Sequence[Event] = (), fine: bool = False) -> Event:
        """Queue copies.

        They start when all of ``after`` has happened, and the event that is given back says when all are done. Copies
        are carried out in the order in which they are queued; in ``fine`` pieces where the device's user may have small
        copies of its own to make (Note: copies take turns).
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
            # Race: what was queued may still be under way when the next copy to this memory is. Nobody may have been
            # told of it, so streams are asked.
            queued = [self._copy_now(stream, [], waits) for stream in self._streams]
            queued += [event for feeder in self._open_feeders for event in feeder.all_queued(self)]
            self._last_copy = self._all_over(self._next_stream(), queued)
            raise
        self._last_copy = self._all_over(self._next_stream(), parts)
        return self._last_copy

    def _behind(self, after: Sequence[Event]) -> list[Event]:
        """What a copy waits for: the one before it, and ``after``."""
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
        """An event on ``stream`` that happens when all of ``events`` have, and fails when one of them does."""
        return self._copy_now(stream, [], events)

    def copy_on(self, stream: Any, pairs: Sequence[Pair], waits: Sequence[Event]) -> Event:
        """Queue copies on a stream of :meth:`create_stream`, whatever the order of others."""
        return self._copy_now(stream, pairs, waits)

    def create_stream(self) -> Any:
        """A stream for copies that is in no turn."""
        return self._create_stream()

    def passing_on(self) -> AbstractContextManager[object]:
        """While this lasts this device passes on what others copy out of its memory, whatever it computes."""
        return nullcontext()

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
        """What is free now. Waits for nothing, unless something was dropped that is given back here."""

    @abstractmethod
    def give_back(self) -> None:
        """Give others what was dropped, where that does not happen by itself. Waits for the device if there is any."""

    @abstractmethod
    def trim(self) -> int:
        """As :meth:`give_back`, and have torch give back the memory that it keeps for later, on all devices: torch asks
        for no less, and waits for them. Gives the bytes that it keeps all the same, on this one."""

    @abstractmethod
    def watch_peak(self) -> None:
        """From now on watch the most that is allocated at once (:meth:`peak_bytes`)."""

    @abstractmethod
    def peak_bytes(self) -> int | None:
        """Bytes by which more was once allocated since :meth:`watch_peak` than is now; None where nobody counts all."""

    @abstractmethod
    def keep(self, nbytes: int) -> None:
        """Have torch keep ``nbytes`` for later, in one piece, if there is room for them."""

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
        self.close_feeders()
        self._streams.clear()
        self._last_copy = None
        self._live.clear()
        self.allocated = 0
