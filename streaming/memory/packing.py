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
What is shared with other processes goes down to memory between, and replaces the master copy when it is written from
there (packed_drafts.py, Note: by way of memory between).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from typing import NamedTuple

import torch

from ..devices.backend import Backend
from ..devices.copies import aligned
from ..model.packed_table import table_bytes
from ..model.packed_units import MeasuredUnit, measure_unit
from ..packing.packers import packer_of
from ..planning.packing import Refusals
from ..sharing.ledger import Kind
from .checks import Checks
from .copy_keys import packed_key_of
from .host_memory import HostBuffer
from .memory_ahead import MemoryAhead, Wanted
from .packed_copy import PackedCopy
from .packed_drafts import Drafts
from .packing_place import PackingPlace
from .shared_buffer import SharedBuffer
from .shared_packed import NO_PACKED_SHARE, Claim, NoPackedShare, take_in
from .supply import Supply
from .transfer import Transfer
from .unit_copies import UnitCopies
from .weights import Patches


class _Coming(NamedTuple):
    """A unit that is on its way to the device, to be packed there.

    Attributes:
        claim: of its shared copy; None where its copy is this process's own.
    """

    number: int
    wanted: Wanted
    claim: Claim | None
    place: PackingPlace
    transfer: Transfer


class _Going(NamedTuple):
    """A packed copy that is on its way down.

    Attributes:
        place: where it goes, if its memory is a file that is written then; and whether it is what the file's key says.
    """

    copies: UnitCopies
    packed: PackedCopy
    place: HostBuffer | None = None
    unchanged: bool = True


