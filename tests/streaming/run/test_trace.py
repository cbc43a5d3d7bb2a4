"""What a recorded step shows, in time that passes only as copies and kernels say, and on a virtual device."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from models import X, make_transformer
from virtual_time import Clock, TimedBackend, TimedModel
from weightstream.streaming import (
    CpuBackend,
    Group,
    NamedTrace,
    Streamer,
    StreamingConfig,
    VirtualMemory,
    chrome_trace,
    cut_model,
)
from weightstream.streaming.devices.copies import CopyTime, Unpacking
from weightstream.streaming.run.trace import LANES, Span, StepTrace, copy_spans, wait_spans

# Four blocks of 4 KB, 1 s of compute each, behind a link that brings one in 2 s.
BYTES, COMPUTE, BANDWIDTH = 4096, 1.0, 2048.0


class Timed:
    """Such a model on one device, of which two blocks have room."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.model = TimedModel(self.clock, [[(BYTES, COMPUTE, COMPUTE)]] * 4, [0] * 4, 0.0, 0.5)
        config = StreamingConfig(staging_bytes=BYTES, segment_bytes=BYTES, headroom_bytes=0, adaptive=False)
        self.group = Group()
        backend = TimedBackend(self.clock, 0, BANDWIDTH)
        self.streamer = Streamer(self.model, cut_model(self.model), backend, config, group=self.group)
        self.load()

    def load(self) -> None:
        self.streamer.load(self.streamer.plan_for(3 * BYTES))
        self.streamer.begin_run()

    def step(self) -> float:
        """What the step took, without what the device still had to do before it."""
        took: list[float] = []

        def forward() -> None:
            begin = self.clock.now
            self.model()
            took.append(self.clock.now - begin)

        self.streamer.run(forward)
        return took[-1]


@pytest.fixture
def timed() -> Timed:
    return Timed()


def shown(streamer: Streamer) -> StepTrace:
    assert streamer.trace is not None
    return streamer.trace.trace


def test_nothing_is_shown_before_a_step_was_recorded(timed: Timed) -> None:
    assert timed.streamer.trace is None
    timed.step()
    assert timed.streamer.trace is None  # The step may not be over on the device.


def test_a_measured_step_is_shown_with_its_waits_where_they_were(timed: Timed) -> None:
    took = [timed.step() for _ in range(3)]
    trace = shown(timed.streamer)
    assert trace.step == 2
    assert trace.seconds == pytest.approx(took[1])
    assert [span.value for span in trace.compute] == [0, 1, 2, 3]
    assert trace.waited == pytest.approx(trace.seconds - 4 * COMPUTE - 0.5)
    assert trace.waited > 0
    # A wait ends when a copy does, and compute goes on then.
    ends = [span.end for span in trace.copies]
    assert all(any(end == pytest.approx(wait.end) for end in ends) for wait in trace.waits)
    assert all(span.seconds == pytest.approx(span.value / BANDWIDTH) for span in trace.copies)


def test_waits_before_whole_blocks_are_shown(timed: Timed) -> None:
    """In the first step blocks stream as a whole, and are waited for before they begin."""
    took = [timed.step() for _ in range(2)]
    trace = shown(timed.streamer)
    assert trace.step == 1
    assert 0 < trace.waited == pytest.approx(took[0] - 4 * COMPUTE - 0.5)


def test_a_step_that_somebody_asks_for_is_shown_and_teaches_nothing(timed: Timed) -> None:
    for _ in range(5):
        timed.step()
    profile, plan, before = timed.streamer.profile, timed.streamer.plan, shown(timed.streamer)
    assert timed.streamer.ask_for_trace()
    took = timed.step()
    timed.step()
    trace = shown(timed.streamer)
    assert (before.step, trace.step) == (2, 6)
    assert trace.seconds == pytest.approx(took)
    assert trace.compute
    assert timed.streamer.profile is profile
    assert timed.streamer.plan is plan
    timed.step()
    assert shown(timed.streamer) is trace


def test_hooks_that_record_go_when_the_step_was_shown(timed: Timed) -> None:
    def hooks() -> int:
        return sum(len(module._forward_pre_hooks) for module in timed.model.modules())

    for _ in range(5):
        timed.step()
    before = hooks()
    timed.streamer.ask_for_trace()
    timed.step()
    assert hooks() > before
    timed.step()
    assert hooks() == before
    assert timed.group.listeners == []


