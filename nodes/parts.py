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

from ..streaming import Backend, Plan, Streamer, UnsupportedModelError
from ..streaming.assignment import Assignment, DeviceRoom, assign, describe
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


def split_blocks(
    patcher: StreamedModelPatcher, devices: Sequence[torch.device], shares: Sequence[float] | None
) -> StreamedModelPatcher:
    """Have the blocks of a model that nobody has loaded or cloned yet run on ``devices``, the first its home.

    Args:
        patcher: the only one of its model.
        devices: at least two, of one kind.
        shares: of each device in the bytes of blocks; None has them follow from free memory.

    Raises:
        UnsupportedModelError: nothing streams to one of the devices.
        BudgetError: a device has no room for the largest block.
        ConfigError: shares are not one positive number for each device.
    """
    streamed, blocks = patcher.streamed, patcher.streamer.blocks
    backends = [make_backend(device) for device in devices]
    sizes = [sum(unit.nbytes for unit in block.units) for block in blocks.blocks]
    if len(sizes) < len(devices):
        raise UnsupportedModelError(f"it has {len(sizes)} blocks for {len(devices)} devices")
    rooms = [DeviceRoom(_room(backend, patcher.settings)) for backend in backends]
    rooms[0] = DeviceRoom(max(0.0, rooms[0].nbytes - blocks.rest.nbytes))
    assignment = assign(sizes, rooms, shares)
    streamers = [
        _streamer_of_part(patcher, assignment, number, backend, streamed.bar if number == 0 else LoadingBar(None))
        for number, backend in enumerate(backends)
    ]
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
    return patcher


def _room(backend: Backend, settings: OffloadSettings) -> float:
    """Bytes for weights on a device, when activations have what they need at least."""
    reserve = 0.0 if backend.budget is not None else mm.minimum_inference_memory()
    room = max(0.0, obtainable(backend) - reserve)
    return room if settings.vram_limit is None else min(room, float(settings.vram_limit))


def _streamer_of_part(
    patcher: StreamedModelPatcher, assignment: Assignment, number: int, backend: Backend, bar: LoadingBar
) -> Streamer:
    whole = patcher.streamer
    blocks = whole.blocks.part(assignment.blocks_of(number), with_rest=number == 0)
    config = host_config(patcher.settings, backend)
    return Streamer(whole.root, blocks, backend, config, pins, evictable, bar)


def _make_part(patcher: StreamedModelPatcher, device: torch.device, streamer: Streamer) -> PartPatcher:
    name = f"{patcher.streamed.name} on {streamer.backend.name}"
    part = Part()
    streamed = StreamedModel(name, streamer, patcher.node_id, LoadingBar(None))
    setattr(part, ATTRIBUTE, streamed)
    status.watch(streamed)
    found = PartPatcher(part, device, patcher.offload_device, streamer.model_bytes)
    found.settings, found.owner = patcher.settings, weakref.ref(patcher)
    return found
