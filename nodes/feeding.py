"""A MODEL that one GPU computes, and to which others bring weights over their links."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from ..streaming import Feeder, feeding_is_faster, find_feeders
from . import status
from .devices import make_backend, same_device
from .parts import links
from .patcher import StreamedModelPatcher
from .shares import rooms_of

logger = logging.getLogger(__name__)

# What was found of a first device and others, by their names: it is tried once.
_tried: dict[tuple[torch.device, ...], tuple[list[torch.device], float]] = {}


def helpers_of(devices: Sequence[torch.device]) -> tuple[list[torch.device], float]:
    """Which of the devices behind the first can bring weights to it, and by what factor that makes copies faster."""
    key = tuple(devices)
    if key not in _tried:
        home, *others = (make_backend(device) for device in devices)
        if home.budget is not None:
            return [], 1.0  # What threads copy in RAM says nothing.
        found, factor = find_feeders(home, others, links)
        _tried[key] = [backend.device for backend in found], factor
        names = ", ".join(backend.name for backend in found) or "no other GPU"
        logger.info(
            "[WeightStream] %s can bring weights to %s, %.1f times as fast as it alone", names, home.name, factor
        )
    return _tried[key]


def feed(patcher: StreamedModelPatcher, devices: Sequence[torch.device]) -> list[torch.device]:
    """Have the first device run a model that nobody has loaded or cloned yet, and others bring weights to it, where
    that is faster than blocks on all of them; gives those others, or none where it is not so."""
    helpers, factor = helpers_of(devices)
    if not helpers:
        return []
    blocks = patcher.streamer.blocks
    rooms = rooms_of(blocks, [make_backend(device) for device in devices], patcher.settings)
    sizes = [sum(unit.nbytes for unit in block.units) for block in blocks.blocks]
    if not feeding_is_faster(sizes, rooms, factor):
        return []
    backend = make_backend(devices[0])
    backend.feeders += [Feeder(make_backend(device)) for device in helpers]
    patcher.streamer.close()
    patcher.streamer.move_to(backend)
    if not same_device(patcher.load_device, devices[0]):
        patcher.load_device = devices[0]
    names = ", ".join(feeder.helper.name for feeder in backend.feeders)
    status.announce(
        patcher.streamed.name, f"all blocks on {backend.name}, to which {names} bring weights too", patcher.node_id
    )
    return helpers
