"""How long a step takes when copies and compute overlap: a simulation of the rings of one or several devices. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# Steps that are simulated before one is timed: the end of each prefetches the start of the next.
WARM_UP_STEPS = 2


class Stage(NamedTuple):
    """A segment's part in a step, in seconds.

    Attributes:
        copy: its transfer.
        hold: compute from its need until its memory is free.
        work: compute from its need until the next segment is needed.
        link: over which it is copied; one copy at a time goes over each.
    """

    copy: float
    hold: float
    work: float
    link: int = 0


def step_seconds(stages: Sequence[Stage], waits: Sequence[int], lead: float) -> float:
    """The time of one step among many like it.

    A copy starts when the one before it on its link is done and its memory is free; a segment's compute starts when its
    copy is done and the compute before it is.

    Args:
        stages: segments in the order of need; at least one.
        waits: for each the one whose memory it gets (ring_layout.py, ``waited_for``).
        lead: compute between the begin of a step and its first segment.
    """
    free = [0.0] * len(stages)
    copied = [0.0] * (1 + max(stage.link for stage in stages))
    now = begin = 0.0
    for _ in range(WARM_UP_STEPS + 1):
        begin = now
        now += lead
        for number, (copy, hold, work, link) in enumerate(stages):
            arrives = copied[link] = max(copied[link], free[waits[number]]) + copy
            now = max(now, arrives)
            free[number] = now + hold
            now += work
    return now - begin
