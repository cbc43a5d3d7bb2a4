"""The node "GPU Placement" as tests call it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from weightstream.nodes.gpu_placement import GpuPlacement
from weightstream.streaming import VirtualMemory

CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cpu", 0), torch.device("cpu", 1)

Machine = Callable[..., tuple[VirtualMemory, ...]]


def place(model: Any, *, clip: Any = None, vae: Any = None, **inputs: Any) -> tuple[Any, Any, Any]:
    with torch.inference_mode():
        return GpuPlacement.execute(model, clip, vae, **inputs).result


def place_clip(model: Any, clip: Any, device: str) -> Any:
    return place(model, devices="gpu:0", clip=clip, clip_device=device)[1]


def place_vae(model: Any, vae: Any, device: str) -> Any:
    return place(model, devices="gpu:0", vae=vae, vae_device=device)[2]
