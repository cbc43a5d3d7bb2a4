"""The host's own sampler, its LoRA loader, and LoRA that hangs on the conditioning, on the tiny FLUX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.hooks
import comfy.utils
import folder_paths
import torch

import nodes as host_nodes

MODEL = "tiny-flux.safetensors"
LORA = "tiny-lora.safetensors"
MB = 1 << 20
# Latents by the strength of a LoRA.
Patched = Callable[[float], torch.Tensor]
# Of the latents and of a prompt: few, so that a step costs little.
SIDE, TOKENS = 8, 4


def sample(model: Any, seed: int = 3, steps: int = 3) -> torch.Tensor:
    """Latents by the host's KSampler, under inference mode as in a prompt."""
    generator = torch.Generator().manual_seed(1)
    conditioning = [
        [torch.randn(1, TOKENS, 768, generator=generator), {"pooled_output": torch.randn(1, 768, generator=generator)}]
    ]
    latent = {"samples": torch.zeros(1, 16, SIDE, SIDE)}
    with torch.inference_mode():
        result = host_nodes.common_ksampler(
            model, seed, steps, 1.0, "euler", "simple", conditioning, conditioning, latent
        )
    return result[0]["samples"]


def settle(model: Any) -> None:
    """Sample until the plan is settled and everything is page-locked."""
    for _ in range(2):
        sample(model)
        model.streamer.finish_building()
    sample(model)


def with_lora(model: Any, strength: float) -> Any:
    with torch.inference_mode():
        return host_nodes.LoraLoaderModelOnly().load_lora_model_only(model, LORA, strength)[0]


def sample_with_hook(model: Any, mode: comfy.hooks.EnumHookMode) -> torch.Tensor:
    """Sample with a LoRA that hangs on the positive conditioning alone: weights change within each step."""
    model = model.clone()
    model.hook_mode = mode
    lora = comfy.utils.load_torch_file(folder_paths.get_full_path_or_raise("loras", LORA))
    hooks = comfy.hooks.create_hook_lora(lora=lora, strength_model=0.6, strength_clip=0.0)
    generator = torch.Generator().manual_seed(1)
    context = torch.randn(1, TOKENS, 768, generator=generator)
    extras: dict[str, Any] = {"pooled_output": torch.randn(1, 768, generator=generator)}
    positive = comfy.hooks.set_hooks_for_conditioning([[context, extras]], hooks)
    latent = {"samples": torch.zeros(1, 16, SIDE, SIDE)}
    with torch.inference_mode():
        result = host_nodes.common_ksampler(
            model, 3, 3, 2.0, "euler", "simple", positive, [[context, dict(extras)]], latent
        )
    return result[0]["samples"]
