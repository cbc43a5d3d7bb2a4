"""A second model like one that came in, for us alone.

[Note: a model of our own]
What comes in is left as it is: other nodes may run it beside ours, and the host moves the weights of its own patchers.
So the model is built a second time by the factory that its loader left behind (``cached_patcher_init``), as views of
the mapped file, which takes neither the time nor the memory of a second copy. In all other cases the model is copied
without its weights, so that both use the same memory: where there is no factory, where it reads a file that cannot be
mapped, and where it makes another model than the one that came in, because somebody has exchanged a module, a method or
weights of that, or the file.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher

from ..streaming import UnsupportedModelError
from .loaded_state import ON_MODULES, forget, left_by_host, take_off
from .mapped import mapped_loading

logger = logging.getLogger(__name__)

# A model with less than this part of its bytes in files that are mapped would take its memory a second time.
MOSTLY = 0.5
# Bytes of each weight that are compared, from its begin.
SAMPLE_BYTES = 64

Factory = Callable[..., ModelPatcher]


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
    if factory is not None and (twin := _build(factory, patcher.model)) is not None:
        return twin
    return Twin(_copy_without_weights(patcher), _nowhere, None)


def alike(model: torch.nn.Module, other: torch.nn.Module, weights: bool = True) -> bool:
    """Whether two models have the same modules with the same methods, and weights of the same shapes, and values."""
    return _shape(model) == _shape(other) and (not weights or _same_weights(model, other))


def _shape(model: torch.nn.Module) -> dict[str, tuple]:
    # By name: some of the host's classes are made anew for each model.
    return {
        name: (type(module).__module__, type(module).__qualname__, _own_functions(module), _shapes(module))
        for name, module in model.named_modules()
    }


def _own_functions(module: torch.nn.Module) -> list[str]:
    """Names of functions that somebody else has put on this one instance."""
    functions = {name: value for name, value in vars(module).items() if callable(value) and not isinstance(value, type)}
    own = functions.keys() - ON_MODULES
    return sorted(name for name in own if not getattr(functions[name], "is_step", False))


def _shapes(module: torch.nn.Module) -> dict[str, torch.Size]:
    held = {**module._parameters, **module._buffers}
    return {name: tensor.shape for name, tensor in held.items() if tensor is not None}


def _same_weights(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(_begins_alike(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))


def _begins_alike(one: torch.Tensor, two: torch.Tensor) -> bool:
    if type(one.data) is not torch.Tensor or type(two.data) is not torch.Tensor:
        return type(one.data) is type(two.data)
    count = SAMPLE_BYTES // one.element_size()
    # Not detach(): a Parameter of a node's inference mode that the host has moved outside of it gives a tensor then of
    # which torch makes no views.
    first, second = (tensor.data.flatten()[:count].cpu() for tensor in (one, two))
    return torch.equal(first.to(second.dtype), second) or torch.equal(first, second.to(first.dtype))


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


def _build(factory: Factory, model: torch.nn.Module) -> Twin | None:
    """What the factory makes, where that is like ``model`` and mapped."""
    try:
        with mapped_loading() as files:
            patcher = factory()
            mm.unload_model_and_clones(patcher)  # Loaders of text encoders may have loaded it.
            twin = Twin(patcher.model, files.locate, factory)
    except Exception as error:  # The file may be gone, and the loader another pack's.
        logger.info("[WeightStream] a model cannot be loaded a second time, so its weights are shared: %s", error)
        return None
    tensors = [*twin.model.parameters()]
    located = sum(tensor.nbytes for tensor in tensors if files.locate(tensor) is not None)
    if located < MOSTLY * sum(tensor.nbytes for tensor in tensors) or not alike(twin.model, model):
        return None
    return twin


def _nowhere(tensor: torch.Tensor) -> None:
    """For tensors that are in memory alone."""


# -- by a copy -------------------------------------------------------------------------------------------------------


def _copy_without_weights(patcher: ModelPatcher) -> torch.nn.Module:
    """The modules of a model, with the weights of the original: the memory is the same, the parameters are others."""
    take_off(patcher)  # No weight is patched, or on a device, now.
    model = patcher.model
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


def _another(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory; of a tensor that stays on a device, as ComfyUI 0.30 leaves ``logit_scale`` there, a copy."""
    if type(tensor) is not torch.nn.Parameter:
        return tensor if _in_memory(tensor) else tensor.cpu()
    with torch.inference_mode(False):
        return torch.nn.Parameter(tensor.data if _in_memory(tensor) else tensor.data.cpu(), requires_grad=False)


def _in_memory(tensor: torch.Tensor) -> bool:
    return tensor.device.type in ("cpu", "meta")
