"""A MODEL whose blocks run on several devices: one patcher for the host on each of them.

[Note: one patcher for each device]
The host gives memory to patchers, each on one device: it makes room there, says how much a model may take, and takes it
away again. So what a model has on another device than its own belongs to a patcher of its own, which hangs on the MODEL
as an additional model (``additional_models``): the host loads those with it, clones them with it, and asks them for
memory alone. Steps are run by the MODEL, each around the steps of its parts.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_management as mm
import torch

from ..streaming import Backend, Plan, StallListener, Streamer, UnsupportedModelError
from ..streaming.assignment import Assignment, DeviceRoom, describe, distribute
from ..streaming.handoff import Boundary
from ..streaming.links import Links
from . import status
from .devices import evictable, make_backend, obtainable, pins, same_device
from .offload import OffloadSettings, host_config
from .patcher import PARTS, StreamedModelPatcher
from .patches import HostPatches
from .progress import LoadingBar
from .streamed_model import ATTRIBUTE, StreamedModel

links = Links()

# Where the host's transformer options hold the functions of patches. It moves what they hold to the MODEL's device.
TRANSFORMER_PATCHES = ("patches", "patches_replace")


class Part(torch.nn.Module):
    """Stands for what a model has on another device. Its modules are those of the model."""


class PartPatcher(StreamedModelPatcher):
    """What a MODEL has on another device (Note: one patcher for each device).

    Attributes:
        owner: gives the MODEL, whose patches are in the weights here too.
    """

    owner: Callable[[], StreamedModelPatcher | None] = staticmethod(lambda: None)

    def wrap_steps(self) -> None:
        """The MODEL runs them."""

    def load(self, *args: Any, **kwargs: Any) -> None:
        self.settings = self._owner.settings
        super().load(*args, **kwargs)

    def clone(self, *args: Any, **kwargs: Any) -> PartPatcher:
        clone = super().clone(*args, **kwargs)
        clone.owner = self.owner
        return clone

    def reload(self, plan: Plan, hooks: Any) -> None:
        """As for a whole MODEL; hooks are the owner's."""
        owner, hooks = self._owner, self._owner.current_hooks
        owner.unpatch_hooks()
        super().reload(plan, None)
        owner.apply_hooks(hooks, force_apply=True)

    def _host_patches(self) -> HostPatches:
        return HostPatches(self._owner, self.streamer.blocks.values, self.load_device)

    @property
    def _owner(self) -> StreamedModelPatcher:
        owner = self.owner()
        assert owner is not None, "a part is in use without its model"
        return owner


class OneDeviceError(UnsupportedModelError):
    """A model has all of its blocks on one device.

    Attributes:
        device: its place among those that were asked for.
    """

    def __init__(self, device: int, reason: str) -> None:
        super().__init__(reason)
        self.device = device


def split_blocks(
    patcher: StreamedModelPatcher, devices: Sequence[torch.device], shares: Sequence[float] | None
) -> dict[int, str]:
    """Have the blocks of a model that nobody has loaded or cloned yet run on ``devices``, the first its home.

    Args:
        patcher: the only one of its model.
        devices: at least two, of one kind.
        shares: of each device in the bytes of blocks; None has them follow from free memory.

    Returns:
        Why some devices get no blocks, by their places in ``devices``.

    Raises:
        OneDeviceError: only one can take some.
        UnsupportedModelError: nothing streams to one of the devices, or the blocks cannot be parted.
        ConfigError: shares are not one positive number for each device.
    """
    streamed, blocks = patcher.streamed, patcher.streamer.blocks
    if any(block.tied for block in blocks.blocks):
        raise UnsupportedModelError("its blocks share tensors")
    backends = [make_backend(device) for device in devices]
    sizes = [sum(unit.nbytes for unit in block.units) for block in blocks.blocks]
    rooms = [DeviceRoom(_room(backend, patcher.settings)) for backend in backends]
    found = distribute(sizes, blocks.rest.nbytes, rooms, shares)
    if len(found.devices) == 1:
        reasons = "; ".join(f"{backends[place].name}: {reason}" for place, reason in sorted(found.left_out.items()))
        raise OneDeviceError(found.devices[0], reasons or "no device has room for its largest block")
    devices = [devices[place] for place in found.devices]
    backends, assignment = [backends[place] for place in found.devices], found.assignment
    streamers = _streamers_of_parts(patcher, assignment, backends)
    patcher.streamer.close()
    streamed.streamer = streamers[0]
    if not same_device(patcher.load_device, devices[0]):
        patcher.load_device = devices[0]
    names = [backend.name for backend in backends]
    status.announce(streamed.name, describe(assignment, names, sizes), streamed.node_id)
    parts = []
    for device, streamer in zip(devices[1:], streamers[1:], strict=True):
        parts.append(_make_part(patcher, device, streamer))
    patcher.set_additional_models(PARTS, parts)
    patcher.size = patcher.model_size()
    places = [devices[number] for number in assignment.devices]
    streamed.boundary = Boundary(devices[0], links, TRANSFORMER_PATCHES)
    streamed.placed = [(block.module, place) for block, place in zip(blocks.blocks, places, strict=True)]
    return found.left_out


def _room(backend: Backend, settings: OffloadSettings) -> float:
    """Bytes for weights on a device, when activations have what they need at least."""
    reserve = 0.0 if backend.budget is not None else mm.minimum_inference_memory()
    room = max(0.0, obtainable(backend) - reserve)
    return room if settings.vram_limit is None else min(room, float(settings.vram_limit))


def _streamers_of_parts(
    patcher: StreamedModelPatcher, assignment: Assignment, backends: Sequence[Backend]
) -> list[Streamer]:
    whole, listeners, streamers = patcher.streamer, list[StallListener](), []
    for number, backend in enumerate(backends):
        blocks = whole.blocks.part(assignment.blocks_of(number), with_outside=number == 0)
        config = host_config(patcher.settings, backend)
        bar = patcher.streamed.bar if number == 0 else LoadingBar(None)
        streamers.append(Streamer(whole.root, blocks, backend, config, pins, evictable, bar, listeners))
    return streamers


def _make_part(patcher: StreamedModelPatcher, device: torch.device, streamer: Streamer) -> PartPatcher:
    name = f"{patcher.streamed.name} on {streamer.backend.name}"
    part = Part()
    streamed = StreamedModel(name, streamer, patcher.node_id, LoadingBar(None))
    setattr(part, ATTRIBUTE, streamed)
    status.watch(streamed)
    found = PartPatcher(part, device, patcher.offload_device, streamer.model_bytes)
    found.settings, found.owner = patcher.settings, weakref.ref(patcher)
    return found
