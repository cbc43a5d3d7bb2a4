"""Why a step is not faster: causes with the seconds that each costs, the dearest first, as far as they can be told.

Pure: everything comes in as values. The page has the words for each kind (web/lib/why.mjs).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from ...streaming import Link
from ...streaming.estimating.estimate import known_number
from ...streaming.machine.gpus import NO_LINK
from .together import Together

Kind = Literal[
    "loading",
    "link",
    "slow_bus",
    "unpinned",
    "disk",
    "synchronous",
    "others",
    "limit",
    "unpacked",
    "turns",
    "room",
    "compute",
]

# A step that waits for less than this part of its time is limited by compute.
LEAST_WAITING = 0.03
# A link that is slower than this part of what the card can do. Two cards often share lanes on purpose (x8 each).
MOST_OF_LINK = 0.75
# What arrives of a link's raw rate, at worst, on a machine that is all right.
LEAST_OF_RATE = 0.55
# Weights that come more slowly come from a disk, not from RAM, if the link can bring more.
DISK_BYTES_PER_SECOND = 3.5e9
# Drivers and a desktop take so much of any card.
USUAL_OTHERS = 1_000_000_000
# A limit has an effect if a model takes this part of it, or all but LITTLE of it.
MOST_OF_LIMIT = 0.9
# Work at the same time is advised where a step would take at most this part of what it takes now.
WORTH = 0.85
# Room that is not worth a word.
LITTLE = 300_000_000


@dataclass(frozen=True)
class Facts:
    """What is known of a model on one device. Bytes, seconds, bytes per second; None where something is not known.

    Attributes:
        loading: whether weights are still being read, or page-locked.
        synchronous: whether copies do not run while the device computes; ``why_synchronous`` in words.
        streamed, staged: bytes that stream in a step; those of them that are not page-locked.
        why_staged, why_unpacked: in words; "" where nothing is to be said.
        bandwidth: of what streams, as it was measured.
        step, waited, compute: seconds of a step, of waiting in it, and of a step with everything resident.
        link, card: the link while the model ran, and the best that the card can do.
        total, free, others: of the device: its memory, what is free, and what other programs have.
        limit: of VRAM for weights, from the settings; kept: what the model has of it, staging included.
        headroom: what the settings leave free.
        together: how the GPUs of a split model might work at the same time; None on all but its first.
    """

    loading: bool = False
    synchronous: bool = False
    why_synchronous: str = ""
    streamed: int = 0
    staged: int = 0
    why_staged: str = ""
    why_unpacked: str = ""
    bandwidth: float | None = None
    step: float | None = None
    waited: float | None = None
    compute: float | None = None
    link: Link = NO_LINK
    card: Link = NO_LINK
    total: int | None = None
    free: int | None = None
    others: int | None = None
    limit: int | None = None
    kept: int | None = None
    headroom: int = 0
    together: Together | None = None

    @property
    def rate(self) -> float | None:
        """The bandwidth, if it is a number that something can be divided by."""
        return known_number(self.bandwidth)


@dataclass(frozen=True)
class Cause:
    """One reason.

    Attributes:
        kind: which.
        seconds: of a step that it costs; None where that cannot be told.
        numbers: what the page's sentence needs: bytes, rates, or words of the server.
    """

    kind: Kind
    seconds: float | None
    numbers: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"kind": self.kind, "seconds": self.seconds, **self.numbers}


def find_causes(facts: Facts) -> list[Cause]:
    """Return why a step takes as long as it does. Nothing is said of a model that did not run. Of one that does not
    stream only this is said: that its GPUs might work at the same time."""
    if not (facts.streamed or facts.together):
        return []
    if facts.loading:
        return [Cause("loading", None, {"staged": facts.staged})] if facts.streamed else []
    if facts.step is None or facts.waited is None or not (0 < facts.step < math.inf and 0 <= facts.waited < math.inf):
        return []
    part = facts.waited / facts.step
    turns = _turns(facts)
    if not facts.streamed:
        return [turns] if turns else []
    if part < LEAST_WAITING and not facts.synchronous:
        return [turns or Cause("compute", None, {"waiting": part})]
    checks = (_link, _slow_bus, _disk, _unpinned, _synchronous, _others, _limit, _unpacked)
    found = [cause for cause in (turns, *(check(facts) for check in checks)) if cause is not None]
    found.sort(key=lambda cause: -(cause.seconds or 0.0))
    # The last word: however fast the rest is, this much has to come over the bus.
    return [*found, _room(facts)]


def _seconds(nbytes: float, facts: Facts) -> float | None:
    """What it costs that so many bytes stream: no more than the step waits."""
    if facts.rate is None or facts.waited is None:
        return None
    return min(facts.waited, nbytes / facts.rate)


def _link(facts: Facts) -> Cause | None:
    link, card = facts.link, facts.card
    now, best = link.bytes_per_second, card.bytes_per_second
    if now is None or best is None or now >= MOST_OF_LINK * best:
        return None
    narrow = (link.width or 0) < (card.width or 0)
    lost = _seconds(facts.streamed * (1 - now / best), facts)
    return Cause("link", lost, {"link": str(link), "card": str(card), "narrow": narrow})


def _slow_bus(facts: Facts) -> Cause | None:
    """The link is as it should be, or not known, and yet less arrives."""
    rate = facts.link.bytes_per_second or facts.card.bytes_per_second
    if rate is None or facts.staged or facts.rate is None:
        return None
    usual = LEAST_OF_RATE * rate
    if facts.rate >= usual:
        return None
    lost = _seconds(facts.streamed * (1 - facts.rate / usual), facts)
    return Cause("slow_bus", lost, {"rate": facts.rate, "usual": usual})


def _is_disk(facts: Facts) -> bool:
    link = facts.link.bytes_per_second or facts.card.bytes_per_second or math.inf
    slow = min(DISK_BYTES_PER_SECOND, LEAST_OF_RATE * link)
    return bool(facts.staged) and facts.rate is not None and facts.rate < slow


def _disk(facts: Facts) -> Cause | None:
    if not _is_disk(facts):
        return None
    return Cause("disk", _seconds(facts.staged, facts), {"rate": facts.rate, "staged": facts.staged})


def _unpinned(facts: Facts) -> Cause | None:
    if not facts.staged:
        return None
    # About half of the rate of page-locked memory; where the disk is the reason, its own cause has the seconds.
    lost = None if _is_disk(facts) else _seconds(facts.staged / 2, facts)
    return Cause("unpinned", lost, {"staged": facts.staged, "why": facts.why_staged})


def _synchronous(facts: Facts) -> Cause | None:
    if not facts.synchronous:
        return None
    hidden = None
    if facts.rate is not None and (compute := known_number(facts.compute)) is not None:
        hidden = min(compute, facts.streamed / facts.rate)
    return Cause("synchronous", hidden, {"why": facts.why_synchronous})


def _others(facts: Facts) -> Cause | None:
    taken = (facts.others or 0) - USUAL_OTHERS
    if taken < LITTLE:
        return None
    gain = min(taken, facts.streamed)
    return Cause("others", _seconds(gain, facts), {"others": facts.others, "gain": gain})


def _limit(facts: Facts) -> Cause | None:
    spare = (facts.free or 0) - facts.headroom
    if facts.limit is None or facts.kept is None or spare < LITTLE:
        return None
    if facts.kept < min(MOST_OF_LIMIT * facts.limit, facts.limit - LITTLE):
        return None  # Something else keeps the model from more.
    gain = min(spare, facts.streamed)
    return Cause("limit", _seconds(gain, facts), {"limit": facts.limit, "gain": gain})


def _unpacked(facts: Facts) -> Cause | None:
    if not facts.why_unpacked:
        return None
    # bfloat16 weights shrink by about a third.
    return Cause("unpacked", _seconds(facts.streamed / 3, facts), {"why": facts.why_unpacked})


def _turns(facts: Facts) -> Cause | None:
    """GPUs compute one after the other, and would be faster at the same time."""
    found = facts.together
    if found is None or facts.step is None or found.seconds > WORTH * facts.step:
        return None
    numbers = {"together": found.seconds, "guidance": found.needs_guidance}
    return Cause("turns", facts.step - found.seconds, numbers)


def _room(facts: Facts) -> Cause:
    return Cause("room", facts.waited, {"streamed": facts.streamed, "total": facts.total})
