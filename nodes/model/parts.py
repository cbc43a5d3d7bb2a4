"""A MODEL whose blocks run on several devices: one patcher for the host on each of them.

[Note: one patcher for each device]
The host gives memory to patchers, each on one device: it makes room there, says how much a model may take, and takes it
away again. So what a model has on another device than its own belongs to a patcher of its own, which is attached to the
MODEL as an additional model (``additional_models``). The host loads and clones these patchers together with the MODEL,
and asks them for nothing but memory. The MODEL runs the steps, each around the steps of its parts.

[Note: held parts]
If some code takes weights away during a step, the step runs again, and mostly that code does so again. A part holds
nothing but weights, so it can keep them until the step is over, and is unloaded then.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...streaming import Backend, BudgetError, Streamer, UnsupportedModelError
from ...streaming.handoff.boundary import Boundary
from ...streaming.split.links import Links
from ..host import hosts
from ..host.devices import evictable, make_backend, pins, same_device
from ..tell import messages
from ..tell.progress import LoadingBar
from .offload import host_config
from .patcher import PARTS, StreamedModelPatcher
from .patches import HostPatches
from .shares import Shares, check_parts
from .streamed_model import ATTRIBUTE, StreamedModel

logger = logging.getLogger(__name__)

links = Links()

# The host's transformer options that hold patch functions. The host moves what they hold to the MODEL's device.
TRANSFORMER_PATCHES = ("patches", "patches_replace")
# Those that are for the sampler and for steps, and that no block reads.
AROUND_STEPS = ("wrappers", "callbacks")


class Part(torch.nn.Module):
    """Stands for what a model has on another device. It is empty: the modules stay in the model."""


class PartPatcher(StreamedModelPatcher):
    """What a MODEL has on another device (Note: one patcher for each device).

    Attributes:
        owner: returns the MODEL, whose patches are in the weights here too; None once it is gone.
    """

    owner: Callable[[], StreamedModelPatcher | None] = staticmethod(lambda: None)

    def wrap_steps(self) -> None:
        """Does nothing: the MODEL runs the steps."""

    def end_run(self) -> None:
        """Does nothing: the MODEL ends the run of all its parts."""

    def hold(self) -> None:
        """Keep all weights until :meth:`let_go`, also if the host takes them away before (Note: held parts)."""
        self.streamed.held = True

    def let_go(self) -> None:
        """The step is over: unload this part now if the host wanted that meanwhile."""
        self.streamed.held = False
        if self.streamed.leaves:
            self.streamed.leaves = False
            self.unpatch_model(self.offload_device)

    def partially_unload(self, *args: Any, **kwargs: Any) -> float:
        return 0.0 if self.streamed.held else super().partially_unload(*args, **kwargs)

    def unpatch_model(
        self, device_to: torch.device | None = None, unpatch_weights: bool = True, **options: Any
    ) -> None:
        if self.streamed.held and unpatch_weights:
            self.streamed.leaves = True
        else:
            super().unpatch_model(device_to, unpatch_weights, **options)

    def load(self, *args: Any, **kwargs: Any) -> None:
        """Load as a whole MODEL does. Without room for the least, the part stays unloaded, and a step notices that."""
        owner = self._owner
        self.settings, self.node_id, self.streamed.leaves = owner.settings, owner.node_id, False
        try:
            super().load(*args, **kwargs)
        except Exception as error:
            # BudgetError comes from virtual devices: their size is fixed, so no larger plan is tried there.
            if not (self.streamer.backend.is_full(error) or isinstance(error, BudgetError)):
                raise
            logger.warning("nothing of %s could be loaded: %s", self.streamed.name, str(error).partition("\n")[0])

    def clone(self, *args: Any, **kwargs: Any) -> PartPatcher:
        clone = super().clone(*args, **kwargs)
        clone.owner = self.owner
        return clone

    def unpatch_hooks(self, *args: Any, **options: Any) -> None:
        """The MODEL's hooks are in the weights here too (hooked.py, Note: hooks and weights that move)."""
        if self.hooked is not self:
            self.hooked.unpatch_hooks(*args, **options)

    @property
    def hooked(self) -> StreamedModelPatcher:
        return self.owner() or self

    def follow(self) -> None:
        """Have the MODEL follow, for all of its parts, unless it is in the middle of a step."""
        if not self._owner.streamer.running:
            self._owner.follow()

    def _host_patches(self) -> HostPatches:
        owner = self._owner
        values, kind = self.streamer.blocks.values, owner.streamed.kind
        shared = self.streamer.shares_copies
        return HostPatches(owner, values, self.load_device, kind, owner.would_be_dynamic, shared)

    @property
    def _owner(self) -> StreamedModelPatcher:
        owner = self.owner()
        assert owner is not None, "a part is in use without its model"
        return owner


