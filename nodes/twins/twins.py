"""A second model like the incoming one, for us alone.

[Note: a model of our own]
The incoming model is left as it is: other nodes may run it beside ours, and the host moves the weights of its own
patchers. So the model is built a second time by the factory that its loader left behind (``cached_patcher_init``), as
views of the mapped file, which takes neither the time nor the memory of a second copy. In all other cases the model is
copied without its weights, so that both use the same memory: if there is no factory, if it reads a file that cannot be
mapped, and if it makes another model than the incoming one (likeness.py), because somebody has replaced a module, a
method, a setting or weights of that, or the file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from comfy.model_patcher import ModelPatcher

from ...streaming import State
from ..host.devices import unload
from ..host.generators import generators_kept
from ..host.mapped import mapped_loading
from ..model.patcher import StreamedModelPatcher
from ..state.loaded_state import take_off
from .copies import copy_with_shared_weights
from .likeness import difference, held_by, plain_tensors

logger = logging.getLogger(__name__)

# A model with less than this fraction of its bytes in mapped files would take its memory a second time.
MOSTLY = 0.5

Factory = Callable[..., ModelPatcher]


class Twin(NamedTuple):
    """A model like another.

    Attributes:
        model: for us alone.
        locate: finds the part of a file that a tensor maps.
        factory: loads the same model the host's way; None if there is no way.
    """

    model: torch.nn.Module
    locate: Callable[[torch.Tensor], Any]
    factory: Factory | None


def make_twin(patcher: ModelPatcher) -> Twin:
    """A second model like that of ``patcher``, with original weights.

    Raises:
        UnsupportedModelError: none can be made.
    """
    if isinstance(patcher, StreamedModelPatcher):
        return Twin(copy_with_shared_weights(patcher), _nowhere, None)
    factory = factory_of(patcher)
    built = build_like(patcher, factory) if factory is not None else None
    if built is None:
        return Twin(copy_with_shared_weights(patcher), _nowhere, None)
    if not _is_mapped(built):
        logger.info("[WeightStream] its file cannot be mapped, so weights are shared")
        return Twin(copy_with_shared_weights(patcher), _nowhere, factory)
    return built


# -- by the factory --------------------------------------------------------------------------------------------------


def factory_of(patcher: ModelPatcher) -> Factory | None:
    """Return a function that loads the model of ``patcher`` anew; None if its loader has left none. It takes
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


def build_like(patcher: ModelPatcher, factory: Factory) -> Twin | None:
    """Make a model by the factory, mapped; None if that fails, or if it is another model than that of ``patcher``."""
    try:
        with mapped_loading() as files, generators_kept():
            found = factory()
            unload(found)  # Loaders of text encoders may have loaded it.
    except Exception as error:  # The file may be gone, and the loader another pack's.
        logger.info("[WeightStream] a model cannot be loaded a second time, so its weights are shared: %s", error)
        return None
    if name := lasting_difference(found, patcher):
        logger.info("[WeightStream] its loader gives another model than the one here (%s), so weights are shared", name)
        return None
    return Twin(found.model, files.locate, factory)


def lasting_difference(one: ModelPatcher, other: ModelPatcher, dtypes: bool = True) -> str:
    """Return where the models of two patchers differ (likeness.py); an empty string if nowhere. What a loaded clone
    has changed only while it is loaded does not count.

    Raises:
        CheckpointError: the file of a streamed one has changed.
    """
    with _originals(one), _originals(other):
        if not difference(held_by(one), held_by(other), dtypes):
            return ""
        for patcher in (one, other):
            take_off(patcher)
        return difference(held_by(one), held_by(other), dtypes)


def _originals(patcher: ModelPatcher) -> AbstractContextManager[None]:
    if not isinstance(patcher, StreamedModelPatcher):
        return nullcontext()
    if all(streamer.state is State.UNLOADED for streamer in patcher.streamers):
        patcher.follow()  # Somebody may have replaced originals.
    return patcher.originals()


def _is_mapped(twin: Twin) -> bool:
    """Whether most of its bytes are in mapped files; if not it would take its memory a second time."""
    tensors = [*plain_tensors(twin.model)]
    located = sum(tensor.nbytes for tensor in tensors if twin.locate(tensor) is not None)
    return located >= MOSTLY * sum(tensor.nbytes for tensor in tensors)


def _nowhere(tensor: torch.Tensor) -> None:
    """For tensors that are in memory alone."""
