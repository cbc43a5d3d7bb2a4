"""Has what streams follow what is in a model when the host loads it.

[Note: what is there counts]
ComfyUI loads the modules that are in a model then, with the weights that they have then, and applies patches by name
to them. Packs rely on it: they write to weights, exchange layers by object patches or in the model, and hang layers of
their own on it. So before each load what is there is compared with what was laid out. Where it differs the model is cut
anew. Units that lie as before keep their copies, and a plan stays where nothing became larger or smaller.

[Note: what comes while a model is sampled]
ComfyUI looks at no weight between two loads. So what is exchanged then is used as it is, without patches, until the
next load (streaming/homes.py, Note: what others do while a model runs). What is written to is used where it is; before
it is moved elsewhere, because of another plan, it is followed as in a load.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import comfy.memory_management
import torch

from ..streaming import Streamer, StreamingError, UnsupportedModelError, held_tensors, split_model, uncompiled
from ..streaming.changes import Change, Changes
from ..streaming.entries import forget_copied
from . import status
from .streamed_model import model_dtype

if TYPE_CHECKING:
    from .patcher import StreamedModelPatcher

logger = logging.getLogger(__name__)

INSTEAD = "load it with Load Diffusion Model, or put Async Offload Settings behind it with mode off"


def follow(patcher: StreamedModelPatcher) -> None:
    """Lay out anew what of the model of ``patcher`` is not as it was laid out (Note: what is there counts).

    Raises:
        UnsupportedModelError: what is there now cannot be laid out; the model is unloaded then.
    """
    streamers = patcher.streamers
    changes = [streamer.changes(patcher.streamed.exchanged, absorb=True) for streamer in streamers]
    patcher.streamed.exchanged.clear()
    moved = _is_built_otherwise(patcher.model, streamers)
    if not (moved or any(changes)):
        return
    _say(patcher, sorted({change.value.name for each in changes for change in each}), moved)
    try:
        _lay_out_anew(patcher, changes)
    except BaseException as error:
        for streamer in streamers:
            streamer.unload()
        if isinstance(error, UnsupportedModelError):
            name = patcher.streamed.name
            text = f"{name}: {error}. It was changed after it was loaded; {INSTEAD}"
            raise UnsupportedModelError(text) from error
        raise


def _lay_out_anew(patcher: StreamedModelPatcher, changes: Sequence[Changes]) -> None:
    """Have the model of ``patcher`` cut anew, with the changes on each of its devices."""
    streamers, shares = patcher.streamers, patcher.streamed.shares
    for streamer, each in zip(streamers, changes, strict=True):
        streamer.show(each)
    if patcher.streamed.boundary is not None:
        patcher.streamed.boundary.detach()
    for module in patcher.model.modules():
        forget_copied(module)  # A block that somebody has copied would tell of the one that it is a copy of.
    _bring_home(patcher.model)
    blocks = split_model(patcher.model, _run_dtype, minimum_share=0)
    if shares is not None:
        shares.take_up(patcher, blocks)
    for number, (streamer, each) in enumerate(zip(streamers, changes, strict=True)):
        streamer.take_up(blocks if shares is None else shares.part(number), each)
    if shares is not None:
        patcher.streamed.place_blocks([one.load_device for one in (patcher, *patcher.parts)])
    for one in (patcher, *patcher.parts):
        one.size = one.model_size()


def follow_writes(patcher: StreamedModelPatcher, moving: StreamedModelPatcher) -> list[Change]:
    """Before weights of ``moving``, one of the patchers of ``patcher``, are moved while the MODEL is sampled: lay out
    anew what somebody has written to (Note: what comes while a model is sampled).

    Gives what somebody has exchanged, which is for the caller to put back when the weights have been moved.

    Raises:
        StreamingError: something was given another shape or dtype, or layers were exchanged too.
    """
    found = [streamer.changes() for streamer in patcher.streamers]
    written = [Changes(change for change in each if not change.exchanged) for each in found]
    if not any(written):
        return []
    reshaped = [change for each in written for change in each if change.reshaped]
    first = (reshaped or [change for each in written for change in each])[0]
    if reshaped or _is_built_otherwise(patcher.model, patcher.streamers):
        what = "was given another shape or dtype" if reshaped else "was written to, and layers were exchanged,"
        raise StreamingError(
            f"{first.value.name} {what} while {patcher.streamed.name} was sampled, and its weights must be moved now. "
            f"Change the model before the sampler; or {INSTEAD}"
        )
    exchanged = [change for each in found for change in each if change.exchanged]
    _lay_out_anew(patcher, written)
    if patcher.streamed.boundary is not None:
        patcher.attach_boundary()
    for one in (patcher, *patcher.parts):
        if one is not moving and one.streamer.plan is not None:
            one.streamer.load(one.streamer.plan, one._host_patches())
    return exchanged


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
    """Have modules that others have brought along, perhaps on a device, in host memory, as an unloaded model is."""
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


def _say(patcher: StreamedModelPatcher, names: Sequence[str], moved: bool) -> None:
    what = [f"{len(names)} of its weights ({names[0]})"] if names else []
    what += ["its layers"] * moved
    text = f"somebody has changed {' and '.join(what)} since it was laid out, which is followed"
    status.announce(patcher.streamed.name, text, patcher.node_id)