def test_a_step_that_fails_is_not_shown_and_leaves_no_recorder(timed: Timed) -> None:
    for _ in range(4):
        timed.step()
    before = shown(timed.streamer)
    timed.streamer.ask_for_trace()

    def fail(*_: object) -> None:
        raise ValueError("this block fails")

    handle = timed.model.blocks[2].register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="this block fails"):
        timed.step()
    handle.remove()
    timed.step()
    timed.step()
    assert shown(timed.streamer) is before
    assert timed.group.listeners == []


def test_a_compiled_model_is_not_recorded_to_be_shown(timed: Timed) -> None:
    for _ in range(4):
        timed.step()
    timed.streamer.expect_compiled(True)
    for _ in range(4):
        timed.step()
    before = shown(timed.streamer)
    assert not timed.streamer.ask_for_trace()
    timed.step()
    timed.step()
    assert shown(timed.streamer) is before


def test_the_parts_of_a_model_show_the_same_step() -> None:
    """Each of two devices has its lanes, and what the host's clock says when its step began."""
    model = make_transformer(depth=4)
    expected, group = model(X), Group()
    blocks, config = cut_model(model), StreamingConfig(headroom_bytes=0, adaptive=False)
    parts = blocks.part({0, 1}, with_outside=True), blocks.part({2, 3}, with_outside=False)
    backends = [CpuBackend(VirtualMemory(10**9, f"virtual:{index}")) for index in range(2)]
    streamers = [
        Streamer(model, part, backend, config, group=group) for part, backend in zip(parts, backends, strict=True)
    ]
    for streamer in streamers:
        streamer.load(streamer.plan_for(streamer.minimum_bytes))
    for _ in range(4):
        output = streamers[0].run(lambda: streamers[1].run(lambda: model(X)))
        assert torch.equal(output, expected)
    traces = [shown(streamer) for streamer in streamers]
    assert [len(trace.compute) for trace in traces] == [2, 2]
    assert max(trace.began for trace in traces) < min(trace.began + trace.seconds for trace in traces)
    assert [named.device for named in (streamers[0].trace, streamers[1].trace)] == ["virtual:0", "virtual:1"]


def test_waits_that_took_no_time_and_unpacking_are_no_waits() -> None:
    seconds = lambda begin, end: end - begin  # noqa: E731
    stalls = [lambda: 0.0, partial(seconds, 3.0, 5.0), partial(seconds, 1.0, 1.0), Unpacking(seconds, 2.0, 2.5)]
    assert wait_spans(stalls, lambda moment: moment - 1) == (Span(2.0, 4.0),)
    assert wait_spans(stalls, lambda moment: moment - 1, unpacking=True) == (Span(1.0, 1.5),)


def test_copies_of_other_steps_are_left_out() -> None:
    times = [CopyTime(1, 8.0, 9.0), CopyTime(2, 9.5, 11.0), CopyTime(3, 12.0, 13.0), CopyTime(4, 15.0, 16.0)]
    assert copy_spans(times, lambda moment: moment - 10, 5.0) == (Span(-0.5, 1.0, 2), Span(2.0, 3.0, 3))


def test_the_file_has_a_process_for_each_device_and_a_thread_for_each_lane() -> None:
    one = StepTrace(2, 0.0, 100.0, 1.0, (Span(0.0, 0.5, 1),), (Span(0.1, 0.2),), (Span(0.2, 0.25),), ())
    other = one._replace(began=100.25, waits=(), unpacking=(), copies=(Span(0.5, 0.75, 32_000_000),))
    file = chrome_trace([NamedTrace("gpu:0", ["a", "b"], one), NamedTrace("gpu:1", ["a"], other)], "flux")
    assert json.loads(json.dumps(file)) == file
    events = file["traceEvents"]
    processes = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    threads = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert processes == {1: "gpu:0 flux", 2: "gpu:1 flux"}
    assert list(threads.values()) == list(LANES)
    spans = [
        (event["pid"], threads[event["tid"]], event["name"], event["ts"], event["dur"])
        for event in events
        if event["ph"] == "X"
    ]
    assert spans == [
        (1, "compute", "b", 0.0, 500_000.0),
        (1, "waits", "wait", 100_000.0, 100_000.0),
        (1, "unpacking", "unpack", 200_000.0, 50_000.0),
        (2, "compute", "block 1", 250_000.0, 500_000.0),
        (2, "copies", "30.5 MiB", 750_000.0, 250_000.0),
    ]
