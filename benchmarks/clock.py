"""Step times and memory of one run, taken without making the host wait for the GPU."""

from __future__ import annotations

import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from job import Job


def synchronize() -> None:
    """Wait for all GPUs."""
    for gpu in range(torch.cuda.device_count()):
        torch.cuda.synchronize(gpu)


class StepClock:
    """Marks the end of every step on the compute stream.

    A mark is an event that is read after the run: waiting for the GPU at the end of each step would stop exactly the
    prefetch across steps that is to be measured. On a CPU a mark is the time of day.
    """

    def __init__(self) -> None:
        self.on_gpu = torch.cuda.is_available()
        self.first_mark_s: float | None = None
        self.peak_used_bytes = 0
        self._marks: list = []

    def mark(self, *_: object) -> None:
        """End of a step; takes and ignores the arguments that a sampler gives its callback."""
        if not self.on_gpu:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)
        free, total = torch.cuda.mem_get_info()
        self.peak_used_bytes = max(self.peak_used_bytes, total - free)

    def mark_first_and_wait(self, *_: object) -> None:
        """For a warm-up run: notes the time of day at which the first step was really done."""
        if self.first_mark_s is None:
            synchronize()
            self.first_mark_s = time.perf_counter()
        self.mark()

    def step_seconds(self) -> list[float]:
        """Every step but the first, whose start is not marked."""
        synchronize()
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if self.on_gpu:
            return [before.elapsed_time(after) / 1000 for before, after in pairs]
        return [after - before for before, after in pairs]


def page_counts(gpu: int) -> tuple[int, int]:
    """Bytes that our pack has on a GPU in pages, beside torch: used for weights, and in all; none without the pack."""
    pack = sys.modules.get("weightstream_pack.streaming.devices.cuda_pages")
    return (0, 0) if pack is None else pack.page_counts(gpu)


def step_figures(clock: StepClock, job: Job) -> dict[str, Any]:
    """Step times, and memory as torch counts it, on the GPU that took most, and as the first GPU does.

    aimdo's own memory only shows in the latter. Our weights in pages, as they are now, count with torch's.
    """
    steps = clock.step_seconds()
    figures: dict[str, Any] = {"steps_s": steps, "step_s": statistics.median(steps), "peak_bytes": {}}
    if clock.on_gpu:
        total = torch.cuda.mem_get_info()[1]
        used_by_others = total - job.free_bytes
        gpus = range(job.case.gpus)
        figures["peak_bytes"] = {
            "torch_allocated": max(torch.cuda.max_memory_allocated(gpu) + page_counts(gpu)[0] for gpu in gpus),
            "torch_reserved": max(torch.cuda.max_memory_reserved(gpu) + page_counts(gpu)[1] for gpu in gpus),
            "device": clock.peak_used_bytes - used_by_others,
        }
    return figures