def pack_units(
    backend: Backend,
    supply: Supply,
    wanted: Mapping[int, Wanted],
    patches: Patches,
    room: int,
    checks: Checks,
    shared: NoPackedShare = NO_PACKED_SHARE,
) -> Refusals:
    """Give each of ``wanted`` its packed copy, with ``patches``, in place of its master copy; nothing is under way.

    Returns those that could not be packed. These, and any after an error, may have lost their master copies or packed
    copies with other patches.

    Args:
        wanted: by number. Those come first that have memory of their own, as they need no room and make some.
        room: bytes on the device to pack them in; enough for the largest unit and the most that one takes packed.
        checks: is asked to check what has arrived there.
        shared: where packed copies come from that other processes have too, and go to.
    """
    in_order = sorted(wanted, key=lambda number: not _has_memory(wanted[number].copies))
    reason = supply.arena.reason
    packing = UnitPacking(backend, supply, {number: wanted[number] for number in in_order}, patches, checks, shared)
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
    """Packs one unit after another (Note: up, pack, down), or takes what others have packed.

    Attributes:
        refused: units that were not packed so far.
    """

    def __init__(
        self,
        backend: Backend,
        supply: Supply,
        wanted: Mapping[int, Wanted],
        patches: Patches,
        checks: Checks,
        shared: NoPackedShare,
    ) -> None:
        self.refused = Refusals()
        self._backend = backend
        self._supply = supply
        self._patches = patches
        self._checks = checks
        self._shared = shared
        self._packer = packer_of(backend.device)
        self._own = {number: one for number, one in wanted.items() if not shared.may_share(one.copies)}
        self._memory = MemoryAhead(supply.arena, self._own.values())
        self._drafts = Drafts(supply.arena, self._memory.submit, self._memory.give_back)
        self._wanted = wanted
        self._to_ask = deque(wanted.items())
        self._left: deque[tuple[int, Wanted]] = deque()
        self._buffers: list[torch.Tensor] = []
        self._places: list[PackingPlace] = []
        self._coming: deque[_Coming] = deque()
        self._going: _Going | None = None

    def begin(self, room: int) -> None:
        """Allocate memory on the device, and ask for the first units."""
        units = [one.copies for one in self._wanted.values()]
        most = max(one.most_bytes for one in self._wanted.values())
        self._allocate(most)
        unpacked = max(aligned(copies.unit.nbytes) for copies in units)
        packed = max((copies.packed.layout.nbytes for copies in units if copies.packed is not None), default=0)
        unpacks = most + unpacked + packed <= room
        largest = unpacked + packed if unpacks else unpacked
        for _ in range(max(1, min(2, len(units), (room - most) // largest))):
            self._places.append(PackingPlace(self._backend, self._allocate(largest), unpacks))
            self._ask(self._places[-1])
        self._memory.begin()

    def _allocate(self, nbytes: int) -> torch.Tensor:
        self._buffers.append(self._backend.allocate(nbytes))
        return self._buffers[-1]

    def pack_next(self) -> bool:
        """Pack the next unit, and ask for one more in its place; returns whether to go on."""
        if not self._coming and not self._look_again():
            self.refused |= Refusals(left=frozenset(number for number, _ in self._left))
            return False
        one = self._coming.popleft()
        copies, place = one.wanted.copies, one.place
        self._backend.wait(self._supply.reader.wait(one.transfer, self._supply.tick))
        weights = place.patched(copies, self._patches, self._supply.tick, self._checks)
        sums = self._checks.sums_of(copies.unit.layout.bytes_in(weights.buffer))
        found = None
        if weights.fills_layout:
            found = measure_unit(copies.unit.layout, weights.buffer, self._packer, one.wanted.most_bytes)
            self._arrived()  # To measure a unit is to wait for it, and what went down before it has arrived.
        memory = self._memory_for(one, found)
        if found is None:
            copies.too_large_with = weights.signatures
            self.refused |= Refusals(too_large=frozenset([one.number]))
        elif memory is None:
            self._refuse_rest(one.number)
            return False
        else:
            packed = PackedCopy(found.layout, memory, one.wanted.most_bytes, weights.signatures, sums)
            self._bring_down(found, one, packed)
        place.free = self._backend.mark()
        self._ask(place)
        return True

    def end(self) -> None:
        """Wait for what is going down, and give everything else back, each thing also after an error with another."""
        with ExitStack() as last:
            last.callback(self._memory.close)
            last.callback(self._drafts.close)
            for buffer in self._buffers:
                last.callback(self._backend.free, buffer)
            last.callback(self._forget_going)
            for one in self._coming:
                last.callback(_give_up, one.claim)
            self._supply.reader.abandon()  # What is on its way to a place is not needed any more.
            self._backend.synchronize()  # Race: copies and kernels may still use the places, and write to the memory.
            self._arrived()
            self._drafts.finish()
            failed = frozenset(number for number, one in self._wanted.items() if one.copies in self._drafts.failed)
            self.refused |= Refusals(without_room=failed)

    # -- which unit comes next -----------------------------------------------------------------------------------

    def _ask(self, place: PackingPlace) -> None:
        """Ask for the next unit (Note: up, pack, down, 1)."""
        if (found := self._next_to_ask()) is not None:
            number, wanted, claim = found
            part = place.part(wanted.copies, self._patches)
            transfer = self._supply.reader.transfer([part], [place.free])
            self._coming.append(_Coming(number, wanted, claim, place, transfer))

    def _next_to_ask(self) -> tuple[int, Wanted, Claim | None] | None:
        """Return the next unit to pack here: neither do others have it, nor pack it now."""
        while self._to_ask:
            number, wanted = self._to_ask.popleft()
            found = self._shared.claim(wanted)
            if found is Kind.LATER:
                self._left.append((number, wanted))
            elif found is not Kind.HAVE:
                return number, wanted, found if isinstance(found, Claim) else None
        return None

    def _look_again(self) -> bool:
        """What others were packing may be there by now, or to be packed here; returns whether any is on its way."""
        if self._left:
            self._drafts.finish()
            self._to_ask, self._left = self._left, deque()
            for place in self._places:
                self._ask(place)
        return bool(self._coming)

    def _refuse_rest(self, number: int) -> None:
        """There is no room for this unit, so none for those after it, except for what others have."""
        rest = [other for other, wanted in (*self._to_ask, *self._left) if not self._shared.take(wanted)]
        refused = frozenset([number, *(one.number for one in self._coming), *rest])
        self.refused |= Refusals(without_room=refused)

    # -- where it goes -------------------------------------------------------------------------------------------

    def _memory_for(self, one: _Coming, found: MeasuredUnit | None) -> HostBuffer | None:
        """Return memory for a unit that was measured; None where there is no room, or it is too large."""
        if one.number in self._own:
            return self._memory.next(needed=found is not None)
        if found is None:
            _give_up(one.claim)
            return None
        nbytes = found.layout.nbytes + table_bytes(one.wanted.copies.unit.layout)
        draft = one.claim.begin(nbytes) if one.claim is not None else None
        if draft is None:
            return self._memory.take_besides(one.wanted)
        if not self._has_room(draft, one.wanted.copies):
            draft.close()
            return None
        self._memory.take_back(draft)
        return draft

    def _has_room(self, draft: HostBuffer, copies: UnitCopies) -> bool:
        """Count ``draft`` as page-locked. Where there is no room all goes first that is not needed any more, and the
        unit's own master copy at last."""
        arena = self._supply.arena
        if arena.take_in(draft):
            return True
        self._drafts.close()
        self._memory.finish_giving_back()
        return take_in(arena, draft, copies)

    def _bring_down(self, found: MeasuredUnit, one: _Coming, packed: PackedCopy) -> None:
        """Queue packing, and behind it the copy to page-locked memory (Note: up, pack, down, 3)."""
        copies, nbytes = one.wanted.copies, packed.layout.nbytes
        source = self._buffers[0][:nbytes]
        found.write(source)
        packed = packed._replace(packed_sums=self._checks.sums_of(packed.layout.parts_in(source)))
        if isinstance(packed.memory, SharedBuffer):
            unchanged = packed.memory.key == packed_key_of(copies.unit.layout, packed.signatures)
            place = self._drafts.place(nbytes)
            going, target = _Going(copies, packed, place, unchanged), place.memory[:nbytes]
        else:
            if (before := copies.drop_packed()) is not None:
                self._memory.take_back(before)
            going, target = _Going(copies, packed), packed.buffer
        _copy_down(source, target)
        self._memory.hand_over(packed.memory)
        self._going = going

    def _arrived(self) -> None:
        """What was going down has arrived, and replaces the master copy (Note: up, pack, down, 4)."""
        if self._going is None:
            return
        going = self._going
        if going.place is not None:
            self._drafts.write(going.copies, going.packed, going.place, going.unchanged)
            self._going = None
            return
        self._going = None
        going.copies.packed = going.packed
        if (master := going.copies.drop_master()) is not None:
            self._memory.give_back(master)

    def _forget_going(self) -> None:
        """Nobody knows whether it has arrived."""
        if self._going is not None:
            self._memory.take_back(self._going.packed.memory)
            self._going = None


def _give_up(claim: Claim | None) -> None:
    if claim is not None:
        claim.give_up()


def _copy_down(packed: torch.Tensor, target: torch.Tensor) -> None:
    with torch.inference_mode(False):
        target.copy_(packed, non_blocking=True)


def _has_memory(copies: UnitCopies) -> bool:
    """Whether it has page-locked memory in which it may be packed, or that it gives back for that."""
    return copies.packed is not None or copies.pinned
