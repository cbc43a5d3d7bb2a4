"""Models of the host's families, of real size without memory or tiny with random weights, and their sampling."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.model_management as mm
import comfy.sample
import comfy.samplers
import comfy.supported_models
import comfy.supported_models_base
import pytest
import torch
from comfy.ldm.audio.embedders import NumberConditioner
from comfy.model_patcher import ModelPatcher
from comfy.nested_tensor import NestedTensor
from family import Family
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from weightstream.nodes.model.patcher import StreamedModelPatcher
from weightstream.nodes.model.streamed_model import ATTRIBUTE, StreamedModel, model_dtype
from weightstream.nodes.tell.progress import LoadingBar
from weightstream.streaming import (
    BlockSet,
    CpuBackend,
    Streamer,
    StreamingConfig,
    VirtualMemory,
    assumed_profile,
    cut_model,
    minimum_bytes,
)
from weightstream.streaming.model.shown import memory_of

STEPS = 3

# What may read host memory: a view, and copies, which go from device to device.
COPIES = (torch.ops.aten.detach.default, torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)


class _WithoutMemory(TorchFunctionMode):
    """What is made without values, as the host makes weights, exists on the meta device alone."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.empty:
            kwargs = kwargs | {"device": "meta"}
        return function(*args, **kwargs)


class _WithValues(TorchFunctionMode):
    """What is made without values gets some: the host leaves memory as it happens to be, for a checkpoint to fill."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.empty:
            return result.uniform_() if result.is_floating_point() else result.zero_()
        return result


def build(name: str, family: Family) -> torch.nn.Module:
    """The family's model in a published size, made by the host, with no memory for its weights."""
    with _WithoutMemory():
        return _build(name, family, {}, torch.bfloat16)


def build_tiny(name: str, family: Family) -> torch.nn.Module:
    """A small version with random weights, the same each time."""
    return make_tiny(lambda: _build(name, family, family.tiny, torch.float32), family)


def build_tiny_outline(name: str, family: Family) -> torch.nn.Module:
    """A small version whose weights nobody may read: they are what was in memory before."""
    with torch.random.fork_rng(), _narrow(family):
        return _build(name, family, family.tiny, torch.float32)


def make_tiny(make: Callable[[], torch.nn.Module], family: Family) -> torch.nn.Module:
    """What ``make`` makes, with random weights, the same each time."""
    with torch.random.fork_rng(), _WithValues(), _narrow(family):
        torch.manual_seed(0)
        model = make()
        _fill(model)
    return model


@contextmanager
def _narrow(family: Family) -> Iterator[None]:
    """Parts of the model are given other sizes than the host's code has."""

    def narrowed(kind: type) -> type:
        def build(self: Any, *sizes: Any, **named: Any) -> None:
            narrowed = (family.narrow.get(size, size) for size in sizes)
            kind.__init__(self, *narrowed, **named | family.narrow_named)

        return type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__})

    with pytest.MonkeyPatch.context() as patch:
        for name in family.narrow_parts if family.narrow or family.narrow_named else ():
            patch.setattr(name, narrowed(pkgutil.resolve_name(name)))
        yield


def _build(name: str, family: Family, smaller: dict[str, Any], dtype: torch.dtype) -> torch.nn.Module:
    return build_config(getattr(comfy.supported_models, name), family, smaller, dtype)


def build_config(
    kind: type[comfy.supported_models_base.BASE], family: Family, smaller: dict[str, Any], dtype: torch.dtype
) -> torch.nn.Module:
    """The model of an entry of the host's list, which may be one that is not on it."""
    config = kind(dict(family.size))
    config.unet_config.update(smaller)
    config.set_inference_dtype(dtype, None)
    with torch.inference_mode(False):
        return config.get_model(_weights(family), "", device=torch.device("cpu")).eval()


