"""Run one row of lora.py in this process and write its figures as JSON. lora.py starts it."""

from __future__ import annotations

import logging
import statistics
import time
from typing import Any

import comfy_host
from contenders import comfy_flags, digest, load, sample
from job import Job
from loading_worker import anonymous_bytes
from processes import answer

# Prompts in their order: the strength of the LoRA, or None without it.
PROMPTS = {"before": None, "LoRA 0.8": 0.8, "again": 0.8, "strength 0.5": 0.5, "off": None, "on again": 0.5}


def measure(wanted: dict[str, Any]) -> dict[str, Any]:
    job = Job.from_dict(wanted)
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d ms: %(message)s")
    comfy_host.start(job.comfyui, comfy_flags(job))
    import comfy.sd
    import comfy.utils
    import torch

    with torch.inference_mode():
        model = load(job)
        comfy_host.end_of_node()
        for _ in range(3):  # Plan and copies settle, kernels are loaded.
            run_prompt(model, job)
        tensors = comfy.utils.load_torch_file(wanted["lora"], safe_load=True)
        prompts, loaded = {}, {None: model}
        for name, strength in PROMPTS.items():
            if strength not in loaded:
                loaded[strength], _ = comfy.sd.load_lora_for_models(model, None, tensors, strength, 0)
            prompts[name] = run_prompt(loaded[strength], job)
            logging.info("%s: %s", name, prompts[name])
    return {"prompts": prompts, "anonymous_bytes": anonymous_bytes()}


def run_prompt(model: Any, job: Job) -> dict[str, Any]:
    """Time from the sampler's start to the end of the first step, the median of the later ones, and the latent."""
    from clock import StepClock

    clock, started = StepClock(), time.perf_counter()
    latent = sample(model, job.case, job.steps, clock.mark_first_and_wait)
    steps = clock.step_seconds()
    return {
        "first_step_s": clock.first_mark_s - started,
        "later_steps_s": steps,
        "steady_step_s": statistics.median(steps[2:]),
        "latent_sha256": digest(latent),
    }


if __name__ == "__main__":
    answer(measure)
