"""Which device has which blocks of a MODEL; sharing.py decides when that changes."""

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
    """The blocks of one model, distributed over its devices.

    Args:
        blocks: all of them.
        wanted: the share of each device; None derives them from room, times and links.

    Attributes:
        group: of the streamers of all devices.
        wanted: as above, for the devices that take part.
        sizes: bytes of each block.
        due: whether to check, before the next step, if another assignment would be better.
        advised: how many times in a row another one has seemed better.
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
        """The model was cut into these blocks. The assignment stays as it is."""
        self.blocks = blocks
        self.sizes = [sum(unit.nbytes for unit in block.units) for block in blocks.blocks]

    @property
    def tied(self) -> list[str]:
        """The names of blocks that share tensors with others, so that all must be on one device."""
        return [block.name for block in self.blocks.blocks if block.tied]

    @property
    def assignment(self) -> Assignment:
        """The number of each block's device. The home is number 0."""
        return self.group.assignment

    @assignment.setter
    def assignment(self, assignment: Assignment) -> None:
        self.group.assignment = assignment

    def begin(self, backends: Sequence[Backend], settings: OffloadSettings) -> Distribution:
        """Distribute all blocks for the first time. Devices that get none take no part from now on."""
        rooms = _rooms_at_first(backends, settings)
        found = distribute(self.sizes, self.blocks.rest.nbytes, rooms, self.wanted)
        if self.wanted is not None:
            self.wanted = [self.wanted[place] for place in found.devices]
        self.assignment = found.assignment
        return found

    def part(self, device: int) -> BlockSet:
        """The blocks of one device, and for the home also what is in no block."""
        return self.blocks.part(self.assignment.blocks_of(device), with_outside=device == 0)

    def placed_on(self, devices: Sequence[torch.device]) -> list[tuple[torch.nn.Module, torch.device]]:
        """All blocks, each with the device on which it runs."""
        return [
            (block.module, devices[number])
            for block, number in zip(self.blocks.blocks, self.assignment.devices, strict=True)
        ]

    def describe(self, backends: Sequence[Backend]) -> str:
        return describe(self.assignment, [backend.name for backend in backends], self.sizes)

    def best(self, rooms: Sequence[DeviceRoom]) -> Assignment:
        """Return the best assignment for these rooms, with the first device as the home."""
        found = distribute(self.sizes, self.blocks.rest.nbytes, rooms, self.wanted, home_is_first=True)
        return replace(found.assignment, devices=tuple(found.devices[place] for place in found.assignment.devices))


def check_parts(blocks: BlockSet) -> None:
    """Raise :class:`UnsupportedModelError` if the blocks cannot be on several devices."""
    if any(block.tied for block in blocks.blocks):
        raise UnsupportedModelError("its blocks share tensors")


def rooms_of(blocks: BlockSet, backends: Sequence[Backend], settings: OffloadSettings) -> list[DeviceRoom]:
    """The room for blocks on each device before anything was measured; on the first, what is in no block takes some."""
    home, *others = _rooms_at_first(backends, settings)
    return [replace(home, nbytes=max(0.0, home.nbytes - blocks.rest.nbytes)), *others]


def _rooms_at_first(backends: Sequence[Backend], settings: OffloadSettings) -> list[DeviceRoom]:
    pairs = zip(backends, links_of(backends), strict=True)
    return [DeviceRoom(room_on(backend, settings), bandwidth) for backend, bandwidth in pairs]


def room_on(backend: Backend, settings: OffloadSettings) -> float:
    """Bytes for weights on a device, beside the least that activations need."""
    reserve = 0.0 if backend.is_virtual else mm.minimum_inference_memory()
    room = max(0.0, obtainable(backend) - reserve)
    return room if settings.vram_limit is None else min(room, float(settings.vram_limit))


def links_of(backends: Sequence[Backend]) -> list[float]:
    """The nominal bytes per second of the devices' links; 1.0 for all if that of one is not known."""
    if any(backend.is_virtual for backend in backends):
        return [1.0] * len(backends)
    found = [link.bytes_per_second for link in best_links([backend.device.index for backend in backends])]
    return [1.0] * len(backends) if None in found else [rate for rate in found if rate is not None]
