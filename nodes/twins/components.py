"""A MODEL or CLIP on another device than its loader chose (vae.py has the VAE).

[Note: one model, one device]
The incoming model is left as it is, and other nodes may go on using it. The host keeps track of where the weights of a
model are, not of which patcher put them there, so two patchers of one model must not have two devices. Patchers of a
streamed model may: its streamer moves when the other one is loaded. Any other model is built a second time by the
factory that its loader left behind (``cached_patcher_init``), which is the host's own way. With dynamic VRAM that maps
the file and takes no memory of its own. The second model is kept as long as the incoming one, so that a node that runs
again loads nothing.

If there is no such factory, or if it makes another model than the incoming one (likeness.py), because somebody has
changed that in place, a second model that streams is used: it has the same weights (twins.py), and keeps on the device
what fits.
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
from ..model.patcher import PARALLEL, PARTS, StreamedModelPatcher
from ..model.text_encoder import with_patcher
from .takeover import CHANGED, anew, carry_over, check_what_hangs_on, give_back, take_over
from .twins import factory_of, lasting_difference

logger = logging.getLogger(__name__)

# The CPU itself: a virtual device has an index.
CPU = torch.device("cpu")

# The patchers that were built for another device, by the incoming model.
_built: weakref.WeakKeyDictionary[torch.nn.Module, ModelPatcher] = weakref.WeakKeyDictionary()


class NotAgainError(UnsupportedModelError):
    """The loader of a model does not load it a second time."""


def model_on(model: ModelPatcher, device: torch.device) -> ModelPatcher:
    """A MODEL like ``model`` on ``device``, computing in a dtype that the device can compute in.

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
    """Return a patcher like ``patcher`` that loads its model to ``device``; itself if it does so already. If
    ``may_stream``, a model that its loader does not load a second time streams there.

    Raises:
        UnsupportedModelError: there is no way; the message says why.
    """
    check_host()
    if isinstance(patcher, StreamedModelPatcher) and device == CPU:
        patcher = give_back(patcher)  # Weights are in RAM already, so none stream.
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
        models[:] = [patcher_on(model, device, may_stream=False) for model in models]  # We do not run their steps.
    return moved


def _streamed_on(patcher: StreamedModelPatcher, device: torch.device) -> StreamedModelPatcher:
    backend, streamer = patcher.streamed.backend_on(device), patcher.streamer
    if patcher.parts:
        whole = patcher.clone()
        whole.remove_additional_models(PARTS)
        return _streamed_on(_carried(whole, anew(patcher, patcher.node_id)), device)  # The whole model moves there.
    if streamer.state is State.UNLOADED and not same_device(streamer.backend.device, device):
        # It is not in use, so copies are built ahead for where it will run. Otherwise it moves when it is loaded.
        patcher.follow()  # Moving has modules show what was laid out.
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
    """A patcher like ``patcher`` on ``device``, for the model as its loader loads it a second time.

    Raises:
        NotAgainError: the loader does not load it again as it is; the message says why.
        UnsupportedModelError: what is attached to ``patcher`` cannot be carried over.
    """
    check_what_hangs_on(patcher)
    built = _built.get(patcher.model)
    if built is None or not same_device(built.load_device, device) or lasting_difference(built, patcher):
        built = _built[patcher.model] = _build(patcher, device)
    moved = carry_over(patcher, built.clone())
    moved.load_device, moved.offload_device = device, patcher.offload_device
    return moved


def _build(patcher: ModelPatcher, device: torch.device) -> ModelPatcher:
    """Have its loader load the model of ``patcher`` a second time."""
    factory = factory_of(patcher)
    if factory is None:
        raise NotAgainError("its loader has not left word how to load it once more")
    options: dict[str, Any] = {"disable_dynamic": True} if mm.is_device_cpu(device) and patcher.is_dynamic() else {}
    try:
        with generators_kept():
            built = factory(**options)
    except Exception as error:  # The file may be gone, and the loader another pack's.
        raise NotAgainError(f"it cannot be loaded once more ({type(error).__name__}: {error})") from error
    unload(built)  # Loaders of text encoders may have put it on their usual device.
    if options:
        _leave_dynamic_vram(built)
    if name := lasting_difference(built, patcher):
        raise NotAgainError(CHANGED.format(name))
    built.load_device = device
    if hasattr(built, "register_load_device"):  # Dynamic VRAM keeps accounts for each device.
        built.register_load_device(device)
    return built


def _leave_dynamic_vram(built: ModelPatcher) -> None:
    """Cast weights as the model computes. With dynamic VRAM on, layers have the dtype of their file also where nothing
    casts it when they compute."""
    if built.is_dynamic():
        raise NotAgainError("its loader gives it with dynamic VRAM alone, which needs a GPU")
    compute_as_noted(built.model)
