"""Adapts the layout of a streamed model to what is in the model when the host loads it.

[Note: what is there counts]
When ComfyUI loads a model it takes the modules and weights that are in the model at that moment, and applies patches to
them by name. Packs rely on that: they write to weights, replace layers by object patches or in the model, and add some
of their own. So before each load the model is compared with its layout. If they differ the model is cut anew. Units
whose layout is the same keep their copies, and the plan stays if nothing became larger or smaller.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import comfy.memory_management
import torch

from ...streaming import Streamer, UnsupportedModelError, cut_model, held_tensors, uncompiled
from ..tell import messages
from . import sharing
from .streamed_model import model_dtype
from .streamed_patcher import StreamedPatcher

logger = logging.getLogger(__name__)


def follow(patcher: StreamedPatcher) -> None:
    """Cut the model of ``patcher`` anew if it is not as it was laid out (Note: what is there counts).

    Raises:
        UnsupportedModelError: what is there now cannot be laid out; the model is unloaded then.
    """
    streamers = patcher.streamers
    changes = [streamer.changes(patcher.streamed.exchanged) for streamer in streamers]
    patcher.streamed.exchanged.clear()
    moved = _is_built_otherwise(patcher.model, streamers)
    if not (moved or any(changes)):
        return
    _say(patcher, sorted({change.value.name for each in changes for change in each}), moved)
    try:
        for streamer, each in zip(streamers, changes, strict=True):
            streamer.show(each)
        _bring_home(patcher.model)
        blocks = cut_model(patcher.model, _run_dtype, minimum_share=0)
        shares = patcher.streamed.shares
        if shares is not None:
            sharing.take_up(patcher, blocks)
        for number, (streamer, each) in enumerate(zip(streamers, changes, strict=True)):
            streamer.take_up(blocks if shares is None else shares.part(number), each)
    except BaseException as error:
        for streamer in streamers:
            streamer.unload()
        if isinstance(error, UnsupportedModelError):
            name = patcher.streamed.name
            text = f"{name}: {error}. It was changed after it was loaded; set mode to off, or use ComfyUI's own loader"
            raise UnsupportedModelError(text) from error
        raise
    if shares is not None:
        patcher.streamed.place_blocks([one.load_device for one in (patcher, *patcher.parts)])
    for one in (patcher, *patcher.parts):
        one.size = one.model_size()


def _is_built_otherwise(model: torch.nn.Module, streamers: Sequence[Streamer]) -> bool:
    """Whether modules were added, exchanged or taken away."""
    blocks = [block for streamer in streamers for block in streamer.blocks.blocks]
    modules = dict(_named_modules(model))
    if any(modules.get(block.name) is not block.module for block in blocks):
        return True
    laid_out = {
        (id(place.holder), place.attribute): name
        for streamer in streamers
        for value in streamer.blocks.values
        for name, place in zip(value.names, value.places, strict=True)
    }
    present = {(id(place.holder), place.attribute): name for name, _, place, _ in held_tensors(model)}
    return present != laid_out


def _named_modules(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    for name, module in model.named_modules():
        yield name, uncompiled(module)


def _bring_home(model: torch.nn.Module) -> None:
    """Move modules that others have added, perhaps on a device, to host memory, where an unloaded model is."""
    for module in model.modules():
        held = [*module._parameters.values(), *module._buffers.values()]
        if not any(tensor is not None and _is_foreign(tensor) for tensor in held):
            continue
        if any(True for _ in module.children()):
            module._apply(lambda tensor: tensor.to("cpu"), recurse=False)
        else:
            module.to("cpu")


def _is_foreign(tensor: torch.Tensor) -> bool:
    is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    return tensor.device.type != "meta" and (is_plain or tensor.device.type != "cpu")


def _run_dtype(module: torch.nn.Module, attribute: str, tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which the host runs a tensor that did not come from our file."""
    return model_dtype(module, attribute, tensor) if comfy.memory_management.aimdo_enabled else tensor.dtype


def _say(patcher: StreamedPatcher, names: Sequence[str], moved: bool) -> None:
    what = [f"{len(names)} of its weights ({names[0]})"] if names else []
    what += ["its layers"] * moved
    text = f"{' and '.join(what)} changed since the model was loaded; the changes are taken over"
    messages.announce(patcher.streamed.name, text, patcher.node_id)
