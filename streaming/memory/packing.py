"""Makes packed copies: from the file or a master copy to the device, patched and packed there, and down.

[Note: up, pack, down]
The reader brings one unit after another to the device, in two places in turn, as it brings residents. While one is
patched and packed the next is read. The host waits for the device once for each unit, because how large it is then is
known only when it is packed.
 1. A place is filled again when the kernels that packed what lay there are over: the reader's copies wait for an event
    that was recorded behind them.
 2. Kernels wait for the reader's copies.
 3. What was packed goes down behind the kernels, on their stream, into memory that nobody else uses yet. The host
    waits for all of that once, at the end. (torch gives the packed tensor's memory to others on that stream alone.)
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch

from ..devices.backend import Backend
from ..model.packed_units import PackedUnit, pack_unit
from ..packing.unpackers import Unpacker, unpacker_of
from .arena import Arena, HostBuffer
from .baking import bake_residents
from .checks import Checks, OnDevice
from .supply import Supply
from .transfer import Load, Move, Tick, Transfer
from .unit_copies import PackedCopy, UnitCopies
from .weights import Patches, Weights


class Wanted(NamedTuple):
    """A unit to be packed, and the most bytes that it may take then."""

    copies: UnitCopies
    most_bytes: int


class Refused(NamedTuple):
    """Units that were not packed.

    Attributes:
        large: they take more than was planned, or a patch gives a value another shape.
        without_room: no more memory may be page-locked.
    """

    large: set[int]
    without_room: set[int]


def pack_units(
    backend: Backend, supply: Supply, wanted: Mapping[int, Wanted], patches: Patches, room: int, checks: Checks
) -> Refused:
    """Give each of ``wanted`` its packed copy, with ``patches``; nothing is under way.

    Args:
        wanted: by number.
        room: bytes on the device to pack them in; enough for the largest unit.
        checks: is asked to check what has arrived there.
    """
    units = [(number, *one) for number, one in wanted.items()]
    largest = max(copies.unit.nbytes for _, copies, _ in units)
    places: list[torch.Tensor] = []
    made: list[tuple[UnitCopies, PackedCopy]] = []
    coming: dict[int, Transfer] = {}

    def ask(turn: int) -> None:
        if turn < len(units):
            copies, place = units[turn][1], turn % len(places)
            part = _part(copies, places[place][: copies.unit.nbytes], patches)
            coming[turn] = supply.reader.transfer([part], [free[place]])

    refused = Refused(set(), set())
    completed = False
    try:
        for _ in range(max(1, min(2, len(units), room // largest))):
            places.append(backend.allocate(largest))
        free = [backend.mark() for _ in places]  # Race: kernels of this memory's previous user may still be under way.
        for turn in range(len(places) - 1):
            ask(turn)
        for turn, (number, copies, most) in enumerate(units):
            ask(turn + len(places) - 1)
            backend.wait(supply.reader.wait(coming.pop(turn), supply.tick))
            place = turn % len(places)
            weights = _patched(copies, places[place][: copies.unit.nbytes], patches, supply.tick, checks)
            sums = checks.sums_of(copies.unit.layout.bytes_in(weights.buffer))
            found = pack_unit(copies.unit.layout, weights.buffer) if weights.fills_layout else None
            free[place] = backend.mark()
            if found is None or found[1].numel() > most:
                refused.large.add(number)
                continue
            if (memory := _memory(supply.arena, found[1].numel())) is None:
                refused.without_room.update(number for number, *_ in units[turn:])
                break
            packed_sums = checks.sums_of(found[0].parts_in(found[1]))
            made.append((copies, PackedCopy(found[0], memory, weights.signatures, sums, packed_sums)))
            _bring_down(found[1], memory)
        completed = True
    finally:
        supply.reader.abandon()  # What is on its way to a place is not needed any more.
        backend.synchronize()  # Race: copies and kernels may still use the places, and write to the memory.
        for buffer in places:
            backend.free(buffer)
        for _, packed in made if not completed else ():
            supply.arena.release(packed.memory)
    for copies, packed in made:
        copies.packed = packed
    return refused


def unpack_to_master(backend: Backend, arena: Arena, copies: UnitCopies, checks: Checks) -> None:
    """Make the master copy of a unit from its packed copy, patches included, by way of the device.

    Nothing is under way, and modules are left as they are.
    """
    packed = copies.packed
    assert packed is not None
    source, place = backend.allocate(packed.unit.nbytes), backend.allocate(copies.unit.nbytes)
    unpack = partial(_unpack, packed.unit, unpacker_of(backend.device), source, place)
    try:
        source.copy_(packed.buffer)
        checks.check_packed("to be written to", [OnDevice(copies, packed.unit.parts_in(source))])
        unpack()
        checks.check_unpacked("to be written to", [OnDevice(copies, copies.unit.layout.bytes_in(place))], unpack)
        copies.resident = Weights(copies.unit, place)
        copies.resident.sign(packed.signatures)
        copies.move_to_master(arena)
    finally:
        copies.resident = None
        backend.synchronize()  # Race: copies and kernels may still use both.
        backend.free(source)
        backend.free(place)


def _unpack(packed: PackedUnit, unpacker: Unpacker, source: torch.Tensor, place: torch.Tensor) -> None:
    """Make in ``place`` on the device what is packed in ``source``."""
    for part in packed.parts:
        if not part.packed:
            begin, end = part.spec.offset, part.spec.offset + part.spec.nbytes
            place[begin:end].copy_(part.bytes_in(source))
    for unpack in packed.unpacking(unpacker, source, place):
        unpack()


def _has_master(copies: UnitCopies, patches: Patches) -> bool:
    """Whether there is a master copy with these patches."""
    return copies.master is not None and copies.master.fills_layout and not copies.master.stale(patches)


def _part(copies: UnitCopies, target: torch.Tensor, patches: Patches) -> Load | Move:
    """What to ask the reader for."""
    if _has_master(copies, patches):
        return Move(copies.master.buffer, target, copies.pinned)
    return Load(copies.unit.layout, target)


def _patched(copies: UnitCopies, place: torch.Tensor, patches: Patches, tick: Tick, checks: Checks) -> Weights:
    """The unit's weights, which have come to ``place``, with these patches."""
    weights = Weights(copies.unit, place)
    has_master = _has_master(copies, patches)
    checks.check_loaded(weights, copies.master if has_master else None)
    if has_master:
        weights.sign(copies.master.signatures)
    else:
        bake_residents([weights], patches, tick)
    return weights


def _memory(arena: Arena, nbytes: int) -> HostBuffer | None:
    """Page-locked memory; None where no more may be page-locked."""
    memory = arena.claim(nbytes)
    if memory is None:
        return None
    memory.memory.fill_(0)  # Touched pages are page-locked several times faster.
    if memory.pinned or arena.lock(memory):
        return memory
    arena.release(memory)
    return None


def _bring_down(packed: torch.Tensor, memory: HostBuffer) -> None:
    """Queue the copy of what was packed (Note: up, pack, down, 3)."""
    with torch.inference_mode(False):
        memory.memory.copy_(packed, non_blocking=True)
