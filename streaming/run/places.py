"""Where the units of a segment lie on the device, packed or as they are, and what is made once for that."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import torch

from ..devices.copies import Pair
from ..memory.transfer import Load, Move
from ..memory.unit_copies import UnitCopies
from ..model.layout import Binding
from ..packing.unpackers import Unpacker


class DevicePlace(NamedTuple):
    """A unit's memory on the device: in the slot of its segment, in memory of the segment's own, or a resident's.

    Attributes:
        memory: uint8.
        copies: the unit.
        packed: whether the unit is packed there.
    """

    memory: torch.Tensor
    copies: UnitCopies
    packed: bool = False

    @property
    def pair(self) -> Pair | None:
        """Where to copy the unit, and from where; None where that is not page-locked."""
        move = self.request()
        return (move.target, move.source) if isinstance(move, Move) and move.pinned else None

    def request(self) -> Load | Move:
        """What to ask a reader for."""
        copies = self.copies
        if self.packed:
            packed = copies.packed
            assert packed is not None
            return Move(packed.buffer, self.memory[: packed.layout.nbytes], packed.memory.pinned)
        if copies.master is None:
            return Load(copies.unit.layout, self.memory)
        return Move(copies.master.buffer, self.memory, copies.pinned)

    def binding(self, unpacked: torch.Tensor | None) -> Binding:
        """Points the unit's modules here, and at ``unpacked`` for what is unpacked to that."""
        if unpacked is None:
            return self.copies.binding_to(self.memory)
        return self.copies.unit.layout.binding_of(self.copies.packed.layout.views(self.memory, unpacked))


class Ways(NamedTuple):
    """What is made once for a segment and its places: bindings of its units, and what unpacks those that are packed."""

    bindings: list[Binding]
    unpacking: list[Callable[[], None]]


def places_in(
    buffer: torch.Tensor, group: Sequence[UnitCopies], sizes: Sequence[int], packed: Collection[int]
) -> list[DevicePlace]:
    """Return where in ``buffer`` each unit of a segment lies, with so many bytes: one behind another.

    Args:
        packed: numbers of units that are packed.
    """
    places, offset = [], 0
    for copies, nbytes in zip(group, sizes, strict=True):
        places.append(DevicePlace(buffer[offset : offset + nbytes], copies, copies.unit.index in packed))
        offset += nbytes
    return places


def pairs_to(places: Sequence[DevicePlace]) -> list[Pair] | None:
    """Return the copies that fill ``places``; None where not all that is copied is page-locked."""
    pairs = [place.pair for place in places]
    return None if None in pairs else pairs


def unpacked_in(
    memory: torch.Tensor | None, places: Sequence[DevicePlace]
) -> Iterator[tuple[DevicePlace, torch.Tensor]]:
    """Yield those of ``places`` that are packed, each with its part of ``memory``, to which it is unpacked."""
    begin = 0
    for place in places:
        if place.packed:
            assert memory is not None
            end = begin + place.copies.unit.nbytes
            yield place, memory[begin:end]
            begin = end


def ways_to(places: Sequence[DevicePlace], memory: torch.Tensor | None, unpacker: Unpacker | None) -> Ways:
    """Return how the modules of a segment are bound to ``places``, those that are packed unpacked to ``memory``."""
    ways = Ways([], [])
    targets = {place.copies.unit.index: target for place, target in unpacked_in(memory, places)}
    for place in places:
        target = targets.get(place.copies.unit.index)
        ways.bindings.append(place.binding(target))
        if target is not None:
            ways.unpacking.extend(place.copies.packed.layout.unpacking(unpacker, place.memory, target))
    return ways