def _weights(family: Family) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint that the host takes already when it builds the model."""
    weights = {key: torch.randn(shape) for key, shape in family.weights.items()}
    for prefix in family.conditioners:
        kind = family.size["timestep_features_type"]
        for key, tensor in NumberConditioner(768, fourier_features_type=kind).state_dict().items():
            weights[f"{prefix}.{key}"] = tensor
    return weights


def _fill(model: torch.nn.Module) -> None:
    """Random weights with which numbers neither vanish nor explode."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape)
        if parameter.ndim > 1:
            value = noise / (parameter.numel() / parameter.shape[0]) ** 0.5
        else:
            value = 0.1 * noise + (0.0 if name.endswith("bias") else 1.0)
        parameter.data.copy_(value)


def whole(model: torch.nn.Module) -> ModelPatcher:
    """The model as the host runs it."""
    return ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def streamed(name: str, model: torch.nn.Module) -> StreamedModelPatcher:
    """The same model on a virtual device with the least room with which it streams."""
    blocks = cut_model(model, model_dtype, minimum_share=0)
    memory = VirtualMemory(minimum_bytes(blocks.outline, assumed_profile(blocks.outline)))
    streamer = Streamer(model.diffusion_model, blocks, CpuBackend(memory), StreamingConfig(headroom_bytes=0))
    setattr(model, ATTRIBUTE, StreamedModel(name, streamer, None, LoadingBar(None)))
    return StreamedModelPatcher(model, torch.device("cpu"), torch.device("cpu"), streamer.model_bytes)


def share_in_blocks(blocks: BlockSet) -> float:
    outline = blocks.outline
    return 1 - outline.rest_bytes / outline.model_bytes


def sample(model: ModelPatcher, family: Family) -> torch.Tensor:
    """Latents by the host's sampler, several of them flat and one behind another."""
    generator = torch.Generator().manual_seed(1)

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    extras = {key: random(shape) for key, shape in family.extras.items()} | family.values
    context = None if family.context is None else random(family.context)
    noises = [random(shape) for shape in family.latent or (latent_shape(model.model),)]
    noise = noises[0] if len(noises) == 1 else NestedTensor(noises)
    empty = torch.zeros_like(noises[0]) if len(noises) == 1 else NestedTensor([torch.zeros_like(n) for n in noises])
    conditioning = [[context, extras]]
    name, options = family.sampler or ("euler", {})
    sampler = comfy.samplers.ksampler(name, options)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)
    with torch.inference_mode():
        latents = comfy.sample.sample_custom(
            model, noise, 1.0, sampler, sigmas, conditioning, conditioning, empty, disable_pbar=True, seed=2
        )
    return torch.cat([latent.flatten() for latent in (latents.unbind() if latents.is_nested else [latents])])


def latent_shape(model: torch.nn.Module) -> tuple[int, ...]:
    latent = model.latent_format
    sides = {1: (16,), 2: (16, 16), 3: (2, 16, 16)}[latent.latent_dimensions]
    return 1, latent.latent_channels, *sides


@dataclass(frozen=True)
class Misplaced:
    """A kernel was given a weight in host memory: on a GPU that is an error."""

    unit: str
    kernel: str


class HostWeights(TorchDispatchMode):
    """Finds kernels that read streamed weights where they lie between the runs of their blocks."""

    def __init__(self, streamer: Streamer) -> None:
        super().__init__()
        self.found: set[Misplaced] = set()
        self._names: dict[int, str] = {}
        streamed = {unit for segment in streamer.plan.segments for unit in segment.units}
        for unit in (streamer.blocks.units[number] for number in streamed):
            for value in unit.layout.values:
                for place in value.places:
                    tensor = place.holder[place.attribute]
                    self._names[memory_of(tensor).untyped_storage().data_ptr()] = unit.name

    def __torch_dispatch__(self, kernel: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor) and not torch.is_complex(value):
                name = self._names.get(memory_of(value).untyped_storage().data_ptr())
                if name is not None and kernel not in COPIES:
                    self.found.add(Misplaced(name, str(kernel)))
        return kernel(*args, **(kwargs or {}))


@contextmanager
def unloaded() -> Iterator[None]:
    """Nothing stays loaded behind."""
    try:
        yield
    finally:
        mm.unload_all_models()
        mm.cleanup_models_gc()
