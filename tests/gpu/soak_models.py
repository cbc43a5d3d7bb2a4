"""The models of the soak, whole as the host has them and streamed, and how a picture is asked of one."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.memory_management
import comfy.model_management as mm
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_easycache import EasyCacheNode
from comfy_extras.nodes_hooks import (
    CombineHooks,
    ConditioningSetProperties,
    CreateHookKeyframesInterpolated,
    CreateHookLoraModelOnly,
    SetHookKeyframes,
)
from controlnets import CONTROLNET, write_controlnet
from families import FAMILIES
from family_models import build_tiny
from prompts import conditioning, latent, output
from sampling import LORA, MODEL
from soak_cases import STEPS, Picture, Prompt
from weightstream.nodes.host.devices import make_backend
from weightstream.nodes.loader import load_streamed
from weightstream.nodes.model.offload import OffloadSettings
from weightstream.nodes.model.parts import split_blocks
from weightstream.nodes.model.patcher import StreamedModelPatcher
from weightstream.nodes.model.streamed_model import ATTRIBUTE, StreamedModel, model_dtype
from weightstream.nodes.tell.progress import LoadingBar
from weightstream.streaming import PackingMode, Streamer, StreamingConfig, cut_model

import nodes as host_nodes
from tools.checkpoints import write_flux, write_flux_lora

CAUSAL = "WAN21_CausalAR_T2V"
# Streamed models that are kept for the next prompt.
KEPT = 3


class Models:
    """Models by what they are, made once.

    Args:
        folder: for files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kept: OrderedDict[tuple[Any, ...], StreamedModelPatcher] = OrderedDict()
        self._whole: dict[tuple[str, bool], ModelPatcher] = {}
        for kind in ("diffusion_models", "loras", "controlnet"):
            folder_paths.add_model_folder_path(kind, str(folder))
        write_flux(folder / MODEL)
        write_flux_lora(folder / LORA)
        write_controlnet(folder / CONTROLNET)
        with torch.inference_mode():
            self._net = host_nodes.ControlNetLoader().load_controlnet(CONTROLNET)[0]
        self._lora = comfy.utils.load_torch_file(str(folder / LORA))

    def whole(self, picture: Picture) -> ModelPatcher:
        """The model as the host runs it."""
        key = (picture.family, picture.half)
        if key not in self._whole:
            if picture.family == "flux":
                with torch.inference_mode():
                    model = comfy.sd.load_diffusion_model(str(self._folder / MODEL), model_options=_options(picture))
            else:
                model = ModelPatcher(_causal(), mm.get_torch_device(), torch.device("cpu"))
            self._whole[key] = model
        return self._whole[key]

    def streamed(self, prompt: Prompt) -> StreamedModelPatcher:
        """The model that ``prompt`` asks for; the one from before where there is one, whatever was packed of it."""
        key = (prompt.picture.family, prompt.picture.half, prompt.devices, prompt.limit)
        if key not in self._kept:
            while len(self._kept) >= KEPT:
                self._kept.popitem(last=False)
            self._kept[key] = self._make(prompt)
        self._kept.move_to_end(key)
        model = self._kept[key].clone()
        model.settings = replace(model.settings, packing=PackingMode(prompt.packing))
        return model

    def forget(self) -> None:
        """The next prompts load their models anew."""
        mm.unload_all_models()
        self._kept.clear()

    def _make(self, prompt: Prompt) -> StreamedModelPatcher:
        with torch.inference_mode():
            if prompt.picture.family == "flux":
                model = load_streamed(str(self._folder / MODEL), _options(prompt.picture))
            else:
                model = _streamed(CAUSAL, _causal())
            if prompt.devices > 1:
                split_blocks(model, _devices(prompt.devices), [1.0] * prompt.devices)
        least = max(streamer.minimum_bytes for streamer in model.streamers)
        largest = max(streamer.model_bytes for streamer in model.streamers)
        if prompt.limit:
            model.settings = OffloadSettings(vram_limit=int(least + prompt.limit * (largest - least)))
        return model

    # -- pictures ------------------------------------------------------------------------------------------------

    def dressed(self, model: ModelPatcher, picture: Picture, hook_mode: str) -> ModelPatcher:
        """A clone with the LoRAs and the other nodes of ``picture``."""
        with torch.inference_mode():
            model = model.clone()
            model.hook_mode = comfy.hooks.EnumHookMode[hook_mode]
            for strength in picture.loras:
                model = comfy.sd.load_lora_for_models(model, None, self._lora, strength, 0)[0]
            if picture.easycache:
                model = output(EasyCacheNode.execute(model, 1.5, 0.1, 0.95, False))
        return model

    def sample(self, model: ModelPatcher, picture: Picture) -> torch.Tensor:
        """The latent of ``picture``, by the host's sampler."""
        with torch.inference_mode():
            return _sample_causal(model, picture) if picture.family == "causal" else self._sample_flux(model, picture)

    def _sample_flux(self, model: ModelPatcher, picture: Picture) -> torch.Tensor:
        positive, negative = conditioning(1), conditioning(2)
        if picture.hooks:
            (positive,) = ConditioningSetProperties().set_properties(positive, 1.0, "default", hooks=_hooks(picture))
        if picture.controlnet:
            image = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(4))
            positive, negative = host_nodes.ControlNetApplyAdvanced().apply_controlnet(
                positive, negative, self._net, image, 0.8, 0.0, 0.7
            )
        options = (picture.seed, STEPS, 2.5, "euler", "simple", positive, negative, latent())
        return host_nodes.common_ksampler(model, *options)[0]["samples"]


