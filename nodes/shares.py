"""Which device has which blocks of a MODEL, and when that changes.

[Note: when shares change]
Another assignment costs a load: nothing of what a device has is kept. So it must gain much, and must have seemed better
when a sampler began, twice in a row: memory that is taken now may be free soon. Times and bandwidths that were measured
count as soon as there are some. A device that has no room for the least that streams there gets nothing at once, in the
middle of a prompt too, and the step is run again, for as long as there is another device. The home then keeps what is
in no block. A device gets its share again as it would any other.

A model all of whose blocks must run where other nodes' tensors are (``Boundary.out_of_reach``), or some of whose blocks
have come to share tensors, has them at home for as long as it is so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, TypeVar

import comfy.model_management as mm
import torch

from ..streaming import Backend, BlockSet, Group, Streamer, UnsupportedModelError
from ..streaming.machine.gpus import best_links
from ..streaming.split.assignment import Assignment, DeviceRoom, Distribution, describe, distribute, step_seconds
from . import status
from .devices import obtainable
from .notices import keep_notice, withdraw_notice
from .offload import OffloadSettings

if TYPE_CHECKING:
    from .patcher import StreamedModelPatcher

logger = logging.getLogger(__name__)

# Other shares must make a step shorter by this part, so many times in a row.
GAIN = 0.15
TIMES = 2
# Devices whose times differ by less are equally fast.
LIKE = 0.1

T = TypeVar("T")


class PartFullError(Exception):
    """A device has no room for the least that its part of a model needs.

    Attributes:
        part: the patcher of that part.
    """

    def __init__(self, part: StreamedModelPatcher) -> None:
        super().__init__(f"{part.streamer.backend.name} has no room for its part of {part.streamed.name}")
        self.part = part


class Shares:
    """The blocks of one model, given out to its devices.

    Args:
        blocks: all of them.
        wanted: the share of each device; None has them follow from room, times and links.

    Attributes:
        group: of the streamers of all devices.
        due: whether to look, before the next step, if other shares would be better.
    """

    def __init__(self, blocks: BlockSet, wanted: Sequence[float] | None) -> None:
        self.group = Group(Assignment((), True))
        self.due = False
        self._blocks = blocks
        self._sizes = [sum(unit.nbytes for unit in block.units) for block in blocks.blocks]
        self._wanted = wanted
        self._advised = 0
        self._had_at_home = False
        self._tied: list[str] = []

    @property
    def assignment(self) -> Assignment:
        """Of blocks to devices, the home being number 0."""
        return self.group.assignment

    @assignment.setter
    def assignment(self, assignment: Assignment) -> None:
        self.group.assignment = assignment

    def begin(self, backends: Sequence[Backend], settings: OffloadSettings) -> Distribution:
        """Give out all blocks for the first time. Some devices may get none, and do not count from now on."""
        rooms = _rooms_at_first(backends, settings)
        found = distribute(self._sizes, self._blocks.rest.nbytes, rooms, self._wanted)
        if self._wanted is not None:
            self._wanted = [self._wanted[place] for place in found.devices]
        self.assignment = found.assignment
        return found

    def take_up(self, patcher: StreamedModelPatcher, blocks: BlockSet) -> None:
        """The model of ``patcher`` was cut anew. Where it has as many blocks as before they stay where they are, unless
        they share tensors now."""
        self._blocks = blocks
        self._sizes = [sum(unit.nbytes for unit in block.units) for block in blocks.blocks]
        self._tied = [block.name for block in blocks.blocks if block.tied]
        if self._tied:
            home = patcher.streamer.backend.name
            text = (
                f"all blocks run on {home}: {self._tied[0]} shares weights with another block, since somebody has "
                "changed the model"
            )
            self.assignment = self._best(self._rooms_at_home(patcher, text))
        elif len(blocks.blocks) != len(self.assignment.devices):
            self.assignment = self._best(self._rooms(patcher))

    def part(self, device: int) -> BlockSet:
        """What a device has."""
        return self._blocks.part(self.assignment.blocks_of(device), with_outside=device == 0)

    def placed_on(self, devices: Sequence[torch.device]) -> list[tuple[torch.nn.Module, torch.device]]:
        """All blocks, and on which of the devices they run."""
        return [
            (block.module, devices[number])
            for block, number in zip(self._blocks.blocks, self.assignment.devices, strict=True)
        ]

    def describe(self, backends: Sequence[Backend]) -> str:
        return describe(self.assignment, [backend.name for backend in backends], self._sizes)

    def run(self, patcher: StreamedModelPatcher, step: Callable[[], T]) -> T:
        """Run a step of the MODEL that is loaded, with other shares where that must be, or is better."""
        boundary = patcher.streamed.boundary
        due, self.due = self.due, False
        if blocks := boundary.out_of_reach():
            self._have_at_home(patcher, blocks[0])
        elif due and not self._tied:
            self._reconsider(patcher)
        full: list[StreamedModelPatcher] = []
        while True:
            try:
                return step()
            except PartFullError as error:
                full.append(error.part)
            except Exception as error:
                found = (one for one in (patcher, *patcher.parts) if one not in full and one.streamer.blocks.blocks)
                broken = [one for one in found if one.streamer.backend.is_named(error, boundary.broke_on)]
                full += broken[:1]
                if not broken or len(full) > len(patcher.parts) or self._tied:
                    raise
            finally:
                boundary.settle()  # For an interrupt, which is no Exception, torch runs no hook.
            # Not inside of "except": the error's frames would keep the activations of the failed step alive.
            self._leave_out(patcher, full)

    def _reconsider(self, patcher: StreamedModelPatcher) -> None:
        """Before the first step after the host has loaded the MODEL (Note: when shares change)."""
        rooms = self._rooms(patcher)
        better = self._best(rooms)
        # Where the user has said how much each gets, or they had to be at home, what counts is that each takes part.
        wished = self._wanted is not None or self._had_at_home
        wished = wished and len(set(better.devices)) > len(set(self.assignment.devices))
        home = replace(rooms[0], nbytes=max(0.0, rooms[0].nbytes - self._blocks.rest.nbytes))
        now, then = (
            step_seconds(assignment.bytes_of(self._sizes, len(rooms)), [home, *rooms[1:]])
            for assignment in (self.assignment, better)
        )
        self._advised = self._advised + 1 if wished or now - then > GAIN * now else 0
        if self._advised >= TIMES:
            if self._had_at_home:
                self._had_at_home = False
                withdraw_notice(patcher.streamed.title, patcher.node_id)
                text = "nothing keeps its blocks on one device any more"
            else:
                text = "memory or speed of its devices has changed"
            status.announce(patcher.streamed.name, text, patcher.node_id)
            self._carry_out(patcher, better, rooms)

    def _have_at_home(self, patcher: StreamedModelPatcher, stranger: torch.nn.Module) -> None:
        """Have all blocks on the MODEL's own device, because of what is in one of them."""
        if not any(self.assignment.devices):
            return
        name = next(block.name for block in self._blocks.blocks if block.module is stranger)
        home = patcher.streamer.backend.name
        text = (
            f"all blocks run on {home}: the model is compiled, and {name} holds functions of another node, whose "
            f"tensors are there. Without compiling, or without that node, they run on all devices"
        )
        rooms = self._rooms_at_home(patcher, text)
        self._carry_out(patcher, self._best(rooms), rooms)

    def _rooms_at_home(self, patcher: StreamedModelPatcher, text: str) -> list[DeviceRoom]:
        """Say, by ``text``, that all blocks are on the MODEL's own device from now on; gives the room that there is
        then."""
        status.announce(patcher.streamed.name, text, patcher.node_id)
        keep_notice("fallback", patcher.streamed.title, text, patcher.node_id, patcher.streamed)
        self._had_at_home = True
        pairs = zip([patcher, *patcher.parts], self._rooms(patcher), strict=True)
        return [room if one is patcher else DeviceRoom(0.0) for one, room in pairs]

    def _leave_out(self, patcher: StreamedModelPatcher, full: Sequence[StreamedModelPatcher]) -> None:
        patcher.streamer.counters.reruns += 1
        everybody = [patcher, *patcher.parts]
        pairs = zip(everybody, self._rooms(patcher), strict=True)
        rooms = [DeviceRoom(0.0) if one in full else room for one, room in pairs]
        text = f"{full[-1].streamer.backend.name} is full, so its blocks go to the other devices"
        status.announce(patcher.streamed.name, text, patcher.node_id)
        self._carry_out(patcher, self._best(rooms), rooms)

    def _best(self, rooms: Sequence[DeviceRoom]) -> Assignment:
        found = distribute(self._sizes, self._blocks.rest.nbytes, rooms, self._wanted, home_is_first=True)
        return replace(found.assignment, devices=tuple(found.devices[place] for place in found.assignment.devices))

    def _carry_out(self, patcher: StreamedModelPatcher, assignment: Assignment, rooms: Sequence[DeviceRoom]) -> None:
        """Have the blocks where ``assignment`` has them, loaded, with the patches of ``patcher``."""
        patcher.unpatch_hooks()
        patcher.follow()  # What blocks have written to buffers of theirs goes with them.
        self.assignment, self._advised = assignment, 0
        everybody = [patcher, *patcher.parts]
        for number, one in enumerate(everybody):
            one.streamer.take_blocks(self.part(number))
            one.size = one.model_size()
        patcher.streamed.place_blocks([one.load_device for one in everybody])
        for one, room in zip(everybody, rooms, strict=True):
            one.load(one.load_device, _made_room(one, room.nbytes))
        self.due = False
        text = self.describe([one.streamer.backend for one in everybody])
        status.announce(patcher.streamed.name, text, patcher.node_id)

    def _rooms(self, patcher: StreamedModelPatcher) -> list[DeviceRoom]:
        """What the devices have now, and how fast they and their links were, once that was measured."""
        streamers = patcher.streamers
        backends = [streamer.backend for streamer in streamers]
        measured = [streamer.profile.measured for streamer in streamers if streamer.blocks.blocks]
        # What a CPU takes says nothing about a GPU.
        if all(measured) and all(backend.budget is None for backend in backends):
            times, links = _times(streamers), [streamer.profile.bandwidth for streamer in streamers]
        else:
            times, links = [0.0] * len(streamers), _links(backends)
        return [
            DeviceRoom(_room(backend, patcher.settings), link, time)
            for backend, link, time in zip(backends, links, times, strict=True)
        ]


