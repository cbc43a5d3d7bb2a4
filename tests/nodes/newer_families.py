"""Families that ComfyUI 0.33 has and 0.30 has not."""

from __future__ import annotations

from typing import Any

import torch
from family import LAYERS, Family, noise, vision
from video_families import TINY_WAN, WAN

SINCE = "0.33"

ANIMATE = WAN | {"model_type": "animate2", "in_dim": 36}
TINY_ANIMATE = TINY_WAN | {"num_layers": 5}
# Its sizes are in the host's code.
NARROW_MUSIC = {2304: 320, 2048: 64, 8192: 128}
TRELLIS = {"image_model": "trellis2", "resolution": 32, "init_txt_model": True, "txt_only": False, "num_heads": 12}
TINY_TRELLIS = {"model_channels": 96, "cond_channels": 64, "num_blocks": 4, "num_heads": 2, "mlp_ratio": 2.0}
# Three voxels to each side.
VOXELS = torch.cartesian_prod(torch.tensor([0]), *[torch.arange(3)] * 3).int()


def _trellis(stage: str = "", size: dict[str, Any] = TRELLIS, **values: Any) -> Family:
    """One of its models in a stage; by default the first one, of which structures come."""
    if stage:
        values |= {"trellis2_coords": VOXELS, "trellis2_coord_counts": torch.tensor([len(VOXELS)])}
        values |= {"trellis2_generation_mode": stage}
    latent = ((1, 32, len(VOXELS), 1),) if stage else ((1, 32, 16, 16, 16),)
    extras = {"embeds": (1, 8, 64)}
    return Family(size, TINY_TRELLIS, extras=extras, values=values, latent=latent, since=SINCE)


NEWER = {
    "WAN_Animate2": Family(
        ANIMATE, TINY_ANIMATE, extras={"pose_video_latent": (1, 16, 1, 16, 16)}, values=vision(1280), since=SINCE
    ),
    "MiniMaxMusic3": Family(
        {"audio_model": "minimax_music3"},
        {},
        context=(1, 8, 8 * 4096),
        extras={"conditioning_scale": (1, 1, 1)},
        latent=((1, 128, 20),),
        narrow=NARROW_MUSIC,
        narrow_parts=(*LAYERS, "comfy.ldm.minimax_music.dit.TransformerBlock"),
        since=SINCE,
    ),
    "Trellis2": _trellis(),
}

# Other ways to use them, by the names of families: other parts of them run, or others of their models.
WAYS = {
    "without pose": ("WAN_Animate2", Family(ANIMATE, TINY_ANIMATE, values=vision(1280), since=SINCE)),
    "small shape": ("Trellis2", _trellis("shape_generation_512")),
    "shape": ("Trellis2", _trellis("shape_generation")),
    "texture": ("Trellis2", _trellis("texture_generation", trellis2_shape_slat=noise(len(VOXELS), 32))),
    "texture alone": (
        "Trellis2",
        _trellis("texture_generation", TRELLIS | {"txt_only": True}, trellis2_shape_slat=noise(len(VOXELS), 32)),
    ),
}
