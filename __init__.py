"""WeightStream: a diffusion transformer that does not fit in VRAM, at nearly the speed of one that does.

ComfyUI calls :func:`comfy_entrypoint`. Nothing else happens when this file is imported: no CUDA call, no thread, no
import of torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_api.latest import ComfyExtension

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> ComfyExtension:
    """The pack's nodes and routes, for ComfyUI."""
    from .nodes.extension import WeightStreamExtension

    return WeightStreamExtension()
