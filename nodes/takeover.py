"""Stream a MODEL or CLIP that another node has loaded, and give one back to ComfyUI's own way.

[Note: a model of our own]
What comes in is left as it is: other nodes may run it beside ours, and the host moves the weights of its own patchers.
So the model is built a second time by the factory that its loader left behind (``cached_patcher_init``), as views of
the mapped file, which takes neither the time nor the memory of a second copy. Where there is no factory, or it makes
another model than the one that came in, because somebody has exchanged a module of that, the model is copied without
its weights: both use the same memory. What hangs on the incoming patcher (patches, options, hooks, wrappers) is
carried over to ours.
"""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ..streaming import UnsupportedModelError
from .mapped import mapped_loading
from .offload import OffloadSettings
from .patcher import StreamedModelPatcher
from .streamed_model import ATTRIBUTE, make_streamed
from .text_encoder import step_of_text_encoder

# What belongs to a patcher's model and device, and not to its use.
OF_THE_MODEL = {"model", "backup", "backup_buffers", "object_patches_backup", "pinned", "size", "hook_backup"}
OF_THE_MODEL |= {"cached_patcher_init", "clone_base_uuid", "parent", "settings"}

# The streamed twin of a model that came in, for as long as that lives: settings that change do not load it anew.
_twins: weakref.WeakKeyDictionary[torch.nn.Module, StreamedModelPatcher] = weakref.WeakKeyDictionary()


def take_over(patcher: ModelPatcher, settings: OffloadSettings, node_id: str | None) -> StreamedModelPatcher:
    """A patcher like ``patcher`` whose model streams.

    Raises:
        UnsupportedModelError: it cannot stream; the message says why.
        BudgetError: the limit has no room for the largest block.
    """
    twin = _twins.get(patcher.model)
    if twin is None:
        twin = _twins[patcher.model] = _make_twin(patcher, settings, node_id)
    ours = _carry_over(patcher, twin.clone())
    ours.wrap_steps()
    ours.settings = settings
    return ours


def give_back(patcher: StreamedModelPatcher) -> ModelPatcher:
    """A patcher like ``patcher`` whose weights the host moves.

    Raises:
        UnsupportedModelError: nobody but us can load this model.
    """
    load = patcher.streamed.load_by_host
    if load is None:
        raise UnsupportedModelError("nothing is known of how it was loaded")
    theirs = _carry_over(patcher, load())
    theirs.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, ATTRIBUTE)
    return theirs


def _carry_over(source: ModelPatcher, target: ModelPatcher) -> ModelPatcher:
    """Have ``target`` do with its model what ``source`` does with the one that it has."""
    model, backups = target.model, ({}, {}, {}, set())
    try:
        state = source.clone(disable_dynamic=True, model_override=(model, backups))
    except TypeError as error:  # A patcher of another pack, with a clone of its own.
        raise UnsupportedModelError(f"its {type(source).__name__} cannot be rebuilt ({error})") from error
    vars(target).update({name: value for name, value in vars(state).items() if name not in OF_THE_MODEL})
    target.size = target.model_size()
    return target


def _make_twin(patcher: ModelPatcher, settings: OffloadSettings, node_id: str | None) -> StreamedModelPatcher:
    factory = _factory(patcher)
    model, locate = (None, _nowhere) if factory is None else _build(factory)
    if model is None or not _alike(model, patcher.model):
        factory, locate = None, _nowhere
        model = _copy_without_weights(patcher)
    root = model.diffusion_model if hasattr(model, "diffusion_model") else step_of_text_encoder(model)
    name = _name_of(patcher)
    streamed = make_streamed(model, root, patcher.load_device, name, locate, settings, node_id)
    streamed.load_by_host = factory
    twin = StreamedModelPatcher(model, patcher.load_device, patcher.offload_device, streamed.streamer.model_bytes)
    if factory is not None:
        twin.cached_patcher_init = (_take_over_anew, (factory, settings, node_id))
    return twin


def _take_over_anew(
    factory: Callable[[], ModelPatcher], settings: OffloadSettings, node_id: str | None, disable_dynamic: bool = False
) -> StreamedModelPatcher:
    """For nodes of the host that want the same model once more. A streamed patcher is never dynamic."""
    return _make_twin(factory(), settings, node_id)


# -- the model -------------------------------------------------------------------------------------------------------


def _factory(patcher: ModelPatcher) -> Callable[[], ModelPatcher] | None:
    """What loads the model of ``patcher`` anew."""
    if patcher.cached_patcher_init is None:
        return None
    function, arguments, *index = patcher.cached_patcher_init
    return partial(_call, function, arguments, *index)


def _call(function: Callable[..., Any], arguments: tuple, index: int | None = None) -> ModelPatcher:
    found = function(*arguments)
    patcher = found if index is None else found[index]
    patcher.cached_patcher_init = (function, arguments) if index is None else (function, arguments, index)
    return patcher


def _build(factory: Callable[[], ModelPatcher]) -> tuple[torch.nn.Module, Callable[[torch.Tensor], Any]]:
    with mapped_loading() as files:
        patcher = factory()
        # The host lists an encoder as loaded once it is built, and would take it for a leak without its patcher.
        mm.unload_model_and_clones(patcher)
        return patcher.model, files.locate


def _nowhere(tensor: torch.Tensor) -> None:
    """For tensors that are in memory alone."""


def _alike(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two models have the same modules, and weights of the same shapes."""
    return _shape(model) == _shape(other)


def _shape(model: torch.nn.Module) -> tuple[dict, dict]:
    # By name: some of the host's classes are made anew for each model.
    modules = {name: (type(module).__module__, type(module).__qualname__) for name, module in model.named_modules()}
    return modules, {name: tensor.shape for name, tensor in model.state_dict().items()}


def _copy_without_weights(patcher: ModelPatcher) -> torch.nn.Module:
    """The modules of a model, with the weights of the original: the memory is the same, the parameters are others."""
    mm.unload_model_and_clones(patcher)  # No weight is patched, or on a device, now.
    model = patcher.model
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.device.type not in ("cpu", "meta") for tensor in tensors):
        raise UnsupportedModelError("its weights stay on a device")
    memo = {id(tensor): _another(tensor) for tensor in tensors}
    twin = object.__new__(type(model))
    vars(twin).update(vars(model))
    if hasattr(model, "current_patcher"):
        twin.current_patcher = None  # Who ran the other one.
    try:
        for name in ("_modules", "_parameters", "_buffers"):
            vars(twin)[name] = copy.deepcopy(vars(model)[name], memo)
    except Exception as error:  # Whatever the modules of another pack hold.
        raise UnsupportedModelError(f"its modules cannot be copied ({type(error).__name__}: {error})") from error
    return twin


def _another(tensor: torch.Tensor) -> torch.Tensor:
    if type(tensor) is not torch.nn.Parameter:
        return tensor
    with torch.inference_mode(False):
        return torch.nn.Parameter(tensor.detach(), requires_grad=False)


def _name_of(patcher: ModelPatcher) -> str:
    """The file's name as the loader was given it, else the kind of model."""
    arguments = patcher.cached_patcher_init[1] if patcher.cached_patcher_init is not None else ()
    for argument in arguments:
        paths = argument if isinstance(argument, (list, tuple)) else [argument]
        if paths and all(isinstance(path, str) and os.path.isfile(path) for path in paths):
            return " + ".join(os.path.basename(path) for path in paths)
    return type(patcher.model).__name__
