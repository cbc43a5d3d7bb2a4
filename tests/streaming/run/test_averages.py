"""The average of a run: without its first two steps where there are more."""

from __future__ import annotations

import pytest
from weightstream.streaming import RunLog, StepRow
from weightstream.streaming.run.averages import Average, TimedStep, average, timed_steps, together

# The first two read the file.
SECONDS = (9.0, 5.0, 1.0, 3.0)


def run_of(steps: int) -> RunLog:
    """Each step copies 6 bytes and waits for half of its time."""
    rows, copied, waited = [], 100, 1.0
    for number, seconds in enumerate(SECONDS[:steps], 1):
        copied, waited = copied + 6, waited + seconds / 2
        rows.append(StepRow(20 + number, seconds, copied, waited))
    return RunLog(2, StepRow(20, 0.0, 100, 1.0), tuple(rows))


@pytest.mark.parametrize(
    ("steps", "seconds", "rate"), [(1, 9.0, 6 / 9), (2, 7.0, (6 / 9 + 6 / 5) / 2), (3, 1.0, 6.0), (4, 2.0, 4.0)]
)
def test_the_first_two_count_only_where_there_are_no_others(steps: int, seconds: float, rate: float) -> None:
    assert average(timed_steps(run_of(steps))) == pytest.approx(Average(seconds, rate, 0.5))


def test_without_steps_there_is_none() -> None:
    assert average(timed_steps(run_of(0))) is None


def test_where_none_of_the_others_was_timed_the_first_ones_count() -> None:
    assert average({2: TimedStep(2.0, 4.0, 1.0)}) == Average(2.0, 2.0, 0.5)


def test_a_step_on_two_devices_is_one() -> None:
    assert together([TimedStep(2.0, 30, 0.5), TimedStep(1.0, 10, 9.0)]) == TimedStep(2.0, 40, 9.0)
    assert TimedStep(2.0, 40, 9.0).waiting == 1.0
    assert (TimedStep(0.0, 0, 0.0).rate, TimedStep(0.0, 0, 0.0).waiting) == (0.0, 0.0)
