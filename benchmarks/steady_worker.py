"""Run one row of steady.py in this process and write its figures as JSON. steady.py starts it.

It looks after each step and changes nothing: what it reads are counters of the driver, of torch and of our streamer.
"""

from __future__ import annotations

import functools
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import comfy_host
from contenders import comfy_flags, digest, load, plan_of, sample
from job import Job
from processes import answer

# After a prompt ComfyUI's server collects garbage and gives back what torch keeps, if it has not for so long.
TIDY_SECONDS = 10.0
# What torch counts on a GPU, by our names.
TORCH_COUNTS = {
    "reserved_bytes": "reserved_bytes.all.current",
    "reserved_peak_bytes": "reserved_bytes.all.peak",
    "allocated_bytes": "allocated_bytes.all.current",
    "allocated_peak_bytes": "allocated_bytes.all.peak",
    "active_bytes": "active_bytes.all.current",
    "inactive_split_bytes": "inactive_split_bytes.all.current",
    "ooms": "num_ooms",
    "alloc_retries": "num_alloc_retries",
    "device_allocs": "num_device_alloc",
    "device_frees": "num_device_free",
}


class HostCalls:
    """Counts calls of functions by which the host makes room, and the most that it asked for, in this process alone."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.most_asked_bytes = 0.0

    def watch(self, owner: Any, *names: str) -> None:
        for name in names:
            setattr(owner, name, self._counting(f"{owner.__name__}.{name}", getattr(owner, name)))

    def _counting(self, full_name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.counts[full_name] += 1
            asked = args[0] if args else kwargs.get("memory_required")
            if full_name.endswith(".free_memory") and isinstance(asked, (int, float)):
                self.most_asked_bytes = max(self.most_asked_bytes, asked)
            return function(*args, **kwargs)

        return call

    def take(self) -> dict[str, Any]:
        """What was counted since the last time."""
        found = {"calls": dict(self.counts), "most_asked_bytes": self.most_asked_bytes}
        self.counts, self.most_asked_bytes = Counter(), 0.0
        return found


class Warnings(logging.Handler):
    """Collects what our pack warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        logging.getLogger("weightstream_pack").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    def take(self) -> list[str]:
        taken, self.texts = self.texts, []
        return taken


class StepWatch:
    """What is on the device at the end of each step of one prompt, and what happened in it."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._plans = [plan_of(model)]
        self._reruns = model.streamer.counters.reruns
        self.columns: dict[str, list[Any]] = {}

    def look(self) -> None:
        streamer = self._model.streamer
        free, cached = streamer.backend.memory()
        before, self._reruns = self._reruns, streamer.counters.reruns
        self._plans.append(plan_of(self._model))
        now = {"free_bytes": free, "kept_by_torch_bytes": cached, "reruns": self._reruns - before}
        now |= {"device_bytes": streamer.device_bytes, "resident_bytes": streamer.plan.resident_bytes}
        now |= {"segments": len(streamer.plan.segments), **torch_counts(), **counts_of_pages()}
        for name, value in now.items():
            self.columns.setdefault(name, []).append(value)

    def plan_changes(self) -> list[int]:
        """For each step, whether another plan held at its end than at the end of the one before."""
        return [int(before != after) for before, after in zip(self._plans, self._plans[1:], strict=False)]


def torch_counts() -> dict[str, int]:
    """What torch counts on the GPU, with peaks since the last time; nothing without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return {}
    counts = torch.cuda.memory_stats()
    torch.cuda.reset_peak_memory_stats()
    return {name: counts[key] for name, key in TORCH_COUNTS.items() if key in counts}


def counts_of_pages() -> dict[str, int]:
    """What weights have on the GPU beside torch; nothing without a GPU."""
    import torch
    from clock import page_counts

    if not torch.cuda.is_available():
        return {}
    used, mapped = page_counts(torch.cuda.current_device())
    return {"pages_used_bytes": used, "pages_mapped_bytes": mapped}


def allocator() -> str:
    """``native`` or ``cudaMallocAsync``; empty without a GPU."""
    import torch

    return torch.cuda.get_allocator_backend() if torch.cuda.is_available() else ""


def largest_cached_block() -> int | None:
    """Bytes of the largest piece that torch keeps and nobody uses; None where its allocator does not say."""
    import torch

    if allocator() != "native":
        return None
    blocks = [block for segment in torch.cuda.memory_snapshot() for block in segment["blocks"]]
    return max((block["size"] for block in blocks if block["state"] == "inactive"), default=0)


def measure(wanted: dict[str, Any]) -> dict[str, Any]:
    """All prompts of a row, one after another in this process."""
    job = Job.from_dict(wanted)
    comfy_host.start(job.comfyui, comfy_flags(job))
    import comfy.model_management as mm
    import torch

    host, warnings = HostCalls(), Warnings()
    host.watch(mm, "free_memory", "soft_empty_cache", "unload_all_models")
    host.watch(torch.cuda, "empty_cache")
    with torch.inference_mode():
        model = load(job)
        comfy_host.end_of_node()
        prompts, tidied = [], 0.0
        for number in range(wanted["prompts"]):
            prompt = run_prompt(model, job)
            if tidy := time.monotonic() - tidied > TIDY_SECONDS:
                comfy_host.end_of_prompt()
                tidied = time.monotonic()
            prompts.append(prompt | host.take() | {"tidied": tidy, "warnings": warnings.take()})
            logging.info("prompt %d: %s", number + 1, prompts[-1])
    return {"allocator": allocator(), "prompts": prompts, "status": model.status()}


def run_prompt(model: Any, job: Job) -> dict[str, Any]:
    """One prompt; its first step begins with the host's loading."""
    from clock import StepClock

    clock, watch = StepClock(), StepWatch(model)

    def end_of_step(*_: object) -> None:
        clock.mark()
        watch.look()

    clock.mark()
    latent = sample(model, job.case, job.steps, end_of_step)
    return {
        "steps_s": clock.step_seconds(),
        "plan_changes": watch.plan_changes(),
        **watch.columns,
        "largest_cached_block_bytes": largest_cached_block(),
        "latent_sha256": digest(latent),
    }


if __name__ == "__main__":
    answer(measure)
