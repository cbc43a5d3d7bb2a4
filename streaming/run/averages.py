"""What the steps of a run took, and their average: one definition for all who tell of a run.

[Note: the average of a run]
The first two steps of a run read the file, load kernels and are measured, and the plan is made for the third: they say
little of the others. So they are left out wherever there are more. A run of four steps has two that count; one of two
has its own two, because nothing else is known of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple

from .step_log import RunLog

UNSETTLED_STEPS = 2


class TimedStep(NamedTuple):
    """A step on one device: seconds, bytes that were copied, and seconds for which compute waited."""

    seconds: float
    copied: float
    waited: float

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.copied / self.seconds if self.seconds else 0.0

    @property
    def waiting(self) -> float:
        """The part of the step for which it waited; waits are counted late, so they may come to more."""
        return min(1.0, self.waited / self.seconds) if self.seconds else 0.0


class Average(NamedTuple):
    """Of the steps that count (Note: the average of a run): seconds, bytes per second, and the part of waiting."""

    seconds: float
    rate: float
    waiting: float


def timed_steps(run: RunLog) -> dict[int, TimedStep]:
    """The steps of a run by number, from 1. Of those that were not timed the next one has a share."""
    found = {}
    for before, row in pairwise((run.before, *run.rows)):
        count = max(1, row.steps - before.steps)
        copied = (row.streamed_bytes - before.streamed_bytes) / count
        waited = (row.stall_seconds - before.stall_seconds) / count
        found[row.steps - run.before.steps] = TimedStep(row.seconds, copied, waited)
    return found


def together(shares: Iterable[TimedStep]) -> TimedStep:
    """A step on several devices: the slowest tells how long, and who waits most what is waited for."""
    seconds, copied, waited = zip(*shares, strict=True)
    return TimedStep(max(seconds), sum(copied), max(waited))


def average(steps: dict[int, TimedStep]) -> Average | None:
    """The average of steps by number; None without any."""
    if not steps:
        return None
    counted = [step for number, step in steps.items() if number > UNSETTLED_STEPS] or list(steps.values())
    return Average(
        fmean(step.seconds for step in counted),
        fmean(step.rate for step in counted),
        fmean(step.waiting for step in counted),
    )
