"""Memory on the device in which units are packed, and unpacked where other code shall write to them."""

from __future__ import annotations

from functools import partial

import torch

from ..devices.backend import Backend
from ..devices.copies import aligned
from ..packing.unpackers import Unpacker, unpacker_of
from .arena import Arena
from .baking import bake_residents
from .checks import Checks, OnDevice
from .packed_copy import PackedCopy
from .transfer import Load, Move, Tick
from .unit_copies import UnitCopies
from .weights import Patches, Weights


class PackingPlace:
    """Memory on the device in which one unit at a time is patched and packed.

    Args:
        backend: the device.
        buffer: the memory, for a unit, and behind it for what the unit is unpacked from.
        unpacks: whether there is room for that.

    Attributes:
        free: the event behind the last use.
    """

    def __init__(self, backend: Backend, buffer: torch.Tensor, unpacks: bool) -> None:
        self._unpacker = unpacker_of(backend.device)
        self._unpacks = unpacks
        self._packed: PackedCopy | None = None
        self._buffer = buffer
        self.free = backend.mark()  # Race: kernels of this memory's previous user may still be under way.

    def part(self, copies: UnitCopies, patches: Patches) -> Load | Move:
        """What to ask the reader for: patches are written into weights as they were loaded."""
        target = self._buffer[: copies.unit.nbytes]
        self._packed = None
        if _has_master(copies, patches):
            return Move(copies.master.buffer, target, copies.pinned)
        if self._unpacks and copies.packed is not None and not (copies.packed.signatures or copies.packed.spoiled):
            self._packed = copies.packed
            return Move(copies.packed.buffer, self._behind(copies), pinned=True)
        return Load(copies.unit.layout, target)

    def patched(self, copies: UnitCopies, patches: Patches, tick: Tick, checks: Checks) -> Weights:
        """The unit's weights, which have come, with these patches."""
        weights = Weights(copies.unit, self._buffer[: copies.unit.nbytes])
        if self._packed is not None:
            _unpack("to be patched", copies, self._behind(copies), weights.buffer, self._unpacker, checks)
            bake_residents([weights], patches, tick)
            return weights
        master = copies.master if _has_master(copies, patches) else None
        checks.check_loaded(weights, master)
        if master is not None:
            weights.sign(master.signatures)
        else:
            bake_residents([weights], patches, tick)
        return weights

    def _behind(self, copies: UnitCopies) -> torch.Tensor:
        assert self._packed is not None
        return self._buffer[aligned(copies.unit.nbytes) :][: self._packed.layout.nbytes]


def _has_master(copies: UnitCopies, patches: Patches) -> bool:
    """Whether there is a master copy with these patches."""
    return copies.master is not None and copies.master.fills_layout and not copies.master.stale(patches)


def unpack_to_master(backend: Backend, arena: Arena, copies: UnitCopies, checks: Checks) -> None:
    """Make the master copy of a unit from its packed copy, patches included, by way of the device.

    Nothing is under way, and modules are left as they are.
    """
    packed = copies.packed
    assert packed is not None
    allocated: list[torch.Tensor] = []
    try:
        for nbytes in (packed.layout.nbytes, copies.unit.nbytes):
            allocated.append(backend.allocate(nbytes))
        source, place = allocated
        source.copy_(packed.buffer)
        _unpack("to be written to", copies, source, place, unpacker_of(backend.device), checks)
        copies.resident = Weights(copies.unit, place)
        copies.resident.sign(packed.signatures)
        copies.master_copy.move_from(copies.resident, arena)
    finally:
        copies.resident = None
        backend.synchronize()  # Race: copies and kernels may still use both.
        for buffer in allocated:
            backend.free(buffer)


def _unpack(
    what: str, copies: UnitCopies, source: torch.Tensor, place: torch.Tensor, unpacker: Unpacker, checks: Checks
) -> None:
    """Make a unit in ``place`` on the device of its packed copy, which was brought to ``source``; ``what`` says why."""
    assert copies.packed is not None
    layout = copies.packed.layout
    unpack = partial(layout.unpack, unpacker, source, place)
    checks.check_packed(what, [OnDevice(copies, layout.parts_in(source))])
    unpack()
    checks.check_unpacked(what, [OnDevice(copies, copies.unit.layout.bytes_in(place))], unpack)
