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
 5. Threads take and give back page-locked memory meanwhile, which takes longer than all the rest. They work on memory
    that no other thread refers to: before it is handed over by a future, or after the host has dropped it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import torch

from ..devices.backend import Backend
from ..devices.copies import ALIGNMENT
from ..model.packed_units import MeasuredUnit, measure_unit
from ..packing.packers import packer_of
from ..packing.unpackers import Unpacker, unpacker_of
from .arena import Arena, HostBuffer
from .baking import bake_residents
from .checks import Checks, OnDevice
from .supply import Supply
from .transfer import Load, Move, Tick, Transfer
from .unit_copies import PackedCopy, UnitCopies
from .weights import Patches, Weights

# Threads that take and give back memory, and units for which memory is taken ahead. (With one thread that does
# everything 18 GB took 1.5 s: 0.85 to take memory, 0.4 to give it back, on an H200.)
MEMORY_THREADS = 4
UNITS_AHEAD = 6


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
    """Give each of ``wanted`` its packed copy, with ``patches``, in place of its master copy; nothing is under way.

    After an error some units have theirs, and the others what they had, except packed copies with other patches.

    Args:
        wanted: by number.
        room: bytes on the device to pack them in; enough for the largest unit.
        checks: is asked to check what has arrived there.
    """
    work = _Work(backend, supply, wanted, patches, checks)
    try:
        work.begin(room)
        while work.pack_next():
            """One more."""
    finally:
        work.end()
    return work.refused


