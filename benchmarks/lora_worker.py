"""Run one row of lora.py in this process and write its figures as JSON. lora.py starts it."""

from __future__ import annotations

import json
import logging
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import comfy_host
from cases import CASES
from contenders import Job, comfy_flags, load_with_comfy, load_with_weightstream, sample
from loading_worker import anonymous_bytes, digest
from worker import versions

STEPS = 6
# Prompts in their order: the strength of the LoRA, or None without it.
PROMPTS = {"before": None, "LoRA 0.8": 0.8, "again": 0.8, "strength 0.5": 0.5, "off": None, "on again": 0.5}


def main() -> None:
    wanted, out = json.loads(sys.argv[1]), Path(sys.argv[2])  # Now: ComfyUI reads sys.argv too.
    case = CASES[wanted["case"]]
    job = Job(
        case.shrunk() if wanted["tiny"] else case,
        wanted["contender"],
        Path(wanted["checkpoint"]),
        Path(wanted["comfyui"]),
        STEPS,
        wanted["free_bytes"],
    )
    result = measure(job, Path(wanted["lora"]))
    out.write_text(json.dumps(result | {"versions": versions()}))
    sys.stdout.flush()
    os._exit(0)  # What a contender leaves behind goes with the process.


def measure(job: Job, lora: Path) -> dict[str, Any]:
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d ms: %(message)s")
    comfy_host.start(job.comfyui, comfy_flags(job))
    import comfy.sd
    import comfy.utils
    import torch

    ours = job.contender == "weightstream"
    with torch.inference_mode():
        model = (load_with_weightstream if ours else load_with_comfy)(job)
        comfy_host.end_of_node()
        for _ in range(3):  # Plan and copies settle, kernels are loaded.
            run_prompt(model, job)
        tensors = comfy.utils.load_torch_file(str(lora), safe_load=True)
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
    latent = sample(model, job.case, STEPS, clock.mark_first_and_wait)
    steps = clock.step_seconds()
    return {
        "first_step_s": clock.first_mark_s - started,
        "later_steps_s": steps,
        "steady_step_s": statistics.median(steps[2:]),
        "latent_sha256": digest(latent),
    }


if __name__ == "__main__":
    main()
