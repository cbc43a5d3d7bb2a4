"""Run one row of host_time.py in this process and write its figures as JSON. host_time.py starts it."""

from __future__ import annotations

import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy_host
import driver_calls
from contenders import comfy_flags, digest, load, plan_of, sample, weight_figures
from job import Job
from processes import answer

# Copies and plan have settled after these.
WARM_UP_PROMPTS = (4, 2)
# That many, from the end of one step to the end of another.
PROFILED_STEPS = 2


class HostClock:
    """What the thread that runs the model has spent at the end of each step.

    Args:
        steps: of the prompt.
        wait: waits for all GPUs.

    Attributes:
        lag_s: how far the GPU was behind when the host was done with the last step.
    """

    def __init__(self, steps: int, wait: Callable[[], None]) -> None:
        self.lag_s = 0.0
        self._steps = steps
        self._wait = wait
        self._marks: list[tuple[float, float, float]] = []

    def mark(self, *_: object) -> None:
        """End of a step; takes and ignores the arguments that a sampler gives its callback."""
        self._marks.append((time.thread_time(), time.process_time(), time.perf_counter()))
        if len(self._marks) == self._steps:
            self._wait()
            self.lag_s = time.perf_counter() - self._marks[-1][2]

    def figures(self) -> dict[str, Any]:
        """Medians of all steps but the first; ``cpu_s`` is of this thread, ``process_cpu_s`` of all."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        cpu, process, wall = ([after[i] - before[i] for before, after in pairs] for i in range(3))
        medians = {"cpu_s": cpu, "process_cpu_s": process, "step_s": wall}
        return {name: statistics.median(times) for name, times in medians.items()} | {"cpu_steps_s": cpu}


class Profiler:
    """Writes down all calls of CUDA in a few whole steps."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._profile: Any = None

    def mark(self, *_: object) -> None:
        """End of a step. The second one warms the profiler up, and those behind it are written down."""
        if self._profile is None:
            self._profile = _make_profile(self._take)
            self._profile.start()
        else:
            self._profile.step()

    def _take(self, profile: Any) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            trace = Path(scratch) / "trace.json"
            profile.export_chrome_trace(str(trace))
            self._events = json.loads(trace.read_text("utf-8"))["traceEvents"]

    def figures(self) -> dict[str, Any]:
        self._profile.stop()
        return driver_calls.summarize(self._events, threading.get_native_id(), PROFILED_STEPS)


def _make_profile(take: Callable[[Any], None]) -> Any:
    """Without a GPU there are no such calls, and what the CPU does is written down instead."""
    import torch
    from torch.profiler import ProfilerActivity, profile, schedule

    activity = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
    steps = schedule(wait=0, warmup=1, active=PROFILED_STEPS, repeat=1)
    return profile(activities=[activity], schedule=steps, on_trace_ready=take)


def measure(wanted: dict[str, Any]) -> dict[str, Any]:
    """A prompt with a clock, and one with a profiler, when all has settled."""
    job = Job.from_dict(wanted)
    comfy_host.start(job.comfyui, comfy_flags(job))
    import torch
    from clock import synchronize

    with torch.inference_mode():
        model = load(job)
        comfy_host.end_of_node()
        for steps in WARM_UP_PROMPTS:
            sample(model, job.case, steps, lambda *_: None)
            for streamer in getattr(model, "streamers", ()):
                streamer.finish_building()
        plan, clock, profiler = plan_of(model), HostClock(job.steps, synchronize), Profiler()
        latent = sample(model, job.case, job.steps, clock.mark)
        sample(model, job.case, PROFILED_STEPS + 3, profiler.mark)
    figures = clock.figures() | {"lag_s": clock.lag_s, "latent_sha256": digest(latent)}
    return figures | profiler.figures() | weight_figures(model, plan)


if __name__ == "__main__":
    answer(measure)