def _options(picture: Picture) -> dict[str, Any]:
    return {"dtype": torch.bfloat16} if picture.half else {}


def _hooks(picture: Picture) -> comfy.hooks.HookGroup:
    (frames,) = CreateHookKeyframesInterpolated().create_hook_keyframes(0.1, 1.4, "linear", 0.0, 1.0, STEPS)
    (hooks,) = CreateHookLoraModelOnly().create_hook_model_only(LORA, 0.9)
    (scheduled,) = SetHookKeyframes().set_hook_keyframes(hooks, frames)
    if picture.hooks == "interpolated":
        return scheduled
    return CombineHooks().combine_hooks(scheduled, CreateHookLoraModelOnly().create_hook_model_only(LORA, -0.3)[0])[0]


def _sample_causal(model: ModelPatcher, picture: Picture) -> torch.Tensor:
    generator = torch.Generator().manual_seed(picture.seed)
    noise = torch.randn((1, 16, 3, 8, 8), generator=generator)
    context = [[torch.randn((1, 8, 64), generator=generator), {}]]
    sampler = comfy.samplers.ksampler("ar_video", {"num_frame_per_block": 1})
    sigmas = torch.tensor([1.0, 0.7, 0.3, 0.0])
    options: dict[str, Any] = {"disable_pbar": True, "seed": picture.seed}
    return comfy.sample.sample_custom(
        model, noise, 1.0, sampler, sigmas, context, context, torch.zeros_like(noise), **options
    )


def _causal() -> torch.nn.Module:
    """With dynamic VRAM on, layers of the host have no weights until a file is loaded."""
    enabled, comfy.memory_management.aimdo_enabled = comfy.memory_management.aimdo_enabled, False
    try:
        return build_tiny(CAUSAL, FAMILIES[CAUSAL])
    finally:
        comfy.memory_management.aimdo_enabled = enabled


def _streamed(name: str, model: torch.nn.Module) -> StreamedModelPatcher:
    gpu, cpu = mm.get_torch_device(), torch.device("cpu")
    blocks = cut_model(model, model_dtype, minimum_share=0)
    streamer = Streamer(model.diffusion_model, blocks, make_backend(gpu), StreamingConfig())
    setattr(model, ATTRIBUTE, StreamedModel(name, streamer, None, LoadingBar(None)))
    return StreamedModelPatcher(model, gpu, cpu, streamer.model_bytes)


def _devices(count: int) -> list[torch.device]:
    kind = mm.get_torch_device().type
    return [torch.device(kind, index) for index in range(count)]
