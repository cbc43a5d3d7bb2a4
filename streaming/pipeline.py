"""How long a step takes when copies and compute overlap: a simulation of the ring. Pure."""

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
    """

    copy: float
    hold: float
    work: float


def step_seconds(stages: Sequence[Stage], waits: Sequence[int], lead: float) -> float:
    """The time of one step among many like it.

    A copy starts when the one before it is done and its memory is free; a segment's compute starts when its copy is
    done and the compute before it is.

    Args:
        stages: segments in the order of need; at least one.
        waits: for each the one whose memory it gets (ring_layout.py, ``waited_for``).
        lead: compute between the begin of a step and its first segment.
    """
    free = [0.0] * len(stages)
    copied = now = begin = 0.0
    for _ in range(WARM_UP_STEPS + 1):
        begin = now
        now += lead
        for number, (copy, hold, work) in enumerate(stages):
            copied = max(copied, free[waits[number]]) + copy
            now = max(now, copied)
            free[number] = now + hold
            now += work
    return now - begin
