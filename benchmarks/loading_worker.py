"""Run one row of loading.py in this process and write its figures as JSON. loading.py starts it."""

from __future__ import annotations

import dataclasses
import logging
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import comfy_host
from contenders import comfy_flags, digest, load, sample
from job import Job
from processes import answer

STEADY_STEPS = 8
SHORT_PROMPTS = 2


def measure(wanted: dict[str, Any]) -> dict[str, Any]:
    job = Job.from_dict(wanted)
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d ms: %(message)s")
    logging.getLogger("weightstream_pack.streaming.loading").setLevel(logging.DEBUG)
    comfy_host.start(job.comfyui, comfy_flags(job))
    import comfy.sample  # noqa: F401  (as ComfyUI does when it starts)
    import torch

    if job.is_ours:
        comfy_host.load_pack("WeightStreamModelLoader")  # As ComfyUI imports it at its start.
        adjust(wanted["settings"], wanted["pin_limit"])
    if torch.cuda.is_available():
        torch.cuda.init()
        torch.ones(1, device="cuda")
    with torch.inference_mode():
        own_memory = anonymous_bytes()
        logging.info("the loader starts")
        model, figures = (measure_short_prompts if wanted["short"] else measure_loading)(job)
    if job.is_ours:
        figures["status"] = model.status()
    return figures | {"anonymous_before_bytes": own_memory}


def measure_loading(job: Job) -> tuple[Any, dict[str, Any]]:
    """The loader, a prompt, and what a step takes once everything has settled; with the MODEL."""
    from clock import StepClock

    started = time.perf_counter()
    model = load(job)
    loaded = time.perf_counter()
    comfy_host.end_of_node()
    first = StepClock()

    def first_step(*args: Any) -> None:
        if first.first_mark_s is None:
            logging.info("the first step ends")
        first.mark_first_and_wait(*args)

    latent = sample(model, job.case, job.steps, first_step)
    logging.info("the first prompt ends")
    later = first.step_seconds()
    figures = {"loader_s": loaded - started, "first_step_s": first.first_mark_s - started}
    figures |= {"later_steps_s": later, "first_prompt_s": time.perf_counter() - started}
    figures["first_latent_sha256"] = digest(latent)
    if job.is_ours:
        model.streamer.finish_building()
    sample(model, job.case, 3 if job.steps > 3 else 1, StepClock().mark)
    steady = StepClock()
    latent = sample(model, job.case, min(job.steps, STEADY_STEPS), steady.mark)
    figures |= {"steady_step_s": statistics.median(steady.step_seconds()), "latent_sha256": digest(latent)}
    return model, figures


def measure_short_prompts(job: Job) -> tuple[Any, dict[str, Any]]:
    """The loader and two prompts, each to its latent in host memory; with the MODEL.

    Nothing waits for the GPU between steps. The first step of the first prompt begins with the loader.
    """
    from clock import StepClock

    model, loader_s, prompts = None, 0.0, []
    for _ in range(SHORT_PROMPTS):
        clock, started = StepClock(), time.perf_counter()
        clock.mark()
        if model is None:
            model = load(job)
            loader_s = time.perf_counter() - started
            comfy_host.end_of_node()
        latent = sample(model, job.case, job.steps, clock.mark)
        ended = time.perf_counter()
        logging.info("a prompt ends")
        prompts.append({"seconds": ended - started, "steps_s": clock.step_seconds(), "latent_sha256": digest(latent)})
    return model, {"loader_s": loader_s, "prompts": prompts}


def anonymous_bytes() -> int:
    """Memory of this process, file cache and mapped files not counted."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))


def adjust(settings: dict[str, int], pin_limit: int | None) -> None:
    """Use other settings than the pack's own, for this process."""
    nodes = [sys.modules[f"weightstream_pack.nodes.model.{name}"] for name in ("streamed_model", "patcher")]
    own = nodes[0].host_config
    for node in nodes:
        node.host_config = lambda *args: dataclasses.replace(own(*args), **settings)
    if pin_limit is not None:
        nodes[0].pins.limit = pin_limit


if __name__ == "__main__":
    answer(measure)
