"""The rows of steps, by run."""

from __future__ import annotations

import pytest
from models import X, make_streamer, make_transformer
from weightstream.streaming import RunLog, StepRow
from weightstream.streaming.run import step_log
from weightstream.streaming.run.step_log import StepLog
from weightstream.streaming.run.telemetry import Counters, Meters

NOTHING = StepRow(0, 0.0, 0, 0.0)


def row(steps: int) -> StepRow:
    return StepRow(steps, 1.0, 10 * steps, 0.1 * steps)


def test_the_last_runs_with_steps_are_kept() -> None:
    log = StepLog()
    for number in range(1, 6):
        log.begin_run(number, NOTHING)
        if number != 4:
            log.add(row(number))
    assert [(run.number, run.rows) for run in log.runs()] == [(number, (row(number),)) for number in (2, 3, 5)]


def test_a_row_that_is_not_added_yet_is_there_once(monkeypatch: pytest.MonkeyPatch) -> None:
    log = StepLog()
    log.begin_run(1, NOTHING)
    assert log.runs(row(1)) == [RunLog(1, NOTHING, (row(1),))]
    log.add(row(1))
    assert log.runs(row(1)) == [RunLog(1, NOTHING, (row(1),))]
    monkeypatch.setattr(step_log, "MOST_ROWS", 2)
    log.add(row(2))
    log.add(row(3))
    assert log.runs()[0].rows == (row(2), row(3))


def test_steps_are_logged_with_what_they_copied() -> None:
    model = make_transformer()
    streamer = make_streamer(model, adaptive=False)
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    for steps in (4, 2):
        streamer.begin_run()
        for _ in range(steps):
            streamer.run(lambda: model(X))
    first, second = streamer.logged_runs()
    assert [each.steps for each in (*first.rows, *second.rows)] == [1, 2, 3, 4, 5, 6]
    assert (first.number, second.number) == (1, 2)
    assert second.before.steps == 4
    assert all(each.seconds > 0 for each in second.rows)
    totals = [each.streamed_bytes for each in (second.before, *second.rows)]
    assert totals == sorted(set(totals))
    assert totals[-1] <= streamer.counters.streamed_bytes


def test_the_log_outlives_a_change_of_settings() -> None:
    model = make_transformer()
    streamer = make_streamer(model, adaptive=False)
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    streamer.begin_run()
    streamer.run(lambda: model(X))
    streamer.run(lambda: model(X))
    before = [each.rows[:1] for each in streamer.logged_runs()]
    streamer.configure(type(streamer.config)(copy_streams=0))
    assert [each.rows[:1] for each in streamer.logged_runs()] == before


class LateDevice:
    """A device that has got nowhere until it is told."""

    over = False

    def moment(self) -> float:
        return 0.0

    def seconds(self, begin: float, end: float) -> float | None:
        return 2.0 if self.over else None


def test_a_row_has_the_waits_of_its_step_though_the_device_got_there_late() -> None:
    device, counters = LateDevice(), Counters()
    meters = Meters(device, counters, [])
    meters.step.begin_run()
    meters.begin_step()
    meters.stalls.add(lambda: device.seconds(0.0, 0.0))
    meters.step.end(completed=True)
    meters.stalls.collect()
    counters.steps += 1
    assert meters.step.runs() == []
    device.over = True
    meters.begin_step()
    (run,) = meters.step.runs()
    assert run.rows == (StepRow(1, 2.0, 0, 2.0),)
