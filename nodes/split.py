"""One MODEL over several devices: a second model like the one that came in, its blocks given out."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from comfy.model_patcher import ModelPatcher

from ..streaming import State, warm_up
from .devices import obtainable
from .offload import OffloadSettings
from .parts import split_blocks
from .patcher import PARTS, StreamedModelPatcher
from .takeover import anew, carry_over, check_what_hangs_on

# The last split of a model that came in, for as long as that lives: what did not change is not loaded anew.
_splits: weakref.WeakKeyDictionary[torch.nn.Module, tuple[Hashable, Split]] = weakref.WeakKeyDictionary()


class Split(NamedTuple):
    """A MODEL over several devices.

    Attributes:
        patcher: of it.
        left_out: why some devices got nothing of it, by their places among those that were asked for.
    """

    patcher: StreamedModelPatcher
    left_out: dict[int, str]


def split_over(
    model: ModelPatcher,
    devices: Sequence[torch.device],
    split: str,
    ratio: Sequence[float] | None,
    node_id: str | None,
) -> Split:
    """A MODEL like ``model`` whose blocks lie on ``devices``, the preferred one first.

    Args:
        model: what came in.
        devices: two or more.
        split: ``auto``, ``equal`` or ``ratio``.
        ratio: the part of each device, where the user has said so.
        node_id: of the node that asks.

    Raises:
        OneDeviceError: only one of the devices can take blocks.
        UnsupportedModelError: it cannot be split; the message says why.
    """
    check_what_hangs_on(model)
    shares = {"auto": None, "equal": [1.0] * len(devices), "ratio": ratio}[split]
    key = (tuple(devices), None if shares is None else tuple(shares))
    known, split_before = _splits.get(model.model, (None, None))
    if split_before is None or known != key:
        if isinstance(model, StreamedModelPatcher) and model.streamer.state is State.UNLOADED:
            model.streamer.close()  # Nobody runs it now, so what is built ahead is built for the split.
        fresh = anew(model, node_id)
        fresh.settings, fresh.node_id = getattr(model, "settings", OffloadSettings()), node_id
        split_before = Split(fresh, split_blocks(fresh, devices, shares))
        dtype = fresh.model.get_dtype_inference()
        for streamer in fresh.streamers:
            warm_up(streamer.backend.device, dtype)
            streamer.prepare(obtainable(streamer.backend))
        _splits[model.model] = key, split_before
    base = split_before.patcher
    ours = base.clone()
    parts = ours.parts
    carry_over(model, ours)
    ours.load_device = base.load_device
    ours.set_additional_models(PARTS, parts)
    ours.wrap_steps()
    ours.settings, ours.node_id = base.settings, node_id
    return Split(ours, split_before.left_out)
