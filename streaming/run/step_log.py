"""What each step of the last runs took: a row for each step, made once the step is over."""

from __future__ import annotations

from typing import NamedTuple

MOST_RUNS = 3
# A longer run loses its oldest steps.
MOST_ROWS = 512


class StepRow(NamedTuple):
    """A step that was timed, and totals of the model at its end.

    Attributes:
        steps: whole steps so far.
        seconds: how long this one took.
        streamed_bytes, stall_seconds: as :class:`.telemetry.Counters` has them. A row may follow on several steps, of
            which some were not timed; what they copied and waited for is in the difference of two rows.
    """

    steps: int
    seconds: float
    streamed_bytes: int
    stall_seconds: float


class RunLog(NamedTuple):
    """A run, and its steps. ``before`` holds the totals with which it began; no step belongs to it."""

    number: int
    before: StepRow
    rows: tuple[StepRow, ...]


class StepLog:
    """The rows of the last runs. One thread writes; any thread may read."""

    def __init__(self) -> None:
        self._runs: list[tuple[int, StepRow, list[StepRow]]] = []

    def begin_run(self, number: int, totals: StepRow) -> None:
        """Rows belong to another run from now on. A run without steps leaves nothing."""
        kept = [run for run in self._runs if run[2]]
        self._runs = [*kept[-(MOST_RUNS - 1) :], (number, totals, [])]

    def add(self, row: StepRow) -> None:
        if not self._runs:
            return  # Nobody has begun a run: whoever streams without one asks for no log.
        rows = self._runs[-1][2]
        rows.append(row)
        if len(rows) > MOST_ROWS:
            del rows[0]

    def runs(self, latest: StepRow | None = None) -> list[RunLog]:
        """Return the runs that have steps, the oldest first; ``latest`` is a row that was not added yet."""
        found = [RunLog(number, before, tuple(rows)) for number, before, rows in self._runs]
        # Another thread may have added it meanwhile.
        if found and latest is not None and (not found[-1].rows or found[-1].rows[-1].steps < latest.steps):
            found[-1] = found[-1]._replace(rows=(*found[-1].rows, latest))
        return [run for run in found if run.rows]