def check_parts(blocks: BlockSet) -> None:
    """Raise where blocks cannot be on several devices."""
    if any(block.tied for block in blocks.blocks):
        raise UnsupportedModelError("its blocks share tensors")


def rooms_of(blocks: BlockSet, backends: Sequence[Backend], settings: OffloadSettings) -> list[DeviceRoom]:
    """What devices have for blocks before anything was measured, the first of them beside what is in no block."""
    home, *others = _rooms_at_first(backends, settings)
    return [replace(home, nbytes=max(0.0, home.nbytes - blocks.rest.nbytes)), *others]


def _rooms_at_first(backends: Sequence[Backend], settings: OffloadSettings) -> list[DeviceRoom]:
    pairs = zip(backends, _links(backends), strict=True)
    return [DeviceRoom(_room(backend, settings), bandwidth) for backend, bandwidth in pairs]


def _room(backend: Backend, settings: OffloadSettings) -> float:
    """Bytes for weights on a device, when activations have what they need at least."""
    reserve = 0.0 if backend.budget is not None else mm.minimum_inference_memory()
    room = max(0.0, obtainable(backend) - reserve)
    return room if settings.vram_limit is None else min(room, float(settings.vram_limit))


def _made_room(patcher: StreamedModelPatcher, nbytes: float) -> float:
    """What there is of so many bytes once other models have given way, of which this prompt needs none."""
    if patcher.streamer.backend.budget is not None or not patcher.streamer.blocks.blocks:
        return nbytes
    needed = [loaded for loaded in mm.current_loaded_models if loaded.currently_used]
    reserve = mm.minimum_inference_memory()
    mm.free_memory(nbytes + reserve, patcher.load_device, keep_loaded=needed)
    return min(nbytes, max(0.0, mm.get_free_memory(patcher.load_device) - reserve))


