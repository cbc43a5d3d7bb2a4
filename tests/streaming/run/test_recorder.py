"""What a recorded step says, with a clock that the test moves."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
from outlines import make_outline
from weightstream.streaming.devices.copies import CopyTime
from weightstream.streaming.planning.profile import assumed_profile
from weightstream.streaming.planning.timeline import timeline
from weightstream.streaming.run import recorder as recorder_file
from weightstream.streaming.run.recorder import Recorder
from weightstream.streaming.split.assignment import HOP_SECONDS


class Clock:
    """A device that is where the test says."""

    is_virtual = False

    def __init__(self) -> None:
        self.now = 0.0
        self.copies: list[CopyTime] = []

    def moment(self) -> float:
        return self.now

    def seconds(self, begin: float, end: float) -> float:
        return end - begin

    def hold_back(self, seconds: float) -> None:
        self.now += seconds

    def synchronize(self) -> None:
        """Everything is over."""

    def time_copies(self) -> None:
        """No copies are timed."""

    def copy_times(self) -> list[CopyTime]:
        return self.copies


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def recorder(clock: Clock) -> Recorder:
    return Recorder(make_outline([[1], [1], [1]]), clock, SimpleNamespace(step_bytes=0, step_seconds=0.0, sent_bytes=0))


def wait(recorder: Recorder, clock: Clock, seconds: float) -> None:
    clock.now += seconds
    recorder.stalled(clock, lambda: seconds)


def record(recorder: Recorder, clock: Clock, gaps: list[float], waits: list[float]) -> None:
    """Blocks of one second each, behind such gaps of compute, in which others wait for so long."""
    recorder.begin_step()
    for block, (gap, waited) in enumerate(zip(gaps, waits, strict=True)):
        clock.now += gap
        wait(recorder, clock, waited)
        recorder.begin_block(block)
        recorder.begin_unit(block)
        wait(recorder, clock, 5.0)
        clock.now += 1.0
        recorder.end_unit(block)
        recorder.end_block(block)
    clock.now += 0.25
    wait(recorder, clock, 3.0)
    recorder.end_step()


@pytest.mark.parametrize(
    ("takes", "virtual", "read", "other", "late"),
    [
        (45.3, False, 0, False, True),
        (40.8, False, 0, False, True),
        (40.6, False, 0, False, False),
        (45.3, True, 0, False, False),
        (45.3, False, 1, False, False),
        (45.3, False, 0, True, False),
    ],
)
def test_a_host_is_late_that_needs_as_long_as_the_step(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, takes: float, virtual: bool, read: int, other: bool, late: bool
) -> None:
    """On a virtual device, or where the host waits for reads or for turns of others, that says nothing."""
    host = iter((100.0, 100.0 + takes))
    monkeypatch.setattr(recorder_file, "perf_counter", lambda: next(host))
    clock.is_virtual = virtual
    reader = SimpleNamespace(step_bytes=0, step_seconds=0.0, sent_bytes=0)
    recorder = Recorder(make_outline([[1], [1], [1]]), clock, reader)
    own = recorder.begin_block

    def begin_block(block: int) -> None:
        reader.step_bytes += read
        if other:
            recorder.computed(Clock(), lambda: 1.0)
        own(block)

    recorder.begin_block = begin_block
    record(recorder, clock, [2.0, 2.0, 2.0], [7.0, 0.0, 11.0])
    assert clock.now == 45.25
    assert recorder.host_was_late is late


def test_what_others_wait_for_is_no_compute(recorder: Recorder, clock: Clock) -> None:
    record(recorder, clock, [2.0, 2.0, 2.0], [7.0, 0.0, 11.0])
    profile = recorder.profile(assumed_profile(recorder._outline), with_times=True)
    assert profile.block_seconds == (1.0, 1.0, 1.0)
    assert profile.gap_seconds == (2.0, 2.0, 2.0)
    assert profile.other_seconds == 6.25
    assert profile.compute_seconds == 9.25


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_head_start_of_the_host_is_a_wait_before_the_first_block_of_all(clock: Clock, elsewhere: bool) -> None:
    """Where a block has run on another device, that one has waited."""
    reader = SimpleNamespace(step_bytes=0, step_seconds=0.0, sent_bytes=0)
    recorder = Recorder(make_outline([[1], [1], [1]]), clock, reader, head_start=100.0)
    if elsewhere:
        stalled = recorder.stalled
        recorder.stalled = lambda *told: (stalled(*told), recorder.computed(Clock(), lambda: 0.0))
    record(recorder, clock, [2.0, 2.0, 2.0], [7.0, 0.0, 11.0])
    assert clock.now == (45.25 if elsewhere else 145.25)
    profile = recorder.profile(assumed_profile(recorder._outline), with_times=True)
    assert profile.block_seconds == (1.0, 1.0, 1.0)
    if not elsewhere:
        assert profile.compute_seconds == 9.25


def test_a_unit_is_needed_after_what_comes_before_its_block(recorder: Recorder, clock: Clock) -> None:
    record(recorder, clock, [1.0, 4.0, 4.0], [0.0] * 3)
    profile = recorder.profile(assumed_profile(recorder._outline), with_times=True)
    assert profile.compute_seconds == 12.25
    # What comes last is as good as first: one step follows another.
    assert [moment.begin for moment in timeline(recorder._outline, profile)] == [1.25, 6.25, 11.25]


def test_residents_that_come_in_a_step_are_none_of_what_it_stages() -> None:
    """The reader has brought 4 MB for the step in 2 s, and residents of 16 MB; copies alone pass 100 MB a second."""
    clock = Clock()
    reader = SimpleNamespace(step_bytes=0, step_seconds=0.0, sent_bytes=0)
    recorder = Recorder(make_outline([[1], [1], [1]]), clock, reader)
    recorder.begin_step()
    reader.step_bytes, reader.step_seconds, reader.sent_bytes = 4_000_000, 2.0, 20_000_000
    recorder.end_step()
    clock.copies = [CopyTime(5_000_000, 0.0, 0.05)] * 4
    assert recorder.profile(assumed_profile(recorder._outline), with_times=True).bandwidth == pytest.approx(2_000_000)


def test_a_second_step_begins_anew(recorder: Recorder, clock: Clock) -> None:
    record(recorder, clock, [9.0, 9.0, 9.0], [1.0, 1.0, 1.0])
    record(recorder, clock, [2.0, 2.0, 2.0], [0.0] * 3)
    profile = recorder.profile(assumed_profile(recorder._outline), with_times=True)
    assert profile.gap_seconds == (2.0, 2.0, 2.0)


def test_what_other_devices_compute_is_known_without_their_waits_and_the_hosts(clock: Clock) -> None:
    """Two devices take turns, each block computes for one second, and whatever else passes is nobody's compute."""
    recorders: list[Recorder] = []
    clocks = [Clock(), Clock()]
    reader = SimpleNamespace(step_bytes=0, step_seconds=0.0, sent_bytes=0)

    def tell(device: Clock, seconds: Callable[[], float]) -> None:
        for recorder in recorders:
            recorder.computed(device, seconds)

    for one in clocks:
        recorders.append(Recorder(make_outline([[1], [1]]), one, reader, lambda: tell))

    def pass_by(seconds: float) -> None:
        for one in clocks:
            one.now += seconds

    for recorder in recorders:
        recorder.begin_step()
    for turn in range(4):
        recorder = recorders[turn % 2]
        pass_by(3.0)  # The host is late.
        recorder.begin_block(turn // 2)
        recorder.begin_unit(turn // 2)
        pass_by(7.0)
        for one in recorders:
            one.stalled(clocks[turn % 2], lambda: 7.0)
        pass_by(1.0)
        recorder.end_unit(turn // 2)
        recorder.end_block(turn // 2)
    for recorder in recorders:
        recorder.end_step()
    profiles = [recorder.profile(assumed_profile(make_outline([[1], [1]])), with_times=True) for recorder in recorders]
    there_and_back = 1.0 + 2 * HOP_SECONDS
    for profile in profiles:
        assert profile.block_seconds == (1.0, 1.0)
    assert profiles[0].gap_seconds == pytest.approx((3.0, there_and_back))
    assert profiles[1].gap_seconds == pytest.approx((there_and_back, there_and_back))
    assert profiles[0].compute_seconds == pytest.approx(2.0 + 3.0 + 2 * there_and_back)
    assert profiles[1].compute_seconds == pytest.approx(2.0 + 2 * there_and_back)