class OneDeviceError(UnsupportedModelError):
    """Only one of the devices that were asked for can take blocks.

    Attributes:
        device: its index among them.
    """

    def __init__(self, device: int, reason: str) -> None:
        super().__init__(reason)
        self.device = device


def split_blocks(
    patcher: StreamedModelPatcher, devices: Sequence[torch.device], shares: Sequence[float] | None
) -> dict[int, str]:
    """Distribute the blocks of a model, which was not loaded or cloned yet, over ``devices``.

    The first device that gets blocks becomes its home.

    Args:
        patcher: the only one of its model.
        devices: at least two, of one kind.
        shares: the share of each device in the bytes of blocks; None derives them from free memory.

    Returns:
        The reasons why some devices get no blocks, by their indices in ``devices``.

    Raises:
        OneDeviceError: only one can take some.
        UnsupportedModelError: nothing streams to one of the devices, or the blocks cannot be parted.
        ConfigError: shares are not one positive number for each device.
    """
    streamed, whole = patcher.streamed, patcher.streamer
    check_parts(whole.blocks)
    backends = [make_backend(device) for device in devices]
    streamed.shares = Shares(whole.blocks, shares)
    found = streamed.shares.begin(backends, patcher.settings)
    if len(found.devices) == 1:
        reasons = "; ".join(f"{backends[place].name}: {reason}" for place, reason in sorted(found.left_out.items()))
        raise OneDeviceError(found.devices[0], reasons or "no device has room for its largest block")
    devices, backends = ([each[place] for place in found.devices] for each in (devices, backends))
    messages.announce(streamed.name, streamed.shares.describe(backends), streamed.node_id)
    whole.close()
    streamers = _streamers_of_parts(patcher, backends)
    streamed.streamer = streamers[0]
    if not same_device(patcher.load_device, devices[0]):
        patcher.load_device = devices[0]
    pairs = zip(devices[1:], streamers[1:], strict=True)
    patcher.set_additional_models(PARTS, [_make_part(patcher, device, streamer) for device, streamer in pairs])
    patcher.size = patcher.model_size()
    streamed.boundary = Boundary(devices[0], links, TRANSFORMER_PATCHES, hosts.record, AROUND_STEPS)
    streamed.place_blocks(devices)
    return found.left_out


def _streamers_of_parts(patcher: StreamedModelPatcher, backends: Sequence[Backend]) -> list[Streamer]:
    whole, shares = patcher.streamer, patcher.streamed.shares
    streamers = []
    for number, backend in enumerate(backends):
        config = host_config(patcher.settings, backend)
        bar = patcher.streamed.bar if number == 0 else LoadingBar(None)
        blocks = shares.part(number)
        streamers.append(Streamer(whole.root, blocks, backend, config, pins, evictable, bar, shares.group))
    return streamers


def _make_part(patcher: StreamedModelPatcher, device: torch.device, streamer: Streamer) -> PartPatcher:
    name = f"{patcher.streamed.name} on {streamer.backend.name}"
    part = Part()
    whole = patcher.streamed
    streamed = StreamedModel(name, streamer, patcher.node_id, LoadingBar(None), title=whole.title, number=whole.number)
    setattr(part, ATTRIBUTE, streamed)
    made = {**hosts.made_with(patcher), "load_device": device, "size": streamer.model_bytes}
    found = PartPatcher(part, **made)
    found.settings, found.owner = patcher.settings, weakref.ref(patcher)
    return found
