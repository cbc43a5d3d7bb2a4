"""Step times and memory of one run, taken without making the host wait for the GPU."""

from __future__ import annotations

import time

import torch


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
