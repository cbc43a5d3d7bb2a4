"""Makes packed copies: from the file or another copy to the device, patched and packed there, and down.

[Note: up, pack, down]
The reader brings one unit after another to the device, in two places in turn, as it brings residents. While one is
patched and packed the next is read. The host waits for the device once for each unit, because how large it is then is
known only when it is packed.
 1. A place is filled again when the kernels that packed what lay there are over: the reader's copies wait for an event
    that was recorded behind them.
 2. Kernels wait for the reader's copies.
 3. All units are packed into the same memory. What lies there goes down behind the kernels, on their stream, and the
    kernels of the next unit come behind that. So once the host has waited for the next unit, or for everything, it has
    arrived.
 4. Then it replaces the unit's master copy, whose memory is given back at once: host memory is needed for all that
    streams and a few units more, not for all of it twice. What goes down may be written where the unit's packed copy
    with other patches was, which was read before, on the same stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack

import torch

from ..devices.backend import Backend
from ..devices.copies import aligned
from ..model.packed_units import MeasuredUnit, measure_unit
from ..packing.packers import packer_of
from ..planning.packing import Refusals
from .checks import Checks
from .memory_ahead import MemoryAhead, Wanted
from .packed_copy import PackedCopy
from .packing_place import PackingPlace
from .supply import Supply
from .transfer import Transfer
from .unit_copies import UnitCopies
from .weights import Patches


def pack_units(
    backend: Backend, supply: Supply, wanted: Mapping[int, Wanted], patches: Patches, room: int, checks: Checks
) -> Refusals:
    """Give each of ``wanted`` its packed copy, with ``patches``, in place of its master copy; nothing is under way.

    Returns those that could not be packed. These, and any after an error, may have lost their master copies or packed
    copies with other patches.

    Args:
        wanted: by number. Those come first that have memory of their own, as they need no room and make some.
        room: bytes on the device to pack them in; enough for the largest unit and the most that one takes packed.
        checks: is asked to check what has arrived there.
    """
    in_order = sorted(wanted, key=lambda number: not _has_memory(wanted[number].copies))
    reason = supply.arena.reason
    packing = UnitPacking(backend, supply, {number: wanted[number] for number in in_order}, patches, checks)
    try:
        packing.begin(room)
        while packing.pack_next():
            pass
    finally:
        packing.end()
    if not packing.refused:
        supply.arena.reason = reason  # There was too little room ahead, but enough in the end.
    return packing.refused


class UnitPacking:
    """Packs one unit after another (Note: up, pack, down).

    Attributes:
        refused: units that were not packed so far.
    """

    def __init__(
        self, backend: Backend, supply: Supply, wanted: Mapping[int, Wanted], patches: Patches, checks: Checks
    ) -> None:
        self.refused = Refusals()
        self._backend = backend
        self._supply = supply
        self._patches = patches
        self._checks = checks
        self._packer = packer_of(backend.device)
        self._memory = MemoryAhead(supply.arena, wanted.values())
        self._units = deque((number, *one) for number, one in wanted.items())
        self._to_ask = deque(one.copies for one in wanted.values())
        self._buffers: list[torch.Tensor] = []
        self._coming: deque[tuple[PackingPlace, Transfer]] = deque()
        self._going: tuple[UnitCopies, PackedCopy] | None = None

    def begin(self, room: int) -> None:
        """Allocate memory on the device, and ask for the first units."""
        most = max(most for *_, most in self._units)
        self._allocate(most)
        unpacked = max(aligned(copies.unit.nbytes) for copies in self._to_ask)
        packed = max((copies.packed.layout.nbytes for copies in self._to_ask if copies.packed is not None), default=0)
        unpacks = most + unpacked + packed <= room
        largest = unpacked + packed if unpacks else unpacked
        for _ in range(max(1, min(2, len(self._units), (room - most) // largest))):
            self._ask(PackingPlace(self._backend, self._allocate(largest), unpacks))
        self._memory.begin()

    def _allocate(self, nbytes: int) -> torch.Tensor:
        self._buffers.append(self._backend.allocate(nbytes))
        return self._buffers[-1]

    def pack_next(self) -> bool:
        """Pack the next unit, and ask for one more in its place; returns whether to go on."""
        if not self._units:
            return False
        number, copies, most = self._units.popleft()
        place, transfer = self._coming.popleft()
        self._backend.wait(self._supply.reader.wait(transfer, self._supply.tick))
        weights = place.patched(copies, self._patches, self._supply.tick, self._checks)
        sums = self._checks.sums_of(copies.unit.layout.bytes_in(weights.buffer))
        found = None
        if weights.fills_layout:
            found = measure_unit(copies.unit.layout, weights.buffer, self._packer, most)
            self._arrived()  # To measure a unit is to wait for it, and what went down before it has arrived.
        memory = self._memory.next(needed=found is not None)
        if found is None:
            copies.too_large_with = weights.signatures
            self.refused |= Refusals(too_large=frozenset([number]))
        elif memory is None:
            self.refused |= Refusals(without_room=frozenset([number, *(number for number, *_ in self._units)]))
            return False
        else:
            self._bring_down(found, copies, PackedCopy(found.layout, memory, weights.signatures, sums))
        place.free = self._backend.mark()
        self._ask(place)
        return True

    def end(self) -> None:
        """Wait for what is going down, and give everything else back, each thing also after an error with another."""
        with ExitStack() as last:
            last.callback(self._memory.close)
            for buffer in self._buffers:
                last.callback(self._backend.free, buffer)
            last.callback(self._forget_going)
            self._supply.reader.abandon()  # What is on its way to a place is not needed any more.
            self._backend.synchronize()  # Race: copies and kernels may still use the places, and write to the memory.
            self._arrived()

    def _ask(self, place: PackingPlace) -> None:
        """Ask for the next unit (Note: up, pack, down, 1)."""
        if self._to_ask:
            part = place.part(self._to_ask.popleft(), self._patches)
            self._coming.append((place, self._supply.reader.transfer([part], [place.free])))

    def _bring_down(self, found: MeasuredUnit, copies: UnitCopies, packed: PackedCopy) -> None:
        """Queue packing, and behind it the copy to page-locked memory (Note: up, pack, down, 3)."""
        source = self._buffers[0][: packed.layout.nbytes]
        found.write(source)
        packed = packed._replace(packed_sums=self._checks.sums_of(packed.layout.parts_in(source)))
        if (before := copies.drop_packed()) is not None:
            self._memory.take_back(before)
        _copy_down(source, packed.buffer)
        self._memory.hand_over(packed.memory)
        self._going = copies, packed

    def _arrived(self) -> None:
        """What was going down has arrived, and replaces the master copy (Note: up, pack, down, 4)."""
        if self._going is None:
            return
        copies, packed = self._going
        self._going = None
        copies.packed = packed
        if (master := copies.drop_master()) is not None:
            self._memory.give_back(master)

    def _forget_going(self) -> None:
        """Nobody knows whether it has arrived."""
        if self._going is not None:
            self._memory.take_back(self._going[1].memory)
            self._going = None


def _copy_down(packed: torch.Tensor, target: torch.Tensor) -> None:
    with torch.inference_mode(False):
        target.copy_(packed, non_blocking=True)


def _has_memory(copies: UnitCopies) -> bool:
    """Whether it has page-locked memory in which it may be packed, or that it gives back for that."""
    return copies.packed is not None or copies.pinned
