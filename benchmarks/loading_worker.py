"""Run one row of loading.py in this process and write its figures as JSON. loading.py starts it."""

from __future__ import annotations

import dataclasses
import hashlib
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
from worker import versions

STEADY_STEPS = 8


def main() -> None:
    wanted, out = json.loads(sys.argv[1]), Path(sys.argv[2])  # Now: ComfyUI reads sys.argv too.
    case = CASES[wanted["case"]]
    job = Job(
        case.shrunk() if wanted["tiny"] else case,
        wanted["contender"],
        Path(wanted["checkpoint"]),
        Path(wanted["comfyui"]),
        wanted["steps"],
        wanted["free_bytes"],
    )
    result = measure(job, wanted["settings"], wanted["pin_limit"])
    out.write_text(json.dumps(result | {"versions": versions()}))
    sys.stdout.flush()
    os._exit(0)  # What a contender leaves behind goes with the process.


def measure(job: Job, settings: dict[str, int], pin_limit: int | None) -> dict[str, Any]:
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d ms: %(message)s")
    logging.getLogger("weightstream_pack.streaming.streamer").setLevel(logging.DEBUG)
    comfy_host.start(job.comfyui, comfy_flags(job))
    import comfy.sample  # noqa: F401  (as ComfyUI does when it starts)
    import torch
    from clock import StepClock

    ours = job.contender == "weightstream"
    if ours:
        comfy_host.load_pack("WeightStreamModelLoader")  # As ComfyUI imports it at its start.
        adjust(settings, pin_limit)
    if torch.cuda.is_available():
        torch.cuda.init()
        torch.ones(1, device="cuda")
    with torch.inference_mode():
        own_memory = anonymous_bytes()
        logging.info("the loader starts")
        started = time.perf_counter()
        model = (load_with_weightstream if ours else load_with_comfy)(job)
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
        result = {"loader_s": loaded - started, "first_step_s": first.first_mark_s - started}
        result |= {"anonymous_before_bytes": own_memory, "first_latent_sha256": digest(latent)}
        result |= {"later_steps_s": later, "first_prompt_s": time.perf_counter() - started}
        if ours:
            model.streamer.finish_building()
        sample(model, job.case, 3 if job.steps > 3 else 1, StepClock().mark)
        steady = StepClock()
        latent = sample(model, job.case, min(job.steps, STEADY_STEPS), steady.mark)
    if ours:
        result["status"] = model.status()
    return result | {"steady_step_s": statistics.median(steady.step_seconds()), "latent_sha256": digest(latent)}


def digest(latent: Any) -> str:
    return hashlib.sha256(latent.float().cpu().contiguous().numpy().tobytes()).hexdigest()


def anonymous_bytes() -> int:
    """Memory of this process, file cache and mapped files not counted."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))


def adjust(settings: dict[str, int], pin_limit: int | None) -> None:
    """Use other settings than the pack's own, for this process."""
    nodes = [sys.modules[f"weightstream_pack.nodes.{name}"] for name in ("streamed_model", "patcher")]
    own = nodes[0].host_config
    for node in nodes:
        node.host_config = lambda *args: dataclasses.replace(own(*args), **settings)
    if pin_limit is not None:
        nodes[0].pins.limit = pin_limit


if __name__ == "__main__":
    main()
