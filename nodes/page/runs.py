"""Which run of a streamed model counts: one that has ended, or one that is on, once it has settled."""

from __future__ import annotations

from ...streaming import Run, Snapshot
from ...streaming.run.averages import UNSETTLED_STEPS

# A model counts as running for so many seconds after it began a step: samplers do other work between two steps.
RUNNING_SECONDS = 2.0


def is_running(now: Snapshot) -> bool:
    return now.busy or (now.mode != "off" and now.idle_seconds < RUNNING_SECONDS)


def run_that_counts(now: Snapshot) -> Run:
    unsettled = is_running(now) and now.run.counters.steps <= UNSETTLED_STEPS
    return now.last_run if unsettled and now.last_run is not None else now.run
