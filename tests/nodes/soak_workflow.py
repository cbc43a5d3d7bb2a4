"""The nodes of the soak's prompts, as the host runs them: what a node gave is kept for the next prompt.

Four FLUX, each with a LoRA: the plain one, one that runs in bfloat16 everywhere, and so may be packed, one with
quantised weights, and one of another shape in a file that cannot be mapped, so that a streamed twin shares its memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from quantised import FORMATS, write_quantised
from safetensors.torch import load_file
from soak_prompts import FILES, Node
from weightstream_pack.nodes.loader import StreamedModelLoader, load_streamed
from weightstream_pack.nodes.settings import AsyncOffloadSettings

from tools.checkpoints import FLUX_SIZES, FluxSize, flux_lora_tensors, flux_tensors, write_checkpoint

# Outputs of nodes that are kept: those of the last three or four prompts.
CACHED = 8
# What ComfyUI is told of a model; by itself it runs all in float32 on a CPU.
OPTIONS: dict[str, dict[str, Any]] = {"half": {"dtype": torch.bfloat16}}


class Workflow:
    """Nodes in a row, from a loader on.

    Args:
        folder: of the files.

    Attributes:
        cache: what the last nodes in a row gave, by all of them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kinds = {
            "ours": self._load_by_us,
            "host's": self._load_by_host,
            "settings": self._with_settings,
            "lora": self._with_lora,
        }
        self.cache: dict[tuple[Node, ...], ModelPatcher] = {}

    def output(self, *nodes: Node) -> ModelPatcher:
        """What the last of ``nodes`` gives. What was asked for longest ago goes first, also from in front of others."""
        model = self.cache.pop(nodes, None)
        if model is None:
            *before, (kind, *values) = nodes
            inputs = [self.output(*before)] if before else []
            with torch.inference_mode():
                model = self._kinds[kind](*inputs, *values)
        self.cache[nodes] = model
        while len(self.cache) > CACHED:
            del self.cache[next(iter(self.cache))]
        return model

    def _load_by_us(self, name: str, limit: int) -> ModelPatcher:
        if name in OPTIONS:  # The loader has no choice for them.
            return load_streamed(str(self._folder / FILES[name]), OPTIONS[name], limit or None)
        return StreamedModelLoader.execute(FILES[name], "default", limit / 1024**3).args[0]

    def _load_by_host(self, name: str) -> ModelPatcher:
        return comfy.sd.load_diffusion_model(str(self._folder / FILES[name]), model_options=OPTIONS.get(name, {}))

    def _with_settings(self, model: ModelPatcher, mode: str, limit: int, packing: str) -> ModelPatcher:
        settings = {"mode": mode, "vram_limit_gb": limit / 1024**3, "packing": packing}
        return AsyncOffloadSettings.execute(model, **settings).args[0]

    def _with_lora(self, model: ModelPatcher, name: str, strength: float) -> ModelPatcher:
        lora = comfy.utils.load_torch_file(str(self._folder / f"{name}-lora.safetensors"))
        return comfy.sd.load_lora_for_models(model, None, lora, strength, 0)[0]


def write_files(folder: Path) -> None:
    tiny = FLUX_SIZES["tiny"]
    other = FluxSize(tiny.hidden, 3, 3, tiny.context, tiny.pooled, tiny.guidance)
    original = folder / "original.safetensors"
    for seed, (name, size) in enumerate(zip(FILES, (tiny, tiny, tiny, other), strict=True)):
        write_checkpoint(original, flux_tensors(size), seed)
        write_checkpoint(folder / f"{name}-lora.safetensors", flux_lora_tensors(size, 8), seed)
        if name == "quantised":
            write_quantised(original, folder / FILES[name], FORMATS["fp8"])
        elif name == "pickled":
            torch.save(load_file(original), folder / FILES[name])
        else:
            original.rename(folder / FILES[name])
    original.unlink()
