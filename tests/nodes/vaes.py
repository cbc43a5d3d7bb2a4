"""VAEs with random weights, as files of the host's own formats, and what its nodes do with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import comfy.ldm.wan.vae
import comfy.sd
import comfy.taesd.taesd
import torch
from comfy.ldm.models.autoencoder import AutoencodingEngine
from safetensors.torch import save_file

import nodes as host_nodes

VAE = "small-vae.safetensors"
MODULES = "comfy.ldm.modules.diffusionmodules.model"
CHANNELS = 16


def write_vae(path: Path) -> None:
    torch.manual_seed(2)
    small = comfy.taesd.taesd.TAESD(latent_channels=CHANNELS)
    for parameter in small.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    save_file({name: tensor.contiguous() for name, tensor in small.state_dict().items()}, path)


def decode(vae: comfy.sd.VAE) -> torch.Tensor:
    """What the host's node gives for one latent."""
    with torch.inference_mode():
        return host_nodes.VAEDecode().decode(vae, {"samples": _random(1, CHANNELS, 8, 8)})[0]


@dataclass(frozen=True)
class Kind:
    """An architecture.

    Attributes:
        make: gives one, as narrow as the host recognises it.
        latent: the shape of a latent.
        pixels: of images, or of a video's frames.
    """

    make: Callable[[], torch.nn.Module]
    latent: tuple[int, ...]
    pixels: tuple[int, ...]


def _flux() -> torch.nn.Module:
    narrow = {"double_z": True, "z_channels": CHANNELS, "resolution": 256, "in_channels": 3, "out_ch": 3}
    narrow |= {"ch": 32, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}
    return AutoencodingEngine(
        regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
        encoder_config={"target": f"{MODULES}.Encoder", "params": {**narrow, "ch": 128}},
        decoder_config={"target": f"{MODULES}.Decoder", "params": narrow},
    )


def _wan(channels: int = 3) -> torch.nn.Module:
    return comfy.ldm.wan.vae.WanVAE(
        dim=8,
        z_dim=CHANNELS,
        temperal_downsample=[False, True, True],
        image_channels=channels,
        conv_out_channels=channels,
    )


# FLUX's, Wan's with frames, and Qwen-Image's, which is Wan's for images, and with a channel more for layers.
KINDS = {
    "flux": Kind(_flux, (1, CHANNELS, 8, 8), (1, 40, 40, 3)),
    "wan": Kind(_wan, (1, CHANNELS, 2, 8, 8), (5, 40, 40, 3)),
    "qwen": Kind(_wan, (1, CHANNELS, 1, 8, 8), (1, 40, 40, 3)),
    "qwen-layered": Kind(lambda: _wan(4), (1, CHANNELS, 1, 8, 8), (1, 40, 40, 4)),
}


def write_kind(kind: str, path: Path, dtype: torch.dtype = torch.float32) -> None:
    torch.manual_seed(3)
    model = KINDS[kind].make()
    for name, parameter in model.named_parameters():
        fan_in = parameter[0].numel()
        if parameter.dim() > 1 and fan_in > 1:
            torch.nn.init.normal_(parameter, std=fan_in**-0.5)
        else:
            torch.nn.init.uniform_(parameter, -0.2, 0.2)
            parameter.data += 0.0 if name.endswith("bias") else 1.0
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()}, path)


def load_vae(name: str) -> comfy.sd.VAE:
    with torch.inference_mode():
        return host_nodes.VAELoader().load_vae(name)[0]


def results(vae: comfy.sd.VAE, kind: str) -> dict[str, torch.Tensor]:
    """What decoding and encoding give, whole and in tiles."""
    latent, pixels = _random(*KINDS[kind].latent), _random(*KINDS[kind].pixels).sigmoid()
    with torch.inference_mode():
        return {
            "decoded": vae.decode(latent),
            "decoded in tiles": vae.decode_tiled(latent, tile_x=6, tile_y=6, overlap=2),
            "encoded": vae.encode(pixels),
            "encoded in tiles": vae.encode_tiled(pixels, tile_x=32, tile_y=32, overlap=8),
        }


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))
