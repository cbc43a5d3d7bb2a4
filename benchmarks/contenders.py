"""Who is measured: ComfyUI with its own loader, ComfyUI with ours, and the two limits.

Each ``measure_*`` runs in a process of its own, started by worker.py, and returns what goes into the result file.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import comfy_host
from cases import FAST_DISK, GB, Case
from job import Job

WARM_UP_STEPS = 3
SEED = 20


# ----------------------------------------------------------------------------------------------------- ComfyUI


def comfy_flags(job: Job) -> list[str]:
    """The ComfyUI command line of a contender; dynamic VRAM is ComfyUI's default."""
    forced = [FAST_DISK[job.contender].option] if job.contender in FAST_DISK else []
    return memory_flags(job) + forced


def memory_flags(job: Job) -> list[str]:
    if job.case.tiny:
        return ["--cpu"]
    if job.base == "resident":
        return ["--highvram"]
    if job.base in ("comfy-static", "weightstream-static"):
        everything_streamed = job.case.stream_all and job.base == "comfy-static"
        return ["--novram"] if everything_streamed else ["--disable-dynamic-vram"]
    if job.base == "comfy-dynamic" and job.case.stream_all:
        # Dynamic VRAM has no switch for "keep nothing"; a headroom of all but 3 GB comes nearest.
        return ["--vram-headroom", f"{max(0.0, job.free_bytes / 1024**3 - 3):.2f}"]
    return []


def load(job: Job) -> Any:
    """The contender's MODEL."""
    return (load_with_weightstream if job.is_ours else load_with_comfy)(job)


def load_with_comfy(job: Job) -> Any:
    """What Load Diffusion Model does with ``weight_dtype`` default, and MultiGPU CFG Split for its contender."""
    import comfy.sd

    model = comfy.sd.load_diffusion_model(str(job.checkpoint))
    if job.contender == "comfy-cfg-split":
        from comfy_extras.nodes_multigpu import MultiGPUCFGSplitNode

        model = MultiGPUCFGSplitNode.execute(model, job.case.gpus).args[0]
    return model


def load_with_weightstream(job: Job) -> Any:
    import folder_paths

    folder_paths.add_model_folder_path("diffusion_models", str(job.checkpoint.parent))
    node = comfy_host.load_pack("WeightStreamModelLoader")
    output = node.execute(unet_name=job.checkpoint.name, weight_dtype="default", vram_limit_gb=job.case.vram_limit_gb)
    model = output.args[0]
    if job.case.gpus > 1 and job.contender != "weightstream-one-gpu":
        place = comfy_host.load_pack("WeightStreamGPUPlacement")
        split = "equal" if job.contender == "weightstream-blocks" else job.case.split
        model = place.execute(model, devices=job.case.devices, split=split).args[0]
        used = len(parallel_of(model)) if split == "parallel" else links_of(model)
        if used != job.case.gpus:
            raise RuntimeError("the model does not use all GPUs; its log says why")
    if not hasattr(model, "status"):
        raise RuntimeError("our loader fell back to ComfyUI's; its log says why")
    if job.contender == "weightstream-unpacked":
        model.settings = replace(model.settings, packing=type(model.settings.packing).OFF)
    return model


def compile_model(model: Any, case: Case) -> Any:
    """``model`` with torch.compile as the case has it; what the host's functions for it give is a clone."""
    if case.compiled == "whole":
        from comfy_extras.nodes_torch_compile import TorchCompileModel

        return TorchCompileModel.execute(model, "inductor").args[0]
    if case.compiled == "blocks":
        import torch
        from comfy_api.torch_helpers import set_torch_compile_wrapper
        from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

        lists = model.get_model_object("diffusion_model").named_children()
        blocks = [(name, len(child)) for name, child in lists if isinstance(child, torch.nn.ModuleList)]
        keys = [f"diffusion_model.{name}.{number}" for name, count in blocks for number in range(count)]
        model = model.clone()
        options = {"guard_filter_fn": skip_torch_compile_dict}
        set_torch_compile_wrapper(model, backend="inductor", options=options, keys=keys)
    return model


def conditioning(case: Case, seed: int = SEED) -> list:
    """Random conditioning in the model's real shape, the same in every process."""
    import torch

    tokens, width = case.model.context
    generator = torch.Generator().manual_seed(seed)
    extras: dict[str, Any] = {"guidance": 3.5}
    if case.model.pooled:
        extras["pooled_output"] = torch.randn(1, case.model.pooled, generator=generator)
    return [[torch.randn(1, tokens, width, generator=generator), extras]]


def sample(model: Any, case: Case, steps: int, callback: Callable[..., None]) -> Any:
    """One KSampler run: euler, simple, the case's cfg, an empty latent."""
    import comfy.sample
    import torch

    latent = comfy.sample.fix_empty_latent_channels(model, torch.zeros(case.latent_shape))
    noise = comfy.sample.prepare_noise(latent, SEED)
    positive, negative = conditioning(case), conditioning(case, SEED + 1)
    samples = comfy.sample.sample(
        *(model, noise, steps, case.cfg, "euler", "simple", positive, negative, latent),
        callback=callback,
        disable_pbar=True,
        seed=SEED,
    )
    comfy_host.end_of_node()
    return samples


def digest(latent: Any) -> str:
    """SHA-256 of a latent's values: equal for those that agree to the last bit."""
    return hashlib.sha256(latent.float().cpu().contiguous().numpy().tobytes()).hexdigest()


