"""A MODEL that one GPU computes, and to which others bring weights over their links."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from ...streaming import feeding_is_faster, find_feeders
from ...streaming.planning.profile import ASSUMED_BANDWIDTH
from ..host.devices import make_backend, pins, same_device
from ..model.offload import OffloadSettings, host_config
from ..model.parts import links
from ..model.patcher import StreamedModelPatcher
from ..model.shares import rooms_of
from ..tell import messages

logger = logging.getLogger(__name__)


class Helpers(NamedTuple):
    """Devices that can bring weights to another one.

    Attributes:
        devices: the devices.
        bytes_per_second: what the other one's own link carries alone.
        factor: how much faster all links are together.
    """

    devices: list[torch.device]
    bytes_per_second: float
    factor: float


NOBODY = Helpers([], 0.0, 1.0)

# The results for a first device and others: they are tried once.
_tried: dict[tuple[torch.device, ...], Helpers] = {}


def helpers_of(devices: Sequence[torch.device]) -> Helpers:
    """Find out which of the other devices can bring weights to the first."""
    key = tuple(devices)
    if key in _tried:
        return _tried[key]
    home, *others = (make_backend(device) for device in devices)
    if home.is_virtual:
        return NOBODY  # Copies by threads in RAM say nothing about GPUs.
    found = find_feeders(home, others, links)
    helpers = Helpers([backend.device for backend in found.helpers], found.bytes_per_second, found.factor)
    if found.for_ever:
        _tried[key] = helpers
    if found.helpers:
        names = ", ".join(backend.name for backend in found.helpers)
        text = "[WeightStream] %s can bring weights to %s, %.1f times as fast as it alone"
        logger.info(text, names, home.name, found.factor)
    return helpers


def feed(patcher: StreamedModelPatcher, devices: Sequence[torch.device]) -> list[torch.device]:
    """Have the first device run a model, which was not loaded or cloned yet, and others bring weights to it, if that is
    faster than blocks on all of them. Returns those others; empty if it is not faster."""
    blocks, settings = patcher.streamer.blocks, patcher.settings
    backends = [make_backend(device) for device in devices]
    rooms = rooms_of(blocks, backends, settings)
    sizes = [sum(unit.nbytes for unit in block.units) for block in blocks.blocks]
    streamed = sum(sizes) - rooms[0].nbytes
    is_unknown = any(room.bandwidth <= 1 for room in rooms)
    if is_unknown:
        rooms = [replace(room, bandwidth=ASSUMED_BANDWIDTH) for room in rooms]
    # GPUs are tried only if this could be faster at best.
    if not (_is_page_locked(streamed, settings, patcher) and feeding_is_faster(sizes, rooms, float(len(devices)))):
        return []
    helpers = helpers_of(devices)
    if is_unknown and helpers.devices:
        rooms = [replace(room, bandwidth=helpers.bytes_per_second) for room in rooms]
    if not (helpers.devices and feeding_is_faster(sizes, rooms, helpers.factor)):
        return []
    patcher.streamed.feed(devices[0], helpers.devices)
    patcher.streamer.close()
    patcher.streamer.move_to(patcher.streamed.backend_on(devices[0]))
    if not same_device(patcher.load_device, devices[0]):
        patcher.load_device = devices[0]
    names = ", ".join(feeder.helper.name for feeder in patcher.streamer.backend.feeders)
    text = f"all blocks on {patcher.streamer.backend.name}, to which {names} bring weights too"
    messages.announce(patcher.streamed.name, text, patcher.node_id)
    return helpers.devices


def _is_page_locked(streamed: float, settings: OffloadSettings, patcher: StreamedModelPatcher) -> bool:
    """Whether ``streamed`` bytes would stream from page-locked memory, before they are used: others bring no other."""
    config = host_config(settings, patcher.streamer.backend)
    limits = [limit for limit in (config.pinned_limit, pins.limit) if limit is not None]
    return config.pin_memory and not config.synchronous and all(limit >= streamed for limit in limits)
