"""What families are for: their references, masks, frames and samplers, beside the plain use of each."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from family import Family, noise
from image_families import IMAGES
from unet_families import UNETS
from video_families import VIDEOS

FAMILIES: dict[str, Family] = {**UNETS, **IMAGES, **VIDEOS}

PICTURE, FRAME, FRAMES = (1, 16, 16, 16), (1, 16, 1, 16, 16), (1, 16, 2, 16, 16)
MASK, FRAMES_MASK = torch.ones(1, 1, 16, 16), torch.ones(1, 1, 2, 16, 16)
MASK[..., :8] = FRAMES_MASK[..., :8] = 0.0

# Frames are made one after another, from keys and values that blocks write down for those before.
ONE_BY_ONE = ("ar_video", {"num_frame_per_block": 1})


def use(name: str, sampler: tuple[str, dict[str, Any]] | None = None, latent: Any = (), **values: Any) -> Any:
    family = FAMILIES[name]
    latent = latent or family.latent
    return name, replace(family, values=family.values | values, sampler=sampler, latent=latent)


def references(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [noise(*shape) for shape in shapes]


def seen(*shape: int) -> list[dict[str, Any]]:
    """What a model that is told of a picture gets of it."""
    output = SimpleNamespace(image_embeds=noise(*shape))
    return [{"clip_vision_output": output, "strength": 0.75, "noise_augmentation": 0.25}]


# By what is used of them: the host's names for the families, and how to make and run them.
USES = {
    "frame by frame": use("WAN21_CausalAR_T2V", ONE_BY_ONE, latent=((1, 16, 3, 8, 8),)),
    "two references": use("Flux", reference_latents=references(PICTURE, (1, 16, 8, 8))),
    "references": use("Flux2", reference_latents=references((1, 128, 16, 16))),
    "references, in place": use(
        "QwenImage", reference_latents=references(PICTURE), reference_latents_method="index_timestep_zero"
    ),
    "reference": use("Omnigen2", reference_latents=references(PICTURE)),
    "a reference": use("Boogu", reference_latents=references(PICTURE)),
    "masked": use("FluxInpaint", concat_latent_image=noise(*PICTURE), concat_mask=MASK),
    "a picture that it was told of": use("SD21UnclipH", unclip_conditioning=seen(1, 1024)),
    "prior": use("Stable_Cascade_B", stable_cascade_prior=noise(1, 16, 6, 6)),
    "a subject": use("WAN21_T2V", time_dim_concat=noise(*FRAME)),
    "first frame": use("WAN21_I2V", concat_latent_image=noise(*FRAMES), concat_mask=FRAMES_MASK),
    "two controls": use(
        "WAN21_Vace",
        vace_frames=references((1, 32, 2, 16, 16), (1, 32, 2, 16, 16)),
        vace_mask=[torch.ones(1, 64, 2, 16, 16)] * 2,
        vace_strength=[1.0, 0.5],
    ),
    "reference and audio": use("WAN21_HuMo", reference_latents=references(FRAME)),
    "picture": use("HunyuanVideoI2V", concat_latent_image=noise(*FRAMES), guiding_frame_index=0),
    "held frames": use("CosmosT2IPredict2", denoise_mask=FRAMES_MASK),
    "timbre": use("ACEStep15", reference_audio_timbre_latents=references((1, 64, 32))),
}