def measure_comfy(job: Job) -> dict[str, Any]:
    """Load, warm up, then measure.

    The warm-up is not only for the clock: the first sampling of a process differs in its last bits from all of its
    later ones, whoever runs it, so latents are compared from the second on.
    """
    comfy_host.start(job.comfyui, comfy_flags(job))
    import torch
    from clock import StepClock, step_figures

    with torch.inference_mode():
        started = time.perf_counter()
        model = compile_model(load(job), job.case)
        loaded = time.perf_counter()
        comfy_host.end_of_node()
        warm_up = StepClock()
        sample(model, job.case, WARM_UP_STEPS, warm_up.mark_first_and_wait)
        comfy_host.end_of_prompt()
        plan = plan_of(model)
        clock = StepClock()
        latent = sample(model, job.case, job.steps, clock.mark)
    return {
        "loader_s": loaded - started,
        "load_s": warm_up.first_mark_s - started,
        **step_figures(clock, job),
        **weight_figures(model, plan),
        **parallel_figures(model, job),
        # What ComfyUI decided of the file's disk; versions that decide nothing have no such attribute.
        "fast_disk": getattr(model, "fast_disk", None),
        "latent_sha256": digest(latent),
        "latent_finite": bool(torch.isfinite(latent).all()),
    }


def links_of(model: Any) -> int:
    """GPUs over whose links weights come: those that run blocks, and those that bring weights to one of them."""
    return sum(1 + len(streamer.backend.feeders) for streamer in model.streamers)


def parallel_of(model: Any) -> list[Any]:
    """The patchers of a MODEL on all GPUs that work at the same time."""
    return [model, *model.get_additional_models_with_key("multigpu")]


def streamers_of(model: Any) -> list[Any]:
    """Those of our loader's model on all GPUs; none of everybody else's."""
    return [streamer for one in parallel_of(model) for streamer in getattr(one, "streamers", ())]


def parallel_figures(model: Any, job: Job) -> dict[str, Any]:
    """Whether GPUs have worked at the same time, or why not, for a contender that is to."""
    if job.case.split != "parallel" or job.contender != "weightstream":
        return {}
    return {"parallel": not model.streamed.alone, "why_not_parallel": model.streamed.alone}


def plan_of(model: Any) -> Any:
    """What our loader's model has decided to keep and to stream on each GPU; nothing for everybody else's."""
    return [streamer.plan for streamer in streamers_of(model)]


def weight_figures(model: Any, plan: Any) -> dict[str, Any]:
    """Bytes of weights kept on the device and streamed in every step, and our own account of it where there is one.

    ``plan`` is the one that the measured run began with: had it changed since, not all of its steps were alike.
    """
    if hasattr(model, "status"):
        reports = [streamer.snapshot().as_dict() for streamer in streamers_of(model)]
        return {
            "gpus": sum(map(links_of, parallel_of(model))),
            "kept_bytes": sum(report["resident_bytes"] + report["rest_bytes"] for report in reports),
            "streamed_bytes": sum(report["streamed_block_bytes"] for report in reports),
            "plan_constant": plan_of(model) == plan,
            "status": reports[0],
            "status_of_others": reports[1:],
        }
    kept = int(model.loaded_size())
    return {"kept_bytes": kept, "streamed_bytes": max(0, int(model.model_size()) - kept)}


# --------------------------------------------------------------------------------------------------- the wire


def measure_h2d(job: Job) -> dict[str, Any]:
    """Page-locked memory to the device in 64 MB copies, as many bytes as the checkpoint has, nothing else running.

    Where the case has several GPUs, to all of them at once too.
    """
    alone = _h2d_rates(job, 1)
    figures = {"h2d_bytes_per_s": statistics.median(alone[1:]), "h2d_gb_per_s": [rate / GB for rate in alone]}
    if job.case.gpus > 1:
        together = _h2d_rates(job, job.case.gpus)
        figures["h2d_of_all_gpus_bytes_per_s"] = statistics.median(together[1:])
    return figures


def _h2d_rates(job: Job, gpus: int) -> list[float]:
    """Bytes per second to ``gpus`` GPUs in sum."""
    import torch

    cuda = torch.cuda.is_available()
    chunk = (64 if cuda else 1) << 20
    hosts = [torch.empty(16 * chunk, dtype=torch.uint8, pin_memory=cuda).fill_(1) for _ in range(gpus)]
    devices = [torch.empty_like(host, device=f"cuda:{gpu}" if cuda else "cpu") for gpu, host in enumerate(hosts)]
    copies = -(-os.path.getsize(job.checkpoint) // chunk)
    return [copies * chunk * gpus / _copy_seconds(hosts, devices, chunk, copies) for _ in range(6)]


def _copy_seconds(hosts: list, devices: list, chunk: int, copies: int) -> float:
    from clock import synchronize

    synchronize()
    started = time.perf_counter()
    for number in range(copies):
        at = number * chunk % hosts[0].numel()
        for host, device in zip(hosts, devices, strict=True):
            device[at : at + chunk].copy_(host[at : at + chunk], non_blocking=True)
    synchronize()
    return time.perf_counter() - started


def measure(job: Job) -> dict[str, Any]:
    """Run ``job`` in this process."""
    import peers

    if job.contender == "h2d":
        return measure_h2d(job)
    if job.contender in peers.OFFLOADERS:
        return peers.measure_diffusers_model(job)
    return measure_comfy(job)


NAMES = (
    "resident",
    "h2d",
    "weightstream",
    "weightstream-static",
    "weightstream-blocks",
    "weightstream-one-gpu",
    "weightstream-unpacked",
    "comfy-dynamic",
    "comfy-static",
    "comfy-cfg-split",
    *FAST_DISK,
    "diffusers-block",
    "diffusers-leaf",
    "mmgp",
)
