"""Compares what has arrived on the device with what was sent. A debugging aid, off by default; speed does not matter.

[Note: the sums]
Memory is cut into pieces of 65,536 words of 32 bits. Of each piece two sums are taken: of its words, and of its words
times their places in the piece, which count from 1. Words are signed, so no sum is beyond 2^31 * (2^31 + 2^15) < 2^63:
64 bits hold it, nothing is rounded, and the order of adding makes no difference. So the sums are the same on every
device, and only they are copied back from it.
Any change of one or two words of a piece is found. If words change by d and e at the places p and q, both sums stay as
they are only where d + e = 0 and p * d + q * e = 0; so (p - q) * d = 0, and there is no change. A flipped bit is such a
change, and so are two words that have changed places. Damage to more words (zeros, an older block, words that moved on
by one) is missed only if it fits two equations by chance, of which one is of 63 bits.
What lies between the tensors of a unit is left out: it is neither read nor written.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from ..errors import CorruptionError
from ..memory.unit_copies import UnitCopies
from ..model.blocks import BlockSet
from ..model.contents import read_range
from .lane import Lane, Place
from .telemetry import Counters

logger = logging.getLogger(__name__)

PIECE_WORDS = 1 << 16
WORD_BYTES = 4
# On the device the sums take memory that no plan knows of: five times this.
BATCH_BYTES = 16 * 1024**2


def checksums(memory: torch.Tensor) -> torch.Tensor:
    """The two int64 sums of each piece of uint8 ``memory``, on its device, in a row for each piece (Note: the sums)."""
    sums = [_sums(words) for words in _pieces(memory)]
    return torch.cat(sums) if sums else torch.zeros(0, 2, dtype=torch.int64, device=memory.device)


def _pieces(memory: torch.Tensor) -> Iterator[torch.Tensor]:
    """Words of whole pieces, a few pieces at once; then those of the last one, if it is shorter."""
    piece_bytes = PIECE_WORDS * WORD_BYTES
    whole = memory.nbytes // piece_bytes * piece_bytes
    for start in range(0, whole, BATCH_BYTES):
        yield memory[start : min(whole, start + BATCH_BYTES)].view(torch.int32).view(-1, PIECE_WORDS)
    if whole < memory.nbytes:
        last = memory[whole:]
        yield pad(last, (0, -last.nbytes % WORD_BYTES)).view(torch.int32).view(1, -1)


def _sums(words: torch.Tensor) -> torch.Tensor:
    words = words.long()
    places = torch.arange(1, words.shape[1] + 1, device=words.device)
    return torch.stack([words.sum(1), (words * places).sum(1)], 1)


class _Part(NamedTuple):
    """One tensor on the device, and the memory that it was copied from. Both uint8."""

    name: str
    copy: torch.Tensor
    source: torch.Tensor


class Verifier:
    """Is asked to check copies that have arrived. This one checks nothing, and steps run as if there were none.

    Attributes:
        finding: what was found, for people; empty while nothing was.
    """

    finding = ""
    # Copies that arrived while no step waited for them may be kept.
    trusting = True

    def make_lane(self, *args: Any) -> Lane:
        return Lane(*args)

    def check_resident(self, copies: UnitCopies) -> None:
        """A resident copy has arrived."""


class ChecksumVerifier(Verifier):
    """Compares each segment with its source before it is used, and each resident copy when it has arrived.

    The source is the master copy; where there is none, the file or memory that the weights were loaded from, which is
    read anew. What differs is copied again while everything waits, and from then on all copies are synchronous.

    Args:
        blocks: names them.
        counters: where to count.
        step_down: a method, which is referred to weakly. It has copies made synchronously from now on, and returns when
            nothing is on its way.
    """

    trusting = False

    def __init__(self, blocks: BlockSet, counters: Counters, step_down: Callable[[], None]) -> None:
        self._block_names = [block.name for block in blocks.blocks]
        self._counters = counters
        self._step_down = weakref.WeakMethod(step_down)

    def make_lane(self, *args: Any) -> Lane:
        return _VerifiedLane(self, *args)

    def check_resident(self, copies: UnitCopies) -> None:
        assert copies.resident is not None
        self.check("resident", [(copies.resident.buffer, copies)])

    def check(self, what: str, places: Sequence[Place]) -> None:
        """Compare units of one block, and mend what differs from its source.

        Args:
            what: a name for them, for people.
            places: where on the device they are; compute waits for the copies already.

        Raises:
            CorruptionError: a copy differs still after it was copied again.
        """
        parts = [part for place, copies in places for part in _parts(place, copies)]
        if not (damage := _compare(parts)):
            return
        self._report(what, places, damage)
        if (step_down := self._step_down()) is not None:
            step_down()
        for part in parts:
            part.copy.copy_(part.source)
        if damage := _compare(parts):
            raise CorruptionError(
                f"a copy of {self._name(places)} differs from its source, and again when it was copied anew "
                f"({what}: {'; '.join(damage)}). The device, its bus or its driver damages data"
            )

    def _report(self, what: str, places: Sequence[Place], damage: Sequence[str]) -> None:
        self._counters.corrupted += 1
        name = self._name(places)
        self.finding = f"copies are synchronous since one of {name} was corrupted"
        units = ", ".join(copies.unit.name for _, copies in places)
        logger.error("a copy of %s was corrupted (%s: %s): %s", name, what, units, "; ".join(damage))

    def _name(self, places: Sequence[Place]) -> str:
        block = places[0][1].unit.block
        return self._block_names[block] if block >= 0 else "what is outside of blocks"


class _VerifiedLane(Lane):
    """A lane that has each segment checked before it is used."""

    def __init__(self, verifier: ChecksumVerifier, *args: Any) -> None:
        super().__init__(*args)
        self._verifier = verifier

    def _arrived(self, number: int, buffer: torch.Tensor) -> None:
        with self._backend.record.paused():  # Not every step takes sums.
            self._verifier.check(f"segment {number}", self._places_in(number, buffer))


def _parts(place: torch.Tensor, copies: UnitCopies) -> Iterator[_Part]:
    """The tensors of a unit at ``place`` on the device, beside what they should be."""
    if copies.master is not None:
        source = copies.master.buffer
    else:
        source = torch.empty(copies.unit.nbytes, dtype=torch.uint8)
        read_range(copies.unit.layout, 0, copies.unit.nbytes, source)
    for spec in copies.unit.layout.specs:
        start, stop = spec.offset, spec.offset + spec.nbytes
        yield _Part(spec.name, place[start:stop], source[start:stop])


def _compare(parts: Sequence[_Part]) -> list[str]:
    """Describe the parts that differ from their source, and from which byte on."""
    if not parts:
        return []
    arrived = torch.cat([checksums(part.copy) for part in parts]).cpu()
    sent = torch.cat([checksums(part.source) for part in parts])
    differs = (arrived != sent).any(1)
    counts = [-(-part.copy.nbytes // (PIECE_WORDS * WORD_BYTES)) for part in parts]
    return [
        f"{part.name} differs in {int(wrong.sum())} of {len(wrong)} pieces, from byte "
        f"{int(wrong.nonzero()[0]) * PIECE_WORDS * WORD_BYTES} on"
        for part, wrong in zip(parts, differs.split(counts), strict=True)
        if wrong.any()
    ]
