"""One MODEL over several devices: a second model like the incoming one, with its blocks distributed."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from comfy.model_patcher import ModelPatcher

from ...streaming import State, warm_up
from ..host.contracts import check_host
from ..host.devices import obtainable
from ..model.offload import OffloadSettings
from ..model.parts import split_blocks
from ..model.patcher import PARTS, StreamedModelPatcher
from .feeding import feed
from .takeover import anew, carry_over, check_what_hangs_on, is_current

# The last splits of an incoming model, kept for as long as that lives: one that did not change is not loaded anew.
_splits: weakref.WeakKeyDictionary[torch.nn.Module, dict[Hashable, Split]] = weakref.WeakKeyDictionary()
# How many splits of one model are kept, for nodes that place it over different devices.
MOST_SPLITS = 2


class Split(NamedTuple):
    """A MODEL over several devices.

    Attributes:
        patcher: its patcher.
        left_out: why some devices got nothing of it, by their indices among those that were asked for.
        feeds: whether the others bring weights to the first, and run no blocks (feeding.py).
    """

    patcher: StreamedModelPatcher
    left_out: dict[int, str]
    feeds: bool = False


def split_over(
    model: ModelPatcher,
    devices: Sequence[torch.device],
    split: str,
    ratio: Sequence[float] | None,
    node_id: str | None,
) -> Split:
    """A MODEL like ``model`` whose blocks lie on ``devices``, the preferred one first.

    Args:
        model: the incoming one.
        devices: two or more.
        split: ``auto``, ``equal`` or ``ratio``.
        ratio: the share of each device, if the user has set it.
        node_id: of the node that asks.

    Raises:
        OneDeviceError: only one of the devices can take blocks.
        UnsupportedModelError: it cannot be split; the message says why.
    """
    check_host()
    check_what_hangs_on(model)
    shares = {"auto": None, "equal": [1.0] * len(devices), "ratio": ratio}[split]
    base, left_out, feeds = _split_of(model, devices, shares, node_id)
    ours = base.clone()
    parts = ours.parts
    carry_over(model, ours)
    ours.offload_device = model.offload_device
    ours.set_additional_models(PARTS, parts)
    ours.wrap_steps()
    ours.settings, ours.node_id = _settings_of(model), node_id
    return Split(ours, left_out, feeds)


def _split_of(
    model: ModelPatcher, devices: Sequence[torch.device], shares: Sequence[float] | None, node_id: str | None
) -> Split:
    """Return the known split of this model if it is still like the model; else a new one."""
    known = _splits.setdefault(model.model, {})
    key = (tuple(devices), None if shares is None else tuple(shares), _settings_of(model).vram_limit)
    found = known.pop(key, None)
    if found is None or not is_current(found.patcher, model):
        found = _split_anew(model, devices, shares, node_id)
    known[key] = found
    for oldest in list(known)[:-MOST_SPLITS]:
        del known[oldest]
    return found


def _split_anew(
    model: ModelPatcher, devices: Sequence[torch.device], shares: Sequence[float] | None, node_id: str | None
) -> Split:
    fresh = anew(model, node_id)
    if isinstance(model, StreamedModelPatcher) and model.streamer.state is State.UNLOADED:
        model.streamer.close()  # It is not in use, so copies are built ahead for the split instead.
    fresh.settings, fresh.node_id = _settings_of(model), node_id
    helpers = feed(fresh, devices) if shares is None else []
    if helpers:
        rest = (place for place, device in enumerate(devices[1:], 1) if device not in helpers)
        left_out = dict.fromkeys(rest, "it can bring nothing to the first")
    else:
        left_out = split_blocks(fresh, devices, shares)
    dtype = fresh.model.get_dtype_inference()
    for streamer in fresh.streamers:
        warm_up(streamer.backend.device, dtype)
        streamer.prepare(obtainable(streamer.backend))
    return Split(fresh, left_out, bool(helpers))


def _settings_of(model: ModelPatcher) -> OffloadSettings:
    return getattr(model, "settings", OffloadSettings())
