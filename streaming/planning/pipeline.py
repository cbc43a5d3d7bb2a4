"""How long a step takes when copies and compute overlap: a simulation of the rings of one or several devices. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# Steps that are simulated before one is timed: the end of each prefetches the start of the next.
WARM_UP_STEPS = 2


class Stage(NamedTuple):
    """A segment's part in a step, in seconds.

    Attributes:
        copy: the transfer.
        hold: compute from the moment when it is needed until its memory is free.
        work: compute from the moment when it is needed until the next segment is needed.
        link: number of the link that brings it; each link carries one copy at a time.
    """

    copy: float
    hold: float
    work: float
    link: int = 0


def step_seconds(stages: Sequence[Stage], waits: Sequence[int], lead: float) -> float:
    """Return the seconds of one step among many equal ones.

    A copy starts when the previous copy on its link is done and its memory is free. A segment's compute starts when its
    copy and the compute before it are done.

    Args:
        stages: segments in the order of need; at least one.
        waits: for each segment the index of the one whose memory it reuses (ring_layout.py, ``waited_for``).
        lead: seconds of compute between the begin of a step and its first segment.
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
