"""Who holds which copy, who builds which, and what each request is answered. Pure: it moves no bytes and waits for
nobody.

A key is of one copy: it is free, being built by one worker, or whole and held by one or more. Whoever builds or holds
is a connection, and everything of it ends with it. The last hold that ends closes the copy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple


class Kind(bytes, Enum):
    """What a request is answered.

    HAVE: it is whole; the descriptor comes along, and it is held from now on.
    BUILD: build it, and give it.
    LATER: another builds it.
    DONE: as was asked.
    REFUSED: the reason comes along.
    """

    HAVE = b"H"
    BUILD = b"B"
    LATER = b"L"
    DONE = b"K"
    REFUSED = b"R"


class Answer(NamedTuple):
    """Of a request. ``descriptor`` stays the ledger's own: it is sent on, not given away."""

    kind: Kind
    value: int = 0
    descriptor: int | None = None
    reason: str = ""


@dataclass(frozen=True)
class Limits:
    """What is kept at most: bytes and copies in all, and copies that one worker builds at once."""

    nbytes: int
    copies: int = 16_384
    building: int = 4_096


class Build(NamedTuple):
    """A copy that is being built.

    Attributes:
        worker: who builds it.
        nbytes: how large it will be.
        within: or less, as is known only when it is built.
    """

    worker: int
    nbytes: int
    within: bool = False


@dataclass
class Copy:
    """A whole copy.

    Attributes:
        descriptor: of its memory.
        nbytes: its size.
        holds: of each worker.
    """

    descriptor: int
    nbytes: int
    holds: Counter[int] = field(default_factory=Counter)


class Ledger:
    """All copies of a host.

    Args:
        limits: what it may keep.
        close: closes a descriptor.

    Attributes:
        copies: whole ones by key.
        building: who builds each of the others.
        moves: counts what makes another answer possible.
    """

    def __init__(self, limits: Limits, close: Callable[[int], None]) -> None:
        self.copies: dict[bytes, Copy] = {}
        self.building: dict[bytes, Build] = {}
        self.moves = 0
        self._limits = limits
        self._close = close

    @property
    def nbytes(self) -> int:
        """Bytes of whole copies, each once."""
        return sum(copy.nbytes for copy in self.copies.values())

    def want(self, worker: int, key: bytes, nbytes: int, within: bool = False) -> Answer:
        """``worker`` would like to hold the copy, or else to build it.

        Args:
            within: it may have less than ``nbytes``. One with more is of no use then, as the worker finds out by itself
                when it builds its own.
        """
        if (copy := self.copies.get(key)) is not None:
            if copy.nbytes > nbytes and within:
                return Answer(Kind.REFUSED)
            if copy.nbytes != nbytes and not within:
                return Answer(Kind.REFUSED, reason=f"the copy there has {copy.nbytes} bytes instead of {nbytes}")
            copy.holds[worker] += 1
            return Answer(Kind.HAVE, copy.nbytes, copy.descriptor)
        if key in self.building:
            return Answer(Kind.LATER)
        if (reason := self._why_no_more(worker, nbytes)) is not None:
            return Answer(Kind.REFUSED, reason=reason)
        self.building[key] = Build(worker, nbytes, within)
        return Answer(Kind.BUILD)

    def _why_no_more(self, worker: int, nbytes: int) -> str | None:
        coming = [build.nbytes for build in self.building.values()]
        if nbytes <= 0:
            return "a copy has at least one byte"
        if self.nbytes + sum(coming) + nbytes > self._limits.nbytes:
            return f"shared copies may have {self._limits.nbytes} bytes in all"
        if len(self.copies) + len(coming) >= self._limits.copies:
            return f"there may be {self._limits.copies} shared copies"
        if sum(build.worker == worker for build in self.building.values()) >= self._limits.building:
            return f"a worker may build {self._limits.building} copies at once"
        return None

    def give(self, worker: int, key: bytes, nbytes: int, descriptor: int) -> Answer:
        """``worker`` has built it, and holds it from now on. The descriptor is the ledger's, also where it refuses."""
        build = self.building.get(key)
        fits = build is not None and (0 < nbytes <= build.nbytes if build.within else nbytes == build.nbytes)
        if build is None or build.worker != worker or not fits:
            self._close(descriptor)
            return Answer(Kind.REFUSED, reason="nobody has asked this worker to build it")
        del self.building[key]
        self.copies[key] = Copy(descriptor, nbytes, Counter({worker: 1}))
        self.moves += 1
        return Answer(Kind.DONE)

    def stop_building(self, worker: int, key: bytes) -> None:
        """``worker`` does not build it after all. Said twice, or by another, it changes nothing."""
        build = self.building.get(key)
        if build is not None and build.worker == worker:
            del self.building[key]
            self.moves += 1

    def drop(self, worker: int, key: bytes) -> None:
        """One hold of ``worker`` ends. Where it has none that changes nothing."""
        copy = self.copies.get(key)
        if copy is None or not copy.holds[worker]:
            return
        copy.holds[worker] -= 1
        self._close_unless_held(key, copy)

    def leave(self, worker: int) -> None:
        """Its connection has ended, and with it everything that it holds and builds."""
        for key in [key for key, build in self.building.items() if build.worker == worker]:
            self.stop_building(worker, key)
        for key, copy in list(self.copies.items()):
            del copy.holds[worker]
            self._close_unless_held(key, copy)

    def clear(self) -> None:
        """Close everything: nobody is asked any more."""
        for copy in self.copies.values():
            self._close(copy.descriptor)
        self.copies.clear()
        self.building.clear()

    def _close_unless_held(self, key: bytes, copy: Copy) -> None:
        if not copy.holds.total():
            del self.copies[key]
            self._close(copy.descriptor)
            self.moves += 1

    def held_by(self, worker: int) -> tuple[int, int]:
        """How many copies a worker holds, and their bytes."""
        held = [copy.nbytes for copy in self.copies.values() if copy.holds[worker] > 0]
        return len(held), sum(held)
