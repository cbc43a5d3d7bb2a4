"""GPUs that no machine needs to have: tensors are fake ones, which have no values, or for some families placed ones
(placed.py). Either way an operation on tensors of two devices raises."""

from __future__ import annotations

import functools
import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from family import Family
from family_models import latent_shape
from placed import Placed, PlacedMode
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from weightstream.streaming.split.links import Links

GPUS = [torch.device("cuda", index) for index in range(3)]
HOME = GPUS[0]

# What the host reads of tensors without values: families, and for what.
WITH_VALUES = {
    "HiDream": "which tokens each expert gets",
    "HiDreamO1": "token ids",
    "Omnigen2": "whether a mask hides something",
    "Boogu": "whether a mask hides something",
    "GenmoMochi": "how many tokens a mask leaves",
    "MiniMaxH3": "where a grid begins and ends",
    "SeedVR2": "the sizes of windows",
    "ACEStep15": "whether the text is empty",
    "ACEStep15, timbre": "whether the text is empty",
    "Omnigen2, reference": "whether a mask hides something",
    "Boogu, a reference": "whether a mask hides something",
    "Hunyuan3Dv2_1": "how many tokens each expert gets",
    **{f"Trellis2, {way}": "where voxels are" for way in ("small shape", "shape", "texture", "texture alone")},
}


class SoundLinks(Links):
    def is_sound(self, source: torch.device, target: torch.device) -> bool:
        return True


@contextmanager
def gpus(values: bool) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Devices that no machine needs to have, for tensors with values or without.

    Gives what another thread enters to have the same ones.
    """
    fakes, placed = FakeTensorMode(allow_non_fake_inputs=True), PlacedMode() if values else nullcontext()

    @contextmanager
    def same() -> Iterator[None]:
        # Inference mode would keep torch from taking operations apart, and it could not move what it has the values of.
        with torch.no_grad(), fakes, placed:
            yield

    try:
        with same():
            yield same
    finally:
        forget_tables()


def forget_tables() -> None:
    """The host remembers tables of models for the whole process. A fake one would give the next model noise."""
    for kept in tables(len(sys.modules)):
        kept.cache_clear()


@functools.lru_cache(maxsize=1)
def tables(modules: int) -> list[Any]:
    """The host's caches; looked for again when there are more modules."""
    return [
        kept
        for kept in gc.get_objects()
        if type(kept) is functools._lru_cache_wrapper and (kept.__module__ or "").startswith("comfy.")
    ]


def plenty(device: torch.device | None = None, torch_free_too: bool = False) -> int | tuple[int, int]:
    """What the host is told where it asks how much memory is free."""
    return (2**40, 2**40) if torch_free_too else 2**40


def devices(value: Any) -> set[torch.device]:
    return {tensor.device for tensor in tree_leaves(value) if isinstance(tensor, torch.Tensor)}


def move(module: nn.Module, place: torch.device, values: bool) -> None:
    """Its own tensors, to a device."""
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            moved = on(tensor, place, values)
            if weakref.getweakrefcount(moved):  # As torch keeps one to the first of a kind, and refuses ``module.to``.
                moved = on(tensor, place, values)
            tensors[name] = moved


def on(tensor: torch.Tensor, place: torch.device, values: bool) -> torch.Tensor:
    if values:
        moved = Placed(tensor.detach().clone(), place)
    else:
        moved = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=place)
    return nn.Parameter(moved, False) if isinstance(tensor, nn.Parameter) else moved


def denoise(model: nn.Module, family: Family, patched: Any = None) -> torch.Tensor:
    """One step of the host's sampling, conditioning included."""
    patcher = model.current_patcher = ModelPatcher(model, HOME, torch.device("cpu"))
    if patched is not None:
        patcher.set_model_unet_function_wrapper(patched)
    extras = {key: torch.randn(shape) for key, shape in family.extras.items()} | family.values
    context = None if family.context is None else torch.randn(family.context)
    noises = [torch.randn(shape, device=HOME) for shape in family.latent or (latent_shape(model),)]
    noise, shapes = comfy.utils.pack_latents(noises) if len(noises) > 1 else (noises[0], [noises[0].shape])
    conds = {key: comfy.sampler_helpers.convert_cond([[context, extras]]) for key in ("positive", "negative")}
    conds = comfy.samplers.process_conds(
        model, noise, conds, HOME, torch.zeros_like(noise), None, 2, latent_shapes=shapes
    )
    sigma = torch.full((noise.shape[0],), 0.5, device=HOME)
    return comfy.samplers.sampling_function(
        model, noise, sigma, conds["negative"], conds["positive"], 2.0, patcher.model_options, 2
    )
