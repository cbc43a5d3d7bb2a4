"""A MODEL or CLIP on another device than its loader chose (vae.py has the VAE).

[Note: one model, one device]
What comes in is left as it is, and other nodes may go on using it. The host keeps track of where the weights of a model
are, not of which patcher put them there, so two patchers of one model must not have two devices. Ours may: its streamer
moves when the other one is loaded. Any other model is built once more by the factory that its loader left behind
(``cached_patcher_init``), the host's own way for it. With dynamic VRAM that maps the file and takes no memory of its
own. What was built is kept as long as the model that came in, so that a node that runs again loads nothing.

Where there is no such factory, or it makes another model than the one that came in (likeness.py), because somebody has
changed that one in place, a second model that streams takes its place: that one has the same weights (twins.py), and
keeps on the device what fits.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any

import comfy.model_management as mm
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher

from ...streaming import State, UnsupportedModelError
from ..host.contracts import check_host
from ..host.devices import obtainable, same_device, unload
from ..host.generators import generators_kept
from ..host.noted_dtypes import compute_as_noted
from ..model.offload import OffloadSettings
from ..model.patcher import PARTS, StreamedModelPatcher
from ..model.text_encoder import with_patcher
from .takeover import CHANGED, anew, carry_over, check_what_hangs_on, give_back, take_over
from .twins import factory_of, lasting_difference

logger = logging.getLogger(__name__)

# The CPU itself: a virtual device has an index.
CPU = torch.device("cpu")

# Copies of a model for parallel work on other devices, which the host makes anew for the device that it has now.
PARALLEL = "multigpu"

# What was built for another device, by the model that came in.
_built: weakref.WeakKeyDictionary[torch.nn.Module, ModelPatcher] = weakref.WeakKeyDictionary()


class NotAgainError(UnsupportedModelError):
    """The loader of a model does not give it a second time."""


def model_on(model: ModelPatcher, device: torch.device) -> ModelPatcher:
    """A MODEL like ``model`` on ``device``, computing in what that can compute in.

    Raises:
        UnsupportedModelError: it cannot be moved; the message says why.
    """
    moved = patcher_on(model, device)
    if moved is model:
        return model
    dtype = mm.unet_manual_cast(moved.model_dtype(), device)
    if dtype not in (None, moved.get_model_object("manual_cast_dtype")):
        moved.set_model_compute_dtype(dtype)
    return moved


def clip_on(clip: comfy.sd.CLIP, device: torch.device) -> comfy.sd.CLIP:
    """A CLIP like ``clip`` on ``device``.

    Raises:
        UnsupportedModelError: it cannot be moved; the message says why.
    """
    patcher = patcher_on(clip.patcher, device)
    return clip if patcher is clip.patcher else with_patcher(clip, patcher)


def patcher_on(patcher: ModelPatcher, device: torch.device, may_stream: bool = True) -> ModelPatcher:
    """A patcher like ``patcher`` that loads its model to ``device``; itself where it does so already. One whose loader
    does not give it a second time streams there, if it may.

    Raises:
        UnsupportedModelError: nobody knows how; the message says why.
    """
    check_host()
    if isinstance(patcher, StreamedModelPatcher) and device == CPU:
        patcher = give_back(patcher)  # Nothing streams to where it is.
    if same_device(patcher.load_device, device):
        return patcher
    if isinstance(patcher, StreamedModelPatcher):
        moved = _streamed_on(patcher, device)
    else:
        moved = _another_on(patcher, device, may_stream)
    if device == CPU or patcher.offload_device == patcher.load_device != CPU:  # The latter is --gpu-only.
        moved.offload_device = device
    moved.remove_additional_models(PARALLEL)
    for models in moved.additional_models.values():
        models[:] = [patcher_on(model, device, may_stream=False) for model in models]  # They have no steps of ours.
    return moved


def _streamed_on(patcher: StreamedModelPatcher, device: torch.device) -> StreamedModelPatcher:
    backend, streamer = patcher.streamed.backend_on(device), patcher.streamer
    if patcher.parts:
        whole = patcher.clone()
        whole.remove_additional_models(PARTS)
        return _streamed_on(_carried(whole, anew(patcher, patcher.node_id)), device)  # All of it there.
    if streamer.state is State.UNLOADED and not same_device(streamer.backend.device, device):
        # Nobody runs it now, so what is built ahead is built for where it will run. Else it moves when it is loaded.
        patcher.follow()  # Moving shows what was laid out.
        streamer.move_to(backend)
        streamer.prepare(obtainable(backend))
    moved = patcher.clone()
    moved.load_device = device
    return moved


def _carried(source: StreamedModelPatcher, target: StreamedModelPatcher) -> StreamedModelPatcher:
    carry_over(source, target)
    target.wrap_steps()
    target.settings, target.node_id = source.settings, source.node_id
    return target


def _another_on(patcher: ModelPatcher, device: torch.device, may_stream: bool) -> ModelPatcher:
    try:
        return built_on(patcher, device)
    except NotAgainError as error:
        if device == CPU or not may_stream:
            raise
        try:
            streamed = take_over(patcher, OffloadSettings(), None, device)
        except UnsupportedModelError as second:
            raise UnsupportedModelError(f"{error}, and it cannot stream: {second}") from second
        logger.info("[WeightStream] %s streams to %s: %s", type(patcher.model).__name__, device, error)
        return _streamed_on(streamed, device)


def built_on(patcher: ModelPatcher, device: torch.device) -> ModelPatcher:
    """A patcher like ``patcher`` on ``device``, of the model that its loader gives once more.

    Raises:
        NotAgainError: it does not give it; the message says why.
        UnsupportedModelError: what hangs on ``patcher`` cannot be carried over.
    """
    check_what_hangs_on(patcher)
    built = _built.get(patcher.model)
    if built is None or not same_device(built.load_device, device) or lasting_difference(built, patcher):
        built = _built[patcher.model] = _build(patcher, device)
    moved = carry_over(patcher, built.clone())
    moved.load_device, moved.offload_device = device, patcher.offload_device
    return moved


def _build(patcher: ModelPatcher, device: torch.device) -> ModelPatcher:
    """The model of ``patcher`` once more, by its loader."""
    factory = factory_of(patcher)
    if factory is None:
        raise NotAgainError("its loader has not left word how to load it once more")
    options: dict[str, Any] = {"disable_dynamic": True} if mm.is_device_cpu(device) and patcher.is_dynamic() else {}
    try:
        with generators_kept():
            built = factory(**options)
    except Exception as error:  # The file may be gone, and the loader another pack's.
        raise NotAgainError(f"it cannot be loaded once more ({type(error).__name__}: {error})") from error
    unload(built)  # Loaders of text encoders may have loaded it, where they always do.
    if options:
        _leave_dynamic_vram(built)
    if name := lasting_difference(built, patcher):
        raise NotAgainError(CHANGED.format(name))
    built.load_device = device
    if hasattr(built, "register_load_device"):  # Dynamic VRAM keeps books for each device.
        built.register_load_device(device)
    return built


def _leave_dynamic_vram(built: ModelPatcher) -> None:
    """With dynamic VRAM on, layers take the dtype of their file also where nothing casts it when they compute."""
    if built.is_dynamic():
        raise NotAgainError("its loader gives it with dynamic VRAM alone, which needs a GPU")
    compute_as_noted(built.model)
