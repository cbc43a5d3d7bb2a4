"""A second model like one that came in, for us alone.

[Note: a model of our own]
What comes in is left as it is: other nodes may run it beside ours, and the host moves the weights of its own patchers.
So the model is built a second time by the factory that its loader left behind (``cached_patcher_init``), as views of
the mapped file, which takes neither the time nor the memory of a second copy. In all other cases the model is copied
without its weights, so that both use the same memory: where there is no factory, where it reads a file that cannot be
mapped, and where it makes another model than the one that came in, because somebody has exchanged a module, a method, a
setting or weights of that, or the file. Of a large weight samples are compared, all over it: all of them would have to
be read for that.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Iterator
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from comfy.model_patcher import ModelPatcher

from ..streaming import UnsupportedModelError, take_apart
from ..streaming.entries import Method
from .devices import unload
from .generators import generators_kept
from .loaded_state import ON_MODULES, forget, left_by_host, take_off
from .mapped import mapped_loading
from .references import refers_to
from .text_encoder import StepCall

logger = logging.getLogger(__name__)

# A model with less than this part of its bytes in files that are mapped would take its memory a second time.
MOSTLY = 0.5
# Elements of a weight that are compared, evenly spread from its first to its last.
SAMPLES = 256
# What the host writes to modules while it loads and runs a model.
ABOUT_LOADING = {"device", "training", "seed_key", "comfy_cast_weights", "prev_comfy_cast_weights", "skip_injection"}
ABOUT_LOADING |= {"comfy_force_cast_weights", "comfy_patched_weights", "lowvram_patch_counter", "model_lowvram"}
ABOUT_LOADING |= {"model_loaded_weight_memory", "model_offload_buffer_memory", "current_weight_patches_uuid"}
ABOUT_LOADING |= {"weight_function", "bias_function", "can_assign_sd", "manual_cast_dtype", "latent_shapes"}
ABOUT_LOADING |= {"execution_device"}
SETTINGS = (bool, int, float, str, type(None), torch.dtype)

Factory = Callable[..., ModelPatcher]

CANNOT_BE_CARRIED = (
    "refers to modules of the model that was loaded; connect this node directly behind the loader, and what changes "
    "the model behind this node"
)


class Twin(NamedTuple):
    """A model like another.

    Attributes:
        model: for us alone.
        locate: finds the part of a file that a tensor maps.
        factory: loads the same model the host's way; None where nobody knows how.
    """

    model: torch.nn.Module
    locate: Callable[[torch.Tensor], Any]
    factory: Factory | None


def make_twin(patcher: ModelPatcher) -> Twin:
    """A second model like that of ``patcher``, with original weights.

    Raises:
        UnsupportedModelError: none can be made.
    """
    if patcher.backup:
        take_off(patcher)  # Weights of the first one are patched.
    factory = factory_of(patcher)
    built = _build(factory) if factory is not None else None
    if built is not None and not alike(built.model, patcher.model):
        take_off(patcher)  # A clone that is loaded may have changed it for as long as it is.
        if not alike(built.model, patcher.model):
            logger.info("[WeightStream] its loader gives another model than the one here, so weights are shared")
            built = None
    if built is None:
        return Twin(_copy_without_weights(patcher), _nowhere, None)
    if not _is_mapped(built):
        logger.info("[WeightStream] its file cannot be mapped, so weights are shared")
        return Twin(_copy_without_weights(patcher), _nowhere, factory)
    return built


def alike(model: torch.nn.Module, other: torch.nn.Module, weights: bool = True) -> bool:
    """Whether two models have the same modules with the same methods and settings, and the same weights.

    With ``weights`` false only their shapes are compared.
    """
    return _shape(model) == _shape(other) and (not weights or _same_weights(model, other))


def _shape(model: torch.nn.Module) -> dict[str, tuple]:
    # By name: some of the host's classes are made anew for each model.
    return {
        name: (_name(type(module)), _functions(module), _settings(module), _shapes(module))
        for name, module in model.named_modules()
    }


def _name(thing: Any) -> tuple[str, str]:
    return getattr(thing, "__module__", ""), getattr(thing, "__qualname__", "")


def functions_of(model: torch.nn.Module) -> dict[str, dict[str, tuple[str, str]]]:
    """Functions that are on single modules of a model, and what they are called where they were defined."""
    found = {name: _functions(module) for name, module in model.named_modules()}
    return {name: functions for name, functions in found.items() if functions}


def _functions(module: torch.nn.Module) -> dict[str, tuple[str, str]]:
    return {name: _name(value) for name, value in _put_on(module) if not isinstance(value, type)}


def _put_on(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Callable things that somebody has put on this one instance, by their names; what is ours is what lies beneath."""
    for name, value in vars(module).items():
        if isinstance(value, Method):
            value = value.instead_of
        if callable(value) and name not in ON_MODULES and not isinstance(value, StepCall):
            yield name, value


def _settings(module: torch.nn.Module) -> dict[str, Any]:
    """Numbers and the like that a module computes with."""
    found = {name: value for name, value in vars(module).items() if name not in ABOUT_LOADING | ON_MODULES}
    return {name: value for name, value in found.items() if _is_setting(value)}


def _is_setting(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_setting, value))
    return isinstance(value, SETTINGS)


