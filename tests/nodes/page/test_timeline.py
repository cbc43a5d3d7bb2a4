"""What routes tell of single steps, of models that stream to one and to two virtual devices."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from sampling import MB, MODEL, sample, settle
from weightstream.nodes.model.patcher import StreamedModelPatcher
from weightstream.nodes.model.streamed_model import StreamedModel, streamed_models
from weightstream.nodes.page.timeline import describe_runs, describe_traces, trace_file, traces_of
from weightstream.nodes.twins.split import split_over
from weightstream.streaming import RunLog, StepRow

Load = Callable[..., StreamedModelPatcher]


def parts_of(model: StreamedModelPatcher) -> list[StreamedModel]:
    return [each for each in streamed_models() if each.number == model.streamed.number]


def test_a_recorded_step_has_lanes_with_what_ran(streamed: Load) -> None:
    model = streamed(24 * MB)
    assert describe_traces(traces_of(parts_of(model))) == []
    settle(model)
    (device,) = described = describe_traces(traces_of(parts_of(model)))
    assert json.loads(json.dumps(described)) == described
    assert (device["device"], device["step"], device["offset"]) == ("gpu:0", 2, 0.0)
    ran = [number for _, _, number in device["compute"]]
    assert ran == list(range(len(device["blocks"])))
    assert all(0 <= begin <= end <= device["seconds"] for begin, end, _ in device["compute"] + device["waits"])
    assert device["copied"] == sum(nbytes for _, _, nbytes in device["copies"]) > 0
    assert device["waited"] <= device["seconds"]


def test_a_step_is_shown_when_somebody_asks_and_gives_the_same_result(streamed: Load) -> None:
    model = streamed(24 * MB)
    settle(model)
    expected, (before,) = sample(model), describe_traces(traces_of(parts_of(model)))
    model.streamer.ask_for_trace()
    assert torch.equal(sample(model), expected)
    (after,) = describe_traces(traces_of(parts_of(model)))
    assert after["time"] > before["time"]
    assert after["step"] == 1


def test_two_devices_lie_side_by_side(loaded: StreamedModelPatcher) -> None:
    ours = split_over(loaded, [torch.device("cpu", 0), torch.device("cpu", 1)], "equal", None, None).patcher
    sample(ours, steps=4)
    devices = describe_traces(traces_of(parts_of(ours)))
    assert [device["device"] for device in devices] == ["gpu:0", "gpu:1"]
    assert min(device["offset"] for device in devices) == 0.0
    assert len({name for device in devices for name in device["blocks"]}) == sum(
        len(each["blocks"]) for each in devices
    )
    # Blocks take turns: whoever computes, the other does not.
    spans = sorted(
        (device["offset"] + begin, device["offset"] + end) for device in devices for begin, end, _ in device["compute"]
    )
    assert all(end <= begin + 1e-5 for (_, end), (begin, _) in pairwise(spans))
    file = trace_file(traces_of(parts_of(ours)), MODEL)
    names = [event["args"]["name"] for event in file["traceEvents"] if event["name"] == "process_name"]
    assert names == [f"gpu:0 {MODEL}", f"gpu:1 {MODEL}"]


def test_runs_are_told_step_by_step(streamed: Load) -> None:
    model = streamed(24 * MB)
    for steps in (3, 2, 4, 5):
        sample(model, steps=steps)
    runs = describe_runs(parts_of(model))
    assert json.loads(json.dumps(runs)) == runs
    assert [run["steps"] for run in runs] == [[1, 2], [1, 2, 3, 4], [1, 2, 3, 4, 5]]
    for run in runs:
        assert all(seconds > 0 for seconds in run["seconds"])
        assert all(rate > 0 for rate in run["rate"])
        assert all(0 <= part <= 1 for part in run["waiting"])
        assert len(run["steps"]) == len(run["seconds"]) == len(run["rate"]) == len(run["waiting"])


def models_with(*logs: Sequence[RunLog]) -> list[StreamedModel]:
    return [SimpleNamespace(streamer=SimpleNamespace(logged_runs=lambda log=log: list(log))) for log in logs]


def test_a_step_that_was_not_timed_shares_with_the_next() -> None:
    rows = StepRow(11, 2.0, 140, 1.0), StepRow(13, 2.0, 300, 3.0)
    (run,) = describe_runs(models_with([RunLog(4, StepRow(10, 0.0, 100, 0.0), rows)]))
    assert run == {"number": 4, "steps": [1, 3], "seconds": [2.0, 2.0], "rate": [20, 40], "waiting": [0.5, 0.5]}


def test_the_steps_of_two_devices_are_one() -> None:
    """The slower one tells how long, both copy, and a wait that is counted late is no more than the step."""
    nothing = StepRow(0, 0.0, 0, 0.0)
    one, other = RunLog(1, nothing, (StepRow(1, 2.0, 30, 0.5),)), RunLog(1, nothing, (StepRow(1, 1.0, 10, 9.0),))
    (run,) = describe_runs(models_with([one], [other]))
    assert (run["seconds"], run["rate"], run["waiting"]) == ([2.0], [20], [1.0])
    assert describe_runs(models_with([], [])) == []


@pytest.mark.parametrize("age", [0.5, 5.0])
def test_a_trace_of_an_earlier_run_is_not_shown_beside_another(loaded: StreamedModelPatcher, age: float) -> None:
    sample(loaded)
    (model,) = parts_of(loaded)
    trace = model.streamer.trace
    assert trace is not None
    began = trace.trace._replace(began=trace.trace.began - age, seconds=1.0)
    earlier = SimpleNamespace(gpu="gpu:1", streamer=SimpleNamespace(trace=trace._replace(trace=began)))
    shown = traces_of([SimpleNamespace(gpu="gpu:0", streamer=SimpleNamespace(trace=trace)), earlier])
    assert len(shown) == (2 if age < 1 else 1)
