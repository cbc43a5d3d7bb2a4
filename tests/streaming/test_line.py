"""The state of a model in one line: what a step takes, what it waits for, and what more memory would bring."""

from __future__ import annotations

from dataclasses import replace

import pytest
from weightstream.streaming import Counters, Line, Run, Snapshot

GIB = 1 << 30


def part(**changes: object) -> Snapshot:
    """FLUX in 8 GiB, measured on a bus that is too slow for it."""
    run = Run(Counters(), None)
    values = dict.fromkeys(Snapshot.__dataclass_fields__, 0)
    values |= dict.fromkeys(("explain", "note", "why_unpacked"), "")
    measured = Snapshot(**{**values, "run": run, "last_run": None, "counters": Counters()})  # type: ignore[arg-type]
    usual = {
        "device": "gpu:0",
        "mode": "streamed",
        "building": False,
        "resident_bytes": 6 * GIB,
        "rest_bytes": GIB,
        "streamed_weight_bytes": 16 * GIB,
        "predicted_step_seconds": 0.324,
        "compute_seconds": 0.177,
        "more_bytes": 8 * GIB,
        "more_seconds": 0.178,
        "limited_by": "bus",
    }
    return replace(measured, **{**usual, **changes})  # type: ignore[arg-type]


def test_what_a_step_waits_for_and_what_memory_would_bring() -> None:
    assert str(Line.of([part()])) == "0.32 s/step · 45 % waiting for the bus · +8.0 GiB VRAM → 0.18 s"


@pytest.mark.parametrize(("seconds", "said"), [(0.1771, False), (0.1824, False), (0.183, True)])
def test_who_waits_for_less_than_3_percent_is_told_of_no_limit(seconds: float, said: bool) -> None:
    line = Line.of([part(predicted_step_seconds=seconds)])
    assert ("waiting for the bus · +8.0 GiB VRAM" in str(line)) is said
    assert ("hardly any waiting for the bus" in str(line)) is not said
    assert (line.waiting is not None) is (line.more_bytes > 0) is said


def test_before_a_step_was_measured_it_says_what_stays() -> None:
    unmeasured = {"predicted_step_seconds": None, "compute_seconds": None, "more_bytes": 0, "limited_by": ""}
    assert str(Line.of([part(**unmeasured)])) == "7.0 GiB of 23.0 GiB stay in VRAM"
    assert str(Line.of([part(**unmeasured, mode="resident", streamed_weight_bytes=0)])) == "all 7.0 GiB in VRAM"
    assert str(Line.of([])) == str(Line.of([part(mode="off")])) == "not loaded"


def test_a_whole_model_is_in_vram() -> None:
    resident = part(mode="resident", streamed_weight_bytes=0, predicted_step_seconds=12.4, more_bytes=0)
    assert str(Line.of([resident])) == "12 s/step · all 7.0 GiB in VRAM"


def test_devices_that_work_at_the_same_time_are_told_with_the_figures_of_one() -> None:
    """Each has the whole model: the one that keeps least tells what stays, the slowest how long a step takes."""
    whole = {"mode": "resident", "resident_bytes": 22 * GIB, "streamed_weight_bytes": 0, "more_bytes": 0}
    full = part(**whole, predicted_step_seconds=0.2)
    line = Line.of([full, part(device="gpu:1")], parallel=True)
    assert (line.kept_bytes, line.total_bytes, line.seconds) == (7 * GIB, 23 * GIB, 0.324)
    assert str(line).endswith(" VRAM on gpu:1 → 0.18 s · gpu:0 and gpu:1 at the same time")
    both = Line.of([full, replace(full, device="gpu:1")], parallel=True)
    assert str(both) == "0.2 s/step · all 23.0 GiB in VRAM · gpu:0 and gpu:1 at the same time"
    alone = Line.of([full, part(device="gpu:1", mode="off")], parallel=True)
    assert not alone.parallel


def test_what_is_not_as_it_could_be_is_told() -> None:
    staged = part(staged_bytes=3 * GIB, mode="synchronous")
    assert str(Line.of([staged])).endswith("0.18 s · 3.0 GiB not page-locked · copied when needed")
    assert "page-locked" not in str(Line.of([replace(staged, building=True)])), "it will be in a moment"


def test_the_devices_of_a_model_have_one_line() -> None:
    """Every part expects the whole step; the device is named to which more memory would bring most."""
    other = part(device="gpu:1", more_bytes=2 * GIB, more_seconds=0.17, predicted_step_seconds=0.33)
    line = Line.of([part(), other, part(device="gpu:2", mode="off")])
    assert str(line) == "0.33 s/step · 46 % waiting for the bus · +2.0 GiB VRAM on gpu:1 → 0.17 s · gpu:0, gpu:1"
    assert (line.kept_bytes, line.total_bytes) == (14 * GIB, 46 * GIB)


def test_one_device_that_was_not_measured_leaves_the_step_open() -> None:
    fresh = part(device="gpu:1", predicted_step_seconds=None, compute_seconds=None, more_bytes=0)
    assert str(Line.of([part(), fresh])) == "14.0 GiB of 46.0 GiB stay in VRAM · gpu:0, gpu:1"


def test_of_a_run_that_has_ended_it_says_what_was_measured() -> None:
    ran = part(run=Run(Counters(), 0.25, 8e9, 0.4))
    assert str(Line.of([ran])).startswith("0.32 s/step · 45 % waiting")
    assert str(Line.of([ran], ended=True)) == "0.25 s/step · 40 % waiting for the bus · +8.0 GiB VRAM → 0.18 s"
    slower = replace(ran, device="gpu:1", run=Run(Counters(), 0.26, 8e9, 0.1), more_bytes=0)
    assert str(Line.of([ran, slower], ended=True)).startswith("0.26 s/step · 40 % waiting")
    assert str(Line.of([part()], ended=True)) == str(Line.of([part()])), "nothing was measured in it"


def test_memory_that_would_not_make_it_faster_is_not_told() -> None:
    fast = part(run=Run(Counters(), 0.17, 8e9, 0.1))
    assert str(Line.of([fast], ended=True)) == "0.17 s/step · 10 % waiting for the bus"