def _shapes(module: torch.nn.Module) -> dict[str, torch.Size]:
    held = {**module._parameters, **module._buffers}
    return {name: tensor.shape for name, tensor in held.items() if tensor is not None}


def _same_weights(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(_same_samples(one, two) for one, two in zip(_tensors(model), _tensors(other), strict=True))


def _tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """All plain tensors, those that others are made of included."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        # Not detach(): a Parameter of a node's inference mode that the host has moved outside of it gives a tensor then
        # of which torch makes no views.
        yield from take_apart(name, tensor.data)[0].values()


def _same_samples(one: torch.Tensor, two: torch.Tensor) -> bool:
    if one.shape != two.shape:
        return False
    first, second = (_samples(tensor) for tensor in (one, two))
    return torch.equal(first.to(second.dtype), second) or torch.equal(first, second.to(first.dtype))


def _samples(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.flatten()
    if flat.numel() > SAMPLES:
        flat = flat[torch.linspace(0, flat.numel() - 1, SAMPLES, dtype=torch.float64).long().to(flat.device)]
    return flat.cpu()


# -- by the factory --------------------------------------------------------------------------------------------------


def factory_of(patcher: ModelPatcher) -> Factory | None:
    """What loads the model of ``patcher`` anew; None where its loader has left nothing that does. It takes
    ``disable_dynamic``, as the host's clone does."""
    if patcher.cached_patcher_init is None:
        return None
    function, arguments, *index = patcher.cached_patcher_init
    return partial(_call, function, arguments, *index)


def _call(function: Callable[..., Any], arguments: tuple, index: int | None = None, **options: Any) -> ModelPatcher:
    found = function(*arguments, **options)
    patcher = found if index is None else found[index]
    patcher.cached_patcher_init = (function, arguments) if index is None else (function, arguments, index)
    return patcher


def _build(factory: Factory) -> Twin | None:
    """What the factory makes; None where it makes nothing."""
    try:
        with mapped_loading() as files, generators_kept():
            patcher = factory()
            unload(patcher)  # Loaders of text encoders may have loaded it.
            return Twin(patcher.model, files.locate, factory)
    except Exception as error:  # The file may be gone, and the loader another pack's.
        logger.info("[WeightStream] a model cannot be loaded a second time, so its weights are shared: %s", error)
        return None


def _is_mapped(twin: Twin) -> bool:
    """Whether most of it is in files that are mapped; the other way it would take its memory a second time."""
    tensors = [*_tensors(twin.model)]
    located = sum(tensor.nbytes for tensor in tensors if twin.locate(tensor) is not None)
    return located >= MOSTLY * sum(tensor.nbytes for tensor in tensors)


def _nowhere(tensor: torch.Tensor) -> None:
    """For tensors that are in memory alone."""


# -- by a copy -------------------------------------------------------------------------------------------------------


def _copy_without_weights(patcher: ModelPatcher) -> torch.nn.Module:
    """The modules of a model, with the weights of the original: the memory is the same, the parameters are others."""
    take_off(patcher)  # No weight is patched, or on a device, now.
    model = patcher.model
    modules = {id(module) for module in model.modules()}
    if any(refers_to(_plain_functions(module, modules), modules) for module in model.modules()):
        raise UnsupportedModelError(f"a function that was put on one of its modules {CANNOT_BE_CARRIED}")
    tensors = [*model.parameters(), *model.buffers()]
    staying = sum(tensor.nbytes for tensor in tensors if not _in_memory(tensor))
    if staying > (1 - MOSTLY) * sum(tensor.nbytes for tensor in tensors):
        raise UnsupportedModelError("its weights stay on a device")
    memo: dict[int, Any] = {id(tensor): _another(tensor) for tensor in tensors}
    twin = object.__new__(type(model))
    memo[id(model)] = twin
    shared = {name: getattr(model, name, None) for name in ("model_config", "latent_format")}
    memo |= {id(value): value for value in shared.values()}
    # Who ran the other one would bring its whole life along.
    memo[id(getattr(model, "current_patcher", None))] = None
    memo |= {id(value): None for value in left_by_host(model)}
    try:
        vars(twin).update(copy.deepcopy(vars(model), memo))
    except Exception as error:  # Whatever the modules of another pack hold.
        raise UnsupportedModelError(f"its modules cannot be copied ({type(error).__name__}: {error})") from error
    forget(twin)
    return twin


def _plain_functions(module: torch.nn.Module, modules: Collection[int]) -> list[Any]:
    """Functions on this one instance, but no methods of modules: those are bound anew when the modules are copied."""
    functions = [value for _, value in _put_on(module) if not isinstance(value, (type, torch.nn.Module))]
    return [one for one in functions if id(getattr(one, "__self__", None)) not in modules]


def _another(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory; of a tensor that stays on a device, as ComfyUI 0.30 leaves ``logit_scale`` there, a copy."""
    if type(tensor) is not torch.nn.Parameter:
        return tensor if _in_memory(tensor) else tensor.cpu()
    with torch.inference_mode(False):
        return torch.nn.Parameter(tensor.data if _in_memory(tensor) else tensor.data.cpu(), requires_grad=False)


def _in_memory(tensor: torch.Tensor) -> bool:
    return tensor.device.type in ("cpu", "meta")
