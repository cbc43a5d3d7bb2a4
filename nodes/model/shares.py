"""Which device has which blocks of a MODEL; sharing.py says when that changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import comfy.model_management as mm
import torch

from ...streaming import Backend, BlockSet, Group, UnsupportedModelError
from ...streaming.machine.gpus import best_links
from ...streaming.split.assignment import Assignment, DeviceRoom, Distribution, describe, distribute
from ..host.devices import obtainable
from .offload import OffloadSettings


class Shares:
    """The blocks of one model, given out to its devices.

    Args:
        blocks: all of them.
        wanted: the share of each device; None has them follow from room, times and links.

    Attributes:
        group: of the streamers of all devices.
        wanted: see above, of the devices that take part.
        sizes: bytes of each block.
        due: whether to look, before the next step, if other shares would be better.
        advised: how often in a row others have seemed better.
        had_at_home: whether all blocks had to be on the first device.
    """

    def __init__(self, blocks: BlockSet, wanted: Sequence[float] | None) -> None:
        self.group = Group(Assignment((), True))
        self.wanted = wanted
        self.due = False
        self.advised = 0
        self.had_at_home = False
        self.cut(blocks)

    def cut(self, blocks: BlockSet) -> None:
        """The model was cut into these blocks; who has which of them is not changed by that."""
        self.blocks = blocks
        self.sizes = [sum(unit.nbytes for unit in block.units) for block in blocks.blocks]

    @property
    def tied(self) -> list[str]:
        """The names of blocks that share tensors with others, so that all must be on one device."""
        return [block.name for block in self.blocks.blocks if block.tied]

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
        found = distribute(self.sizes, self.blocks.rest.nbytes, rooms, self.wanted)
        if self.wanted is not None:
            self.wanted = [self.wanted[place] for place in found.devices]
        self.assignment = found.assignment
        return found

    def part(self, device: int) -> BlockSet:
        """What a device has."""
        return self.blocks.part(self.assignment.blocks_of(device), with_outside=device == 0)

    def placed_on(self, devices: Sequence[torch.device]) -> list[tuple[torch.nn.Module, torch.device]]:
        """All blocks, and on which of the devices they run."""
        return [
            (block.module, devices[number])
            for block, number in zip(self.blocks.blocks, self.assignment.devices, strict=True)
        ]

    def describe(self, backends: Sequence[Backend]) -> str:
        return describe(self.assignment, [backend.name for backend in backends], self.sizes)

    def best(self, rooms: Sequence[DeviceRoom]) -> Assignment:
        """Who would have which blocks with these rooms, the first device being the home."""
        found = distribute(self.sizes, self.blocks.rest.nbytes, rooms, self.wanted, home_is_first=True)
        return replace(found.assignment, devices=tuple(found.devices[place] for place in found.assignment.devices))


def check_parts(blocks: BlockSet) -> None:
    """Raise where blocks cannot be on several devices."""
    if any(block.tied for block in blocks.blocks):
        raise UnsupportedModelError("its blocks share tensors")


def rooms_of(blocks: BlockSet, backends: Sequence[Backend], settings: OffloadSettings) -> list[DeviceRoom]:
    """What devices have for blocks before anything was measured, the first of them beside what is in no block."""
    home, *others = _rooms_at_first(backends, settings)
    return [replace(home, nbytes=max(0.0, home.nbytes - blocks.rest.nbytes)), *others]


def _rooms_at_first(backends: Sequence[Backend], settings: OffloadSettings) -> list[DeviceRoom]:
    pairs = zip(backends, links_of(backends), strict=True)
    return [DeviceRoom(room_on(backend, settings), bandwidth) for backend, bandwidth in pairs]


def room_on(backend: Backend, settings: OffloadSettings) -> float:
    """Bytes for weights on a device, when activations have what they need at least."""
    reserve = 0.0 if backend.budget is not None else mm.minimum_inference_memory()
    room = max(0.0, obtainable(backend) - reserve)
    return room if settings.vram_limit is None else min(room, float(settings.vram_limit))


def links_of(backends: Sequence[Backend]) -> list[float]:
    """Bytes per second that the devices' links are made for; the same for all where it is not known of each."""
    if any(backend.budget is not None for backend in backends):
        return [1.0] * len(backends)
    found = [link.bytes_per_second for link in best_links([backend.device.index for backend in backends])]
    return [1.0] * len(backends) if None in found else [rate for rate in found if rate is not None]
