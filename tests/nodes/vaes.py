"""A small VAE with random weights, as a file of the host's own format."""

from __future__ import annotations

from pathlib import Path

import comfy.sd
import comfy.taesd.taesd
import torch
from safetensors.torch import save_file

import nodes as host_nodes

VAE = "small-vae.safetensors"


def write_vae(path: Path) -> None:
    torch.manual_seed(2)
    small = comfy.taesd.taesd.TAESD(latent_channels=16)
    for parameter in small.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    save_file({name: tensor.contiguous() for name, tensor in small.state_dict().items()}, path)


def decode(vae: comfy.sd.VAE) -> torch.Tensor:
    """What the host's node gives for one latent."""
    latent = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return host_nodes.VAEDecode().decode(vae, {"samples": latent})[0]
