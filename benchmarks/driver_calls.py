"""Pure: what a profiler's trace says of calls of the CUDA runtime and the driver."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

# How the trace calls such an event, whoever was called.
CATEGORIES = ("cuda_runtime", "cuda_driver")
# A call that takes longer than this many microseconds waits for something, mostly for room in a queue.
WAITING = 200.0


def summarize(events: Iterable[dict[str, Any]], thread: int, steps: int) -> dict[str, Any]:
    """Calls and their seconds, by kind and per step.

    Args:
        events: of a trace in Chrome's format; times in microseconds.
        thread: the system's number of the thread that runs the model. Where the trace does not know it, the one with
            the most calls is taken.
        steps: in the trace.

    Returns:
        ``calls``: of that thread, a step; ``call_seconds``: what they take; ``waiting_s``: in those that wait;
        ``median_call_us``; ``calls_elsewhere``: of all other threads. A profiler costs time itself, so the seconds are
        for comparing kinds.
    """
    calls = [event for event in events if event.get("cat") in CATEGORIES and event.get("ph") == "X"]
    threads = Counter(str(event.get("tid")) for event in calls)
    model_thread = str(thread) if str(thread) in threads or not threads else threads.most_common(1)[0][0]
    own = [event for event in calls if str(event.get("tid")) == model_thread]
    others = [event for event in calls if str(event.get("tid")) != model_thread]
    return {
        "calls": _counts(own, steps),
        "calls_elsewhere": _counts(others, steps),
        "call_seconds": {name: sum(spent) / 1e6 / steps for name, spent in _durations(own).items()},
        "median_call_us": {name: statistics.median(spent) for name, spent in _durations(own).items()},
        "waiting_s": sum(event["dur"] for event in own if event["dur"] > WAITING) / 1e6 / steps,
    }


def _durations(calls: list[dict[str, Any]]) -> dict[str, list[float]]:
    """By kind, that with the most calls first."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for event in calls:
        found[event["name"]].append(float(event["dur"]))
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))


def _counts(calls: list[dict[str, Any]], steps: int) -> dict[str, float]:
    return {name: len(spent) / steps for name, spent in _durations(calls).items()}
