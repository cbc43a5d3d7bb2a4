"""The host's own sampler, and its LoRA loader, on the tiny FLUX."""

from __future__ import annotations

from typing import Any

import torch

import nodes as host_nodes

MODEL = "tiny-flux.safetensors"
LORA = "tiny-lora.safetensors"
MB = 1 << 20


def sample(model: Any, seed: int = 3, steps: int = 3) -> torch.Tensor:
    """Latents by the host's KSampler, under inference mode as in a prompt."""
    generator = torch.Generator().manual_seed(1)
    conditioning = [
        [torch.randn(1, 16, 768, generator=generator), {"pooled_output": torch.randn(1, 768, generator=generator)}]
    ]
    latent = {"samples": torch.zeros(1, 16, 16, 16)}
    with torch.inference_mode():
        result = host_nodes.common_ksampler(
            model, seed, steps, 1.0, "euler", "simple", conditioning, conditioning, latent
        )
    return result[0]["samples"]


def with_lora(model: Any, strength: float) -> Any:
    with torch.inference_mode():
        return host_nodes.LoraLoaderModelOnly().load_lora_model_only(model, LORA, strength)[0]