class _Work:
    """Packs one unit after another (Note: up, pack, down).

    Attributes:
        refused: units that were not packed so far.
    """

    def __init__(
        self, backend: Backend, supply: Supply, wanted: Mapping[int, Wanted], patches: Patches, checks: Checks
    ) -> None:
        self.refused = Refused(set(), set())
        self._backend = backend
        self._supply = supply
        self._patches = patches
        self._checks = checks
        self._packer = packer_of(backend.device)
        self._units = deque((number, *one) for number, one in wanted.items())
        self._to_ask = deque(one.copies for one in wanted.values())
        self._places: list[_Place] = []
        self._packed: torch.Tensor | None = None
        self._coming: deque[tuple[_Place, Transfer]] = deque()
        self._going: tuple[UnitCopies, PackedCopy] | None = None
        self._pool = ThreadPoolExecutor(MEMORY_THREADS, "weightstream-pack")
        self._to_take = deque(wanted.values())
        self._taken: deque[Future[HostBuffer | None]] = deque()
        self._given_back: list[Future[None]] = []
        self._unused: list[HostBuffer] = []

    def begin(self, room: int) -> None:
        """Allocate places, and ask for the first units."""
        largest = max(_Place.bytes_for(copies, self._patches) for copies in self._to_ask)
        most = max(most for *_, most in self._units)
        self._packed = self._backend.allocate(most)
        for _ in range(max(1, min(2, len(self._units), (room - most) // largest))):
            self._places.append(_Place(self._backend, largest))
        for place in self._places:
            self._ask(place)
        self._take_ahead()

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
        memory = self._memory(copies, most)
        if found is None:
            self.refused.large.add(number)
        elif memory is None:
            self.refused.without_room.update([number, *(number for number, *_ in self._units)])
            return False
        else:
            self._bring_down(found, copies, PackedCopy(found.packed_unit, memory, weights.signatures, sums))
        place.free = self._backend.mark()
        self._ask(place)
        return True

    def end(self) -> None:
        """Wait for what is going down, and give everything else back."""
        self._supply.reader.abandon()  # What is on its way to a place is not needed any more.
        self._backend.synchronize()  # Race: copies and kernels may still use the places, and write to the memory.
        self._arrived()
        for buffer in (self._packed, *(place.buffer for place in self._places)):
            if buffer is not None:
                self._backend.free(buffer)
        self._pool.shutdown()
        for memory in self._unused:
            self._supply.arena.release(memory)
        self._finish_giving_back()

    def _ask(self, place: _Place) -> None:
        """Ask for the next unit (Note: up, pack, down, 1)."""
        if self._to_ask:
            part = place.part(self._to_ask.popleft(), self._patches)
            self._coming.append((place, self._supply.reader.transfer([part], [place.free])))

    def _take_ahead(self) -> None:
        """Have memory taken for the next units, one after another, as far as there is room now."""
        while self._to_take and len(self._taken) < UNITS_AHEAD:
            if (taken := self._take(*self._to_take[0])) is None:
                return
            self._to_take.popleft()
            self._taken.append(taken)

    def _take(self, copies: UnitCopies, nbytes: int) -> Future[HostBuffer | None] | None:
        """Have page-locked memory taken for a unit, its own if it has some; None where no more may be page-locked."""
        if copies.packed is not None:
            own: Future[HostBuffer | None] = Future()
            own.set_result(copies.packed.memory)
            return own
        if (memory := self._supply.arena.claim(nbytes)) is None:
            return None
        self._unused.append(memory)
        return self._pool.submit(self._lock, memory)

    def _lock(self, memory: HostBuffer) -> HostBuffer | None:
        """Note: up, pack, down, 5."""
        memory.memory.numpy().fill(0)  # Touched pages are page-locked several times faster.
        return memory if self._supply.arena.lock(memory) else None

    def _memory(self, copies: UnitCopies, nbytes: int) -> HostBuffer | None:
        """Return the memory of the next unit; None where no more may be page-locked, also with what was given back."""
        if self._taken:
            memory = self._taken.popleft().result()
        else:
            self._to_take.popleft()
            memory = None
        if memory is None:
            self._finish_giving_back()
            taken = self._take(copies, nbytes)
            memory = taken.result() if taken is not None else None
        self._take_ahead()
        return memory

    def _finish_giving_back(self) -> None:
        while self._given_back:
            self._given_back.pop().result()

    def _bring_down(self, found: MeasuredUnit, copies: UnitCopies, packed: PackedCopy) -> None:
        """Queue packing, and behind it the copy to page-locked memory (Note: up, pack, down, 3)."""
        assert self._packed is not None
        source = self._packed[: packed.unit.nbytes]
        found.write(source)
        packed = packed._replace(packed_sums=self._checks.sums_of(packed.unit.parts_in(source)))
        if (memory := copies.drop_packed()) is not None:
            self._unused.append(memory)
        _copy_down(source, packed.buffer)
        self._unused.remove(packed.memory)
        self._going = copies, packed

    def _arrived(self) -> None:
        """What was going down has arrived, and replaces the master copy (Note: up, pack, down, 4)."""
        if self._going is None:
            return
        (copies, copies.packed), self._going = self._going, None
        if (master := copies.drop_master()) is not None:
            self._given_back.append(self._pool.submit(self._supply.arena.release, master))


class _Place:
    """Memory on the device in which one unit at a time is patched and packed.

    Attributes:
        buffer: the unit, and behind it what it is unpacked from, if it is.
        free: the event behind the last use.
    """

    def __init__(self, backend: Backend, nbytes: int) -> None:
        self.buffer = backend.allocate(nbytes)
        self.free = backend.mark()  # Race: kernels of this memory's previous user may still be under way.
        self._unpacker = unpacker_of(backend.device)
        self._packed: PackedCopy | None = None

    @staticmethod
    def bytes_for(copies: UnitCopies, patches: Patches) -> int:
        """Bytes of a place for this unit."""
        unpacked = _aligned(copies.unit.nbytes)
        return unpacked + copies.packed.unit.nbytes if _is_to_unpack(copies, patches) else unpacked

    def part(self, copies: UnitCopies, patches: Patches) -> Load | Move:
        """What to ask the reader for: patches are written into weights as they were loaded."""
        self._packed = copies.packed if _is_to_unpack(copies, patches) else None
        if self._packed is not None:
            return Move(self._packed.buffer, self._behind(copies), pinned=True)
        target = self.buffer[: copies.unit.nbytes]
        if _has_master(copies, patches):
            return Move(copies.master.buffer, target, copies.pinned)
        return Load(copies.unit.layout, target)

    def patched(self, copies: UnitCopies, patches: Patches, tick: Tick, checks: Checks) -> Weights:
        """The unit's weights, which have come, with these patches."""
        weights = Weights(copies.unit, self.buffer[: copies.unit.nbytes])
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
        return self.buffer[_aligned(copies.unit.nbytes) :][: self._packed.unit.nbytes]


def _copy_down(packed: torch.Tensor, target: torch.Tensor) -> None:
    with torch.inference_mode(False):
        target.copy_(packed, non_blocking=True)


def _has_master(copies: UnitCopies, patches: Patches) -> bool:
    """Whether there is a master copy with these patches."""
    return copies.master is not None and copies.master.fills_layout and not copies.master.stale(patches)


def _is_to_unpack(copies: UnitCopies, patches: Patches) -> bool:
    """Whether the weights as they were loaded come from a packed copy."""
    packed = copies.packed
    return packed is not None and not (packed.signatures or packed.spoiled or _has_master(copies, patches))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def unpack_to_master(backend: Backend, arena: Arena, copies: UnitCopies, checks: Checks) -> None:
    """Make the master copy of a unit from its packed copy, patches included, by way of the device.

    Nothing is under way, and modules are left as they are.
    """
    packed = copies.packed
    assert packed is not None
    source, place = backend.allocate(packed.unit.nbytes), backend.allocate(copies.unit.nbytes)
    try:
        source.copy_(packed.buffer)
        _unpack("to be written to", copies, source, place, unpacker_of(backend.device), checks)
        copies.resident = Weights(copies.unit, place)
        copies.resident.sign(packed.signatures)
        copies.move_to_master(arena)
    finally:
        copies.resident = None
        backend.synchronize()  # Race: copies and kernels may still use both.
        backend.free(source)
        backend.free(place)


def _unpack(
    what: str, copies: UnitCopies, source: torch.Tensor, place: torch.Tensor, unpacker: Unpacker, checks: Checks
) -> None:
    """Make a unit in ``place`` on the device of its packed copy, which was brought to ``source``; ``what`` says why."""
    assert copies.packed is not None
    packed = copies.packed.unit
    unpack = partial(packed.unpack, unpacker, source, place)
    checks.check_packed(what, [OnDevice(copies, packed.parts_in(source))])
    unpack()
    checks.check_unpacked(what, [OnDevice(copies, copies.unit.layout.bytes_in(place))], unpack)