def _links(backends: Sequence[Backend]) -> list[float]:
    """Bytes per second that the devices' links are made for; the same for all where it is not known of each."""
    if any(backend.budget is not None for backend in backends):
        return [1.0] * len(backends)
    found = [link.bytes_per_second for link in best_links([backend.device.index for backend in backends])]
    return [1.0] * len(backends) if None in found else [rate for rate in found if rate is not None]


def _times(streamers: Sequence[Streamer]) -> list[float]:
    """Seconds of compute for a byte of blocks on each device, by blocks of kinds that it has in common with the first.

    One without such counts as being as fast.
    """
    kinds = [_seconds_by_kind(streamer) for streamer in streamers]
    ratios = []
    for found in kinds:
        common = [found[kind] / kinds[0][kind] for kind in found.keys() & kinds[0].keys()]
        ratio = median(common) if common else 1.0
        ratios.append(1.0 if abs(ratio - 1) < LIKE else ratio)
    seconds = sum(sum(streamer.profile.block_seconds) for streamer in streamers)
    weighted = sum(ratio * sum(streamer.outline.unit_bytes) for ratio, streamer in zip(ratios, streamers, strict=True))
    return [ratio * seconds / weighted for ratio in ratios]


def _seconds_by_kind(streamer: Streamer) -> dict[object, float]:
    """Compute of a block; of those of one class and size all take the same."""
    blocks = zip(streamer.blocks.blocks, streamer.profile.block_seconds, strict=True)
    return {
        (type(block.module), tuple(unit.nbytes for unit in block.units)): seconds
        for block, seconds in blocks
        if seconds > 0
    }
