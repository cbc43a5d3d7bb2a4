"""Page-locked memory for packed copies: taken ahead of them, and that of master copies given back behind them.

[Note: handed over by a future]
Threads touch, page-lock and unlock memory while the thread that packs does the rest, which takes less time: of 1.5 s
for 18 GB 0.85 were taking and 0.4 giving back (H200, one thread for everything). They work on memory that no other
thread refers to: before it is handed over by a future, or after it was dropped. Each task takes milliseconds, and
whoever packs waits for all of them, so they may be threads of ``concurrent.futures`` (threads.py).
What is taken is counted on the thread that packs, unit after unit, so no unit takes the room of one before it. When a
unit comes for which there was no room, all master copies before it have given theirs back. Then its own goes too, as
its weights are on the device by then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from .arena import Arena
from .host_memory import HostBuffer
from .unit_copies import UnitCopies

T = TypeVar("T")

THREADS = 4
UNITS_AHEAD = 6


class Wanted(NamedTuple):
    """A unit to be packed, and the most bytes that it may take then."""

    copies: UnitCopies
    most_bytes: int


class MemoryAhead:
    """Memory for the packed copies of some units, which ask for it in the order in which they are given.

    Args:
        arena: where it comes from.
        wanted: the units.
    """

    def __init__(self, arena: Arena, wanted: Iterable[Wanted]) -> None:
        self._arena = arena
        self._pool = ThreadPoolExecutor(THREADS, "weightstream-pack")
        self._wanted = deque(wanted)
        self._taken: deque[Future[HostBuffer | None]] = deque()
        self._given_back: list[Future[None]] = []
        self._unused: list[HostBuffer] = []

    def begin(self) -> None:
        """Take memory for the first units."""
        self._take_ahead()

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Have one of the threads do something else."""
        return self._pool.submit(function, *arguments)

    def next(self, needed: bool) -> HostBuffer | None:
        """Return memory for the next unit, its own if it is large enough; None where no more may be page-locked.

        It stays ours until :meth:`hand_over`. The unit's weights are on the device, and its master copy may go.

        Args:
            needed: whether the unit will be packed at all.
        """
        memory = None
        if self._taken:
            memory = self._taken.popleft().result()
        else:
            wanted = self._wanted.popleft()
            if needed:
                memory = self._take_at_last(wanted)
        self._take_ahead()
        return memory

    def take_besides(self, wanted: Wanted) -> HostBuffer | None:
        """As :meth:`next`, for a unit that was not to need memory of ours."""
        return self._take_at_last(wanted)

    def hand_over(self, memory: HostBuffer) -> None:
        """It is a packed copy's from now on."""
        if memory in self._unused:
            self._unused.remove(memory)

    def take_back(self, memory: HostBuffer) -> None:
        """No packed copy has it, or any more."""
        self._unused.append(memory)

    def give_back(self, memory: HostBuffer) -> None:
        """A copy had it, and nobody uses it any more."""
        self._given_back.append(self._pool.submit(self._arena.release, memory))

    def close(self) -> None:
        """Give back whatever was not handed over, and wait for all threads."""
        self._pool.shutdown()
        while self._unused:
            self._arena.release(self._unused.pop())
        self.finish_giving_back()

    def _take_ahead(self) -> None:
        while self._wanted and len(self._taken) < UNITS_AHEAD:
            if (taken := self._take(self._wanted[0])) is None:
                return
            self._wanted.popleft()
            self._taken.append(taken)

    def _take(self, wanted: Wanted) -> Future[HostBuffer | None] | None:
        """Have memory taken; None where that is not allowed now."""
        packed = wanted.copies.packed
        if packed is not None and packed.memory.nbytes >= wanted.most_bytes and not packed.memory.read_only:
            own: Future[HostBuffer | None] = Future()
            own.set_result(packed.memory)
            return own
        if (memory := self._arena.claim(wanted.most_bytes)) is None:
            return None
        self._unused.append(memory)
        return self._pool.submit(self._lock, memory)

    def _lock(self, memory: HostBuffer) -> HostBuffer | None:
        """Note: handed over by a future."""
        memory.memory.numpy().fill(0)  # Touched pages are page-locked several times faster.
        return memory if self._arena.lock(memory) else None

    def _take_at_last(self, wanted: Wanted) -> HostBuffer | None:
        self.finish_giving_back()
        if (taken := self._take(wanted)) is None and wanted.copies.pinned:
            if (master := wanted.copies.drop_master()) is not None:
                self._arena.release(master)
            taken = self._take(wanted)
        return taken.result() if taken is not None else None

    def finish_giving_back(self) -> None:
        """Wait until all that was given back is unlocked."""
        while self._given_back:
            self._given_back.pop().result()
