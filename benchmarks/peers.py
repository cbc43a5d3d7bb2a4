"""Other offloaders, on diffusers' FLUX with random weights: everything streamed, as their documents recommend.

Their step is one forward of the network in a loop; ours and ComfyUI's is a step of the sampler, which adds next to
nothing to it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cases import Case
    from job import Job

WARM_UP_STEPS = 3
FULL = {"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24, "joint_attention_dim": 4096}
TINY = {"num_layers": 2, "num_single_layers": 4, "num_attention_heads": 2, "joint_attention_dim": 768}


def build_flux(tiny: bool) -> Any:
    """diffusers' FluxTransformer2DModel on the CPU in bfloat16."""
    import torch
    from diffusers import FluxTransformer2DModel

    config = (TINY if tiny else FULL) | {"guidance_embeds": True, "pooled_projection_dim": 768}
    with torch.device("meta"):
        model = FluxTransformer2DModel(**config)
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval().requires_grad_(False)
    fill_random(model)
    return model


def fill_random(model: Any) -> None:
    """Normal weights from one pool. They must not be zeros: a GPU multiplies those faster."""
    import torch

    pool = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "norm" in name and parameter.ndim == 1 and name.endswith("weight"):
            parameter.data.fill_(1)
            continue
        fan_in = parameter.shape[1] if parameter.ndim > 1 else 2500
        scaled = pool * fan_in**-0.5
        for piece in parameter.data.view(-1).split(pool.numel()):
            piece.copy_(scaled[: piece.numel()])


def inputs(case: Case, device: str) -> dict[str, Any]:
    import torch

    height, width = (side // 2 for side in case.latent_shape[-2:])
    tokens, text_width = case.model.context
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)

    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image_ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
    return {
        "hidden_states": random(1, height * width, 64),
        "encoder_hidden_states": random(1, tokens, text_width),
        "pooled_projections": random(1, case.model.pooled),
        "timestep": torch.full((1,), 0.5, device=device, dtype=torch.bfloat16),
        "guidance": torch.full((1,), 3.5, device=device, dtype=torch.float32),
        "img_ids": image_ids.to(device, torch.bfloat16),
        "txt_ids": torch.zeros(tokens, 3, device=device, dtype=torch.bfloat16),
        "return_dict": False,
    }


def offload_by_block(model: Any, device: str) -> None:
    _group_offloading(model, device, offload_type="block_level", num_blocks_per_group=1)


def offload_by_leaf(model: Any, device: str) -> None:
    _group_offloading(model, device, offload_type="leaf_level", record_stream=device == "cuda")


def _group_offloading(model: Any, device: str, **options: Any) -> None:
    import torch
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        model,
        onload_device=torch.device(device),
        offload_device=torch.device("cpu"),
        use_stream=device == "cuda",
        **options,
    )


def offload_with_mmgp(model: Any, device: str) -> None:
    """Its profile for much RAM and little VRAM: everything page-locked, blocks preloaded asynchronously."""
    if device != "cuda":
        raise RuntimeError("mmgp needs a CUDA device")
    from mmgp import offload

    offload.profile(
        {"transformer": model},
        offload.profile_type.HighRAM_LowVRAM,
        verboseLevel=1,
        quantizeTransformer=False,
        # Its default is half of the RAM that the system admits to, which on a machine that grows is too little.
        perc_reserved_mem_max=0.9,
    )


OFFLOADERS: dict[str, Callable[[Any, str], None]] = {
    "diffusers-block": offload_by_block,
    "diffusers-leaf": offload_by_leaf,
    "mmgp": offload_with_mmgp,
}


def measure_diffusers_model(job: Job) -> dict[str, Any]:
    # Only how long page-locking takes depends on this, not the step: torch's default needs half a minute here.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "pinned_use_cuda_host_register:True,pinned_num_register_threads:8")
    import torch
    from clock import StepClock, step_figures

    device = "cuda" if torch.cuda.is_available() else "cpu"
    built = time.perf_counter()
    model = build_flux(job.case.tiny)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    arguments = inputs(job.case, device)
    started = time.perf_counter()
    OFFLOADERS[job.contender](model, device)
    loaded = time.perf_counter()
    warm_up, clock = StepClock(), StepClock()
    with torch.no_grad():
        for _ in range(WARM_UP_STEPS):
            model(**arguments)
            warm_up.mark_first_and_wait()
        for _ in range(job.steps):
            output = model(**arguments)[0]
            clock.mark()
    return {
        "build_s": started - built,
        "loader_s": loaded - started,
        "load_s": warm_up.first_mark_s - started,
        **step_figures(clock, job),
        "streamed_bytes": weights,
        "latent_finite": bool(torch.isfinite(output).all()),
    }
