"""What a recorded step did when: spans of time as plain numbers, and as a file that Perfetto and Chrome's tracing show.

The JSON is Chrome's trace event format (one process for each device, one thread for each lane), with times in
microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from ..config import format_bytes
from ..devices.copies import CopyTime, Moment, Stall, Unpacking, moments_of


class Span(NamedTuple):
    """Something that takes time. ``begin`` and ``end`` are seconds since the step began on its device.

    Attributes:
        value: of compute the number of the block; of a copy its bytes; else 0.
    """

    begin: float
    end: float
    value: int = 0

    @property
    def seconds(self) -> float:
        return self.end - self.begin


class StepTrace(NamedTuple):
    """One step on one device.

    Attributes:
        step: its number in its run, from 1.
        time: when it began, as ``time.time()`` returns it.
        began: the same on the host's clock for durations, which tells how the devices of one step lie to each other.
        seconds: how long it took.
        compute: runs of blocks, with the waits and the unpacking inside of them.
        waits: times for which compute waited for a copy.
        unpacking: times in which weights were unpacked.
        copies: to the device. The first may have begun before the step, the last may end after it.
    """

    step: int
    time: float
    began: float
    seconds: float
    compute: tuple[Span, ...]
    waits: tuple[Span, ...]
    unpacking: tuple[Span, ...]
    copies: tuple[Span, ...]

    @property
    def waited(self) -> float:
        """Seconds for which compute waited."""
        return sum(span.seconds for span in self.waits)


class NamedTrace(NamedTuple):
    """A trace for people: with the name of the device, and those of its blocks."""

    device: str
    blocks: Sequence[str]
    trace: StepTrace


def wait_spans(stalls: Iterable[Stall], since: Callable[[Moment], float], unpacking: bool = False) -> tuple[Span, ...]:
    """Return the waits that took time, or the times of unpacking; ``since`` returns seconds since the step began."""
    moments = (moments_of(stall) for stall in stalls if isinstance(stall, Unpacking) is unpacking)
    spans = (Span(since(begin), since(end)) for begin, end in filter(None, moments))
    return tuple(sorted(span for span in spans if span.end > span.begin))


def copy_spans(times: Iterable[CopyTime], since: Callable[[Moment], float], step_seconds: float) -> tuple[Span, ...]:
    """Return the copies of which something lies in the step."""
    spans = (Span(since(time.begin), since(time.end), time.nbytes) for time in times)
    return tuple(sorted(span for span in spans if span.end > 0 and span.begin < step_seconds))


# -- a file ------------------------------------------------------------------------------------------------------------

# The threads of a device, in the order in which they are shown. A colour is one of the names that Chrome's page knows;
# Perfetto chooses its own.
LANES = {"compute": "thread_state_running", "waits": "terrible", "unpacking": "bad", "copies": "rail_animation"}


def chrome_trace(traces: Sequence[NamedTrace], title: str = "") -> dict[str, Any]:
    """Return the steps of several devices as one trace in Chrome's JSON format."""
    first = min((named.trace.began for named in traces), default=0.0)
    events: list[dict[str, Any]] = []
    for process, named in enumerate(traces, 1):
        events.append(_metadata("process_name", process, name=f"{named.device} {title}".strip()))
        for thread, lane in enumerate(LANES, 1):
            events.append(_metadata("thread_name", process, thread, name=lane))
            events.append(_metadata("thread_sort_index", process, thread, sort_index=thread))
            events += (
                {
                    "ph": "X",
                    "cat": lane,
                    "name": _name(lane, span, named.blocks),
                    "cname": LANES[lane],
                    "pid": process,
                    "tid": thread,
                    "ts": round(1e6 * (named.trace.began - first + span.begin), 3),
                    "dur": round(1e6 * span.seconds, 3),
                    **({"args": {"bytes": span.value}} if lane == "copies" else {}),
                }
                for span in getattr(named.trace, lane)
            )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _metadata(kind: str, process: int, thread: int = 0, **values: object) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": values}


def _name(lane: str, span: Span, blocks: Sequence[str]) -> str:
    if lane == "compute":
        return blocks[span.value] if span.value < len(blocks) else f"block {span.value}"
    if lane == "copies":
        return format_bytes(span.value)
    return {"waits": "wait", "unpacking": "unpack"}[lane]
