"""What routes tell of single steps: one that was recorded as lanes of spans, and a row of each step of the last runs.

A model that is split over devices has a trace on each, and each counts what it copies and waits for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ...streaming import NamedTrace, RunLog, StepTrace, chrome_trace
from ...streaming.run.averages import TimedStep, timed_steps, together
from ..model.streamed_model import StreamedModel

# Microseconds are as fine as a picture can show.
DIGITS = 6


def traces_of(models: Sequence[StreamedModel]) -> list[NamedTrace]:
    """The step that was recorded last, on each device of a model, by the names of nodes; empty before there is one.

    A part of which the last one is of another run is left out: their spans do not lie side by side.
    """
    named = [(model.gpu, trace) for model in models if (trace := model.streamer.trace) is not None]
    found = [trace._replace(device=device) for device, trace in named]
    latest = max((each.trace.began for each in found), default=0.0)
    return [each for each in found if latest - each.trace.began <= each.trace.seconds]


def describe_traces(traces: Sequence[NamedTrace]) -> list[dict[str, Any]]:
    """Lanes of each device: plain values, in seconds since the first of them began the step."""
    first = min((each.trace.began for each in traces), default=0.0)
    return [_describe(each, each.trace.began - first) for each in traces]


def _describe(named: NamedTrace, offset: float) -> dict[str, Any]:
    trace: StepTrace = named.trace
    lanes = {name: getattr(trace, name) for name in ("compute", "waits", "unpacking", "copies")}
    return {
        "device": named.device,
        "step": trace.step,
        "time": trace.time,
        "offset": round(offset, DIGITS),
        "seconds": round(trace.seconds, DIGITS),
        "waited": round(trace.waited, DIGITS),
        "copied": sum(span.value for span in trace.copies),
        "blocks": list(named.blocks),
        **{
            name: [[round(span.begin, DIGITS), round(span.end, DIGITS), span.value] for span in spans]
            for name, spans in lanes.items()
        },
    }


def trace_file(traces: Sequence[NamedTrace], title: str) -> dict[str, Any]:
    """The same as a file for Perfetto, or for Chrome's own page."""
    return chrome_trace(traces, title)


def describe_runs(models: Iterable[StreamedModel]) -> list[dict[str, Any]]:
    """The last runs of a model, the oldest first: what each step took, its copies per second, and its part of waiting.

    Runs of several parts are counted alike, as their steps are.
    """
    parts = [model.streamer.logged_runs() for model in models]
    numbers = sorted({run.number for part in parts for run in part})
    return [
        _describe_run(number, [run for part in parts for run in part if run.number == number]) for number in numbers
    ]


def _describe_run(number: int, parts: Sequence[RunLog]) -> dict[str, Any]:
    steps: dict[int, list[TimedStep]] = {}
    for part in parts:
        for place, step in timed_steps(part).items():
            steps.setdefault(place, []).append(step)
    whole = {place: together(shares) for place, shares in sorted(steps.items())}
    return {
        "number": number,
        "steps": list(whole),
        "seconds": [round(step.seconds, DIGITS) for step in whole.values()],
        "rate": [round(step.rate) for step in whole.values()],
        "waiting": [round(step.waiting, 3) for step in whole.values()],
    }
