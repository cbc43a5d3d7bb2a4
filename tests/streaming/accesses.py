"""Proves the order of accesses to memory, instead of hoping to hit a bad moment.

Who accesses memory is an agent: a stream of a device, or a thread of the host. Each has a vector clock: how much of
what every agent has done is over, for certain, when it does something now. An event carries such a clock, and a wait
joins it into the one of the agent that waits. Two accesses to the same bytes, at least one of them a write, race unless
the agent of the later one has seen the earlier. That holds for every possible timing at once, so one run of a program
is enough.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from weightstream.streaming.memory import reader
from weightstream.streaming.memory.transfer import Piece

Agent = Hashable
# Of each agent, the number of its accesses that are over.
Clock = dict[Agent, int]

# By what an access does, and what the earlier one did: who reads does not mind readers.
RACES = {
    (False, True): "reads memory before the write into it is done",
    (True, False): "overwrites memory that may still be read",
    (True, True): "writes to memory, and may be overtaken by an earlier write into it",
}


class RaceError(AssertionError):
    """Two accesses that nothing orders."""


class _Access(NamedTuple):
    start: int
    stop: int
    agent: Agent
    tick: int
    writes: bool


def span_of(tensor: torch.Tensor) -> range:
    """The addresses of a tensor that fills its memory."""
    return range(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)


class Accesses:
    """Accesses so far to the memory of a process, and what each agent has seen of them.

    Attributes:
        count: accesses so far.
        host_writes: of the host's threads to memory that copies read.
    """

    def __init__(self) -> None:
        self.count = self.host_writes = 0
        self._clocks: dict[Agent, Clock] = {}
        self._past: list[_Access] = []
        self._being_written: list[range] = []
        self._lock = threading.RLock()

    # -- who has seen what ---------------------------------------------------------------------------------------

    def seen_by(self, agent: Agent) -> Clock:
        """What is over for ``agent`` now, its own accesses included."""
        with self._lock:
            return dict(self._clocks.setdefault(agent, {}))

    def see(self, agent: Agent, clock: Clock) -> None:
        """``agent`` has waited for what ``clock`` says."""
        with self._lock:
            _join(self._clocks.setdefault(agent, {}), clock)

    def has_seen(self, agent: Agent, clock: Clock) -> bool:
        with self._lock:
            seen = self._clocks.setdefault(agent, {})
            return all(seen.get(other, 0) >= tick for other, tick in clock.items())

    def end_of(self, agents: Iterable[Agent]) -> None:
        """All that ``agents`` have done is over, for whoever does something from now on."""
        with self._lock:
            everything: Clock = {}
            for agent in agents:
                _join(everything, self._clocks.setdefault(agent, {}))
            for clock in self._clocks.values():
                _join(clock, everything)
            self._past = [past for past in self._past if everything.get(past.agent, 0) < past.tick]

    # -- accesses ------------------------------------------------------------------------------------------------

    def read(self, agent: Agent, memory: torch.Tensor) -> None:
        self._access(agent, span_of(memory), writes=False)

    def write(self, agent: Agent, memory: torch.Tensor) -> None:
        self._access(agent, span_of(memory), writes=True)

    def end(self, agent: Agent, span: range, what: str) -> None:
        """``agent`` does ``what`` to memory that nobody may be using any more, as who frees it.

        The memory may come back as something else.
        """
        with self._lock:
            for past in self._checked(agent, span, True, what):
                self._past.remove(past)

    @contextmanager
    def written_by_host(self, memory: torch.Tensor) -> Iterator[None]:
        """This thread writes to host memory, which nobody reads meanwhile. Threads that wait for it are not known."""
        span = span_of(memory)
        self.end(threading.current_thread(), span, "overwrites memory before the copy out of it is done")
        with self._lock:
            self.host_writes += 1
            self._being_written.append(span)
        yield
        with self._lock:
            self._being_written.remove(span)

    def watch_reader(self, patch: pytest.MonkeyPatch) -> None:
        """Hear of what the reader writes to its chunks."""

        def watched(fill: Callable[[torch.Tensor], None]) -> Callable[[torch.Tensor], None]:
            def write(chunk: torch.Tensor) -> None:
                with self.written_by_host(chunk):
                    fill(chunk)

            return write

        class WatchedPiece(Piece):
            def __init__(self, transfer: Any, target: Any, source: Any, fill: Any) -> None:
                super().__init__(transfer, target, source, fill and watched(fill))

        patch.setattr(reader, "Piece", WatchedPiece)

    def _access(self, agent: Agent, span: range, writes: bool) -> None:
        with self._lock:
            overlapping = self._checked(agent, span, writes, "")
            if any(span.start < other.stop and other.start < span.stop for other in self._being_written):
                raise RaceError(f"{agent} accesses memory that a thread is writing to")
            self.count += 1
            clock = self._clocks.setdefault(agent, {})
            clock[agent] = clock.get(agent, 0) + 1
            # What comes behind a write comes behind all that was before it, too.
            for past in overlapping:
                is_inside = span.start <= past.start and past.stop <= span.stop
                if is_inside and (writes or (past.agent == agent and not past.writes)):
                    self._past.remove(past)
            self._past.append(_Access(span.start, span.stop, agent, clock[agent], writes))

    def _checked(self, agent: Agent, span: range, writes: bool, what: str) -> list[_Access]:
        """Accesses so far to any byte of ``span``. None of them races with one that ``agent`` makes now."""
        clock = self._clocks.setdefault(agent, {})
        start, stop = span.start, span.stop
        overlapping = [past for past in self._past if past.start < stop and start < past.stop]
        for past in overlapping:
            if (writes or past.writes) and past.agent != agent and clock.get(past.agent, 0) < past.tick:
                raise RaceError(f"{agent} {what or RACES[writes, past.writes]} ({past.agent} has it)")
        return overlapping


def _join(clock: Clock, other: Clock) -> None:
    for agent, tick in other.items():
        if tick > clock.get(agent, 0):
            clock[agent] = tick
