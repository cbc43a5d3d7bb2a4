"""One MODEL on several GPUs at the same time: a second model like the incoming one on the first, and one on each other.

[Note: several GPUs, one step]
Each GPU has the whole model: what fits stays there, the rest streams over the GPU's own link, from one page-locked copy
that all of them have (streaming/sharing/local.py). ComfyUI divides the work: to a MODEL with additional models under
``multigpu`` it gives positive and negative prompts, and those of regions, on all of their GPUs, with a thread for each.
What it does for its own MultiGPU CFG Split it does for ours; it clones, loads and patches the copies with the MODEL.
Whether the picture stays the same is not believed but compared (verified.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial

import torch
from comfy.model_patcher import ModelPatcher

from ...streaming import State, UnsupportedModelError, warm_up
from ..host.contracts import check_host, why_not_parallel
from ..host.devices import obtainable, same_device
from ..host.generators import generators_kept
from ..host.hosts import WrappersMP
from ..model.offload import OffloadSettings
from ..model.patcher import PARALLEL, PARTS, StreamedModelPatcher
from ..model.streamed_model import sharing_copies
from ..twins.takeover import CHANGED, anew, carry_over, check_what_hangs_on, is_current
from ..twins.twins import lasting_difference
from .preparing import prepare
from .step import WRAPPER
from .verified import run_close, run_exact

# The last ones of an incoming model, kept for as long as that lives: one that did not change is not loaded anew.
_known: weakref.WeakKeyDictionary[torch.nn.Module, dict[object, StreamedModelPatcher]] = weakref.WeakKeyDictionary()
# How many of one model are kept, for nodes that place it on different devices.
MOST_KNOWN = 2


def in_parallel(
    model: ModelPatcher,
    devices: Sequence[torch.device],
    node_id: str | None,
    exact: bool = True,
    shares: Sequence[float] | None = None,
) -> StreamedModelPatcher:
    """A MODEL like ``model`` on the first device, with one for each other device as its additional models.

    Args:
        model: the incoming one.
        devices: two or more, the preferred one first.
        node_id: of the node that asks.
        exact: whether steps that are not the same to the bit as on one device run on one.
        shares: of each device in the tokens, where these are divided; None for like parts.

    Raises:
        UnsupportedModelError: it cannot; the message says why.
    """
    check_host()
    if reason := why_not_parallel():
        raise UnsupportedModelError(reason)
    if len(devices) < 2:
        raise UnsupportedModelError("that takes two GPUs")
    check_what_hangs_on(model)
    _check_companions(model)
    base = _known_or_made(model, devices, node_id)
    for one in _all_of(base):
        one.streamed.alone = ""  # The node's notices are withdrawn, so a run says it anew.
    ours = base.clone()
    copies = ours.get_additional_models_with_key(PARALLEL)
    carry_over(model, ours)
    ours.offload_device = model.offload_device
    ours.remove_additional_models(PARTS)
    ours.set_additional_models(PARALLEL, copies)
    ours.wrap_steps()
    step = partial(run_exact if exact else run_close, tuple(shares or [1.0] * len(devices)))
    wrappers = {WrappersMP.PREPARE_SAMPLING: prepare, WrappersMP.CALC_COND_BATCH: step}
    for kind, wrapper in wrappers.items():
        ours.remove_wrappers_with_key(kind, WRAPPER)
        ours.add_wrapper_with_key(kind, WRAPPER, wrapper)
    ours.settings, ours.node_id = _settings_of(model), node_id
    return ours


def _check_companions(model: ModelPatcher) -> None:
    """Raise if a model that is attached to ``model`` cannot be had on another device: the host would fail in a run."""
    for key, found in model.additional_models.items():
        for companion in found if key != PARTS else ():
            if getattr(companion, "cached_patcher_init", None) is None:
                name = type(companion.model).__name__
                raise UnsupportedModelError(f"{name}, which is attached to it, cannot be loaded on another GPU")


def _known_or_made(model: ModelPatcher, devices: Sequence[torch.device], node_id: str | None) -> StreamedModelPatcher:
    """The known ones of this model if they are still like the model; else new ones."""
    known = _known.setdefault(model.model, {})
    key = (tuple(devices), _settings_of(model).vram_limit)
    found = known.pop(key, None)
    if found is None or not all(is_current(one, model) for one in _all_of(found)):
        found = _make(model, devices, node_id)
    known[key] = found
    for oldest in list(known)[:-MOST_KNOWN]:
        del known[oldest]
    return found


def _all_of(base: StreamedModelPatcher) -> list[StreamedModelPatcher]:
    return [base, *base.get_additional_models_with_key(PARALLEL)]


def _make(model: ModelPatcher, devices: Sequence[torch.device], node_id: str | None) -> StreamedModelPatcher:
    with sharing_copies():
        base = anew(model, node_id)
        if isinstance(model, StreamedModelPatcher) and model.streamer.state is State.UNLOADED:
            model.streamer.close()  # It is not in use, so copies are built ahead for these instead.
        base.settings, base.node_id = _settings_of(model), node_id
        copies = [_copy_on(base, device) for device in devices[1:]]
    base.set_additional_models(PARALLEL, copies)
    for one, device in zip(_all_of(base), devices, strict=True):
        _place(one, device)
    names = tuple(one.streamed.gpu for one in _all_of(base))
    for one in _all_of(base):
        one.streamed.number, one.streamed.beside = base.streamed.number, names
        one.streamed.name = f"{base.streamed.title} on {one.streamed.gpu}"
    return base


def _copy_on(base: StreamedModelPatcher, device: torch.device) -> StreamedModelPatcher:
    """A copy for another device, as the host makes them: by the factory that the loader has left."""
    if base.cached_patcher_init is None:
        raise UnsupportedModelError("its loader does not give it once more as it is")
    try:
        with generators_kept():
            found = base.deepclone_multigpu(new_load_device=device)
    except Exception as error:  # The file may be gone.
        raise UnsupportedModelError(f"it cannot be loaded once more ({type(error).__name__}: {error})") from error
    if name := lasting_difference(found, base):
        raise UnsupportedModelError(CHANGED.format(name))
    found.is_multigpu_base_clone = True
    return found


def _place(patcher: StreamedModelPatcher, device: torch.device) -> None:
    """Have copies built ahead for the device where it will run."""
    patcher.load_device = device
    if not same_device(patcher.streamer.backend.device, device):
        patcher.streamer.move_to(patcher.streamed.backend_on(device))
    warm_up(device, patcher.model.get_dtype_inference())
    patcher.streamer.prepare(obtainable(patcher.streamer.backend))


def _settings_of(model: ModelPatcher) -> OffloadSettings:
    return getattr(model, "settings", OffloadSettings())
