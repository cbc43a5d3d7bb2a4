"""Packed copies that processes of one host share: how one is asked for, and taken from others.

[Note: asked for when its turn comes]
A unit is asked for when its weights are about to be read. So two workers that begin together, with the same units in
the same order, each pack about half: what others pack is left, and looked at once more at the end. What they pack
still then streams as it is in this prompt, and is packed or taken in the next one: nobody waits, and nothing is
packed twice.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable

from ..errors import SharingError
from ..model.packed_table import read_table, table_bytes
from ..sharing.ledger import Answer, Kind
from ..sharing.share import NoShare
from .arena import Arena
from .copy_keys import check_files, packed_key_of
from .host_memory import HostBuffer
from .memory_ahead import Wanted
from .packed_copy import PackedCopy
from .shared_buffer import LEAST_BYTES, SharedBuffer, sharing, why_no_memory
from .unit_copies import UnitCopies
from .weights import Patches


class Claim:
    """A packed copy that this process is to build; others are told so for as long as this exists, or what it began.

    Attributes:
        key: of the copy.
    """

    def __init__(self, share: NoShare, key: bytes) -> None:
        self.key = key
        self._share = share
        self._end = weakref.finalize(self, share.stop_building, key)
        self._end.atexit = False  # The connection ends with the process.

    def begin(self, nbytes: int) -> SharedBuffer | None:
        """Return memory of this size to be filled; None where the system gives none."""
        try:
            buffer = SharedBuffer(self._share, self.key, nbytes)
        except OSError as error:
            self._share.give_up(why_no_memory(error))
            return None
        self._end.detach()
        return buffer

    def give_up(self) -> None:
        """It is not built after all."""
        self._end()


class NoPackedShare:
    """Every packed copy is this process's own."""

    def may_share(self, copies: UnitCopies) -> bool:
        """Whether others can know the packed copy of this unit."""
        return False

    def is_there(self, copies: UnitCopies) -> bool:
        """Whether others have it."""
        return False

    def claim(self, wanted: Wanted) -> Claim | Kind:
        """Ask for a unit's packed copy: it is taken (``HAVE``), or to be built here, or others build it (``LATER``), or
        this process must have its own (``REFUSED``)."""
        return Kind.REFUSED

    def take(self, wanted: Wanted) -> bool:
        """Take a unit's packed copy if it is there; returns whether it was taken."""
        return False


NO_PACKED_SHARE = NoPackedShare()


class PackedShare(NoPackedShare):
    """Asks for packed copies with ``patches``. What is taken counts in ``arena``, and replaces what the unit has."""

    def __init__(self, arena: Arena, patches: Patches) -> None:
        self._arena = arena
        self._patches = patches
        self._keys: dict[UnitCopies, bytes | None] = {}

    def may_share(self, copies: UnitCopies) -> bool:
        return self._key(copies) is not None

    def is_there(self, copies: UnitCopies) -> bool:
        key = self._key(copies)
        return key is not None and sharing(self._arena).is_whole(key)

    def claim(self, wanted: Wanted) -> Claim | Kind:
        copies, most = wanted
        share, key = sharing(self._arena), self._key(copies)
        if key is None:
            return Kind.REFUSED
        answer = share.want(key, most + table_bytes(copies.unit.layout), within=True)
        if answer.kind is Kind.BUILD:
            return Claim(share, key)
        if answer.kind is Kind.HAVE and not self._take(wanted, share, key, answer):
            return Kind.REFUSED
        return answer.kind

    def take(self, wanted: Wanted) -> bool:
        if not self.is_there(wanted.copies):
            return False
        found = self.claim(wanted)
        if isinstance(found, Claim):  # The last one who had it has just let go of it.
            found.give_up()
        return found is Kind.HAVE

    def _key(self, copies: UnitCopies) -> bytes | None:
        """What others know the unit's packed copy by; None where it must be this process's own."""
        if copies not in self._keys:
            layout = copies.unit.layout
            check_files(layout)
            # One that is damaged may be theirs, so the next one is not.
            own = layout.nbytes < LEAST_BYTES or (copies.packed is not None and copies.packed.spoiled)
            self._keys[copies] = None if own else packed_key_of(layout, self._signatures(copies))
        return self._keys[copies]

    def _signatures(self, copies: UnitCopies) -> dict[str, object]:
        found = {value.name: self._patches.signature(value.name) for value in copies.unit.layout.values}
        return {name: signature for name, signature in found.items() if signature is not None}

    def _take(self, wanted: Wanted, share: NoShare, key: bytes, answer: Answer) -> bool:
        """Have the unit stream from a copy that others have built; returns whether it could be used."""
        copies, most = wanted
        assert answer.descriptor is not None
        try:
            memory = SharedBuffer(share, key, answer.value, answer.descriptor)
        except OSError as error:
            share.drop(key)
            share.give_up(why_no_memory(error))
            return False
        finally:
            os.close(answer.descriptor)
        try:
            layout = read_table(copies.unit.layout, memory.memory)
        except SharingError as error:
            memory.close()
            share.complain(f"the packed copy of {copies.unit.name} that is there is of no use: {error}")
            return False
        if not self._lock(copies, memory):
            return False
        share.taken += 1
        replace_by(copies, PackedCopy(layout, memory, most, self._signatures(copies)), self._arena.release)
        return True

    def _lock(self, copies: UnitCopies, memory: SharedBuffer) -> bool:
        """Page-lock it, if need be in the place of what the unit has."""
        arena = self._arena
        if not take_in(arena, memory, copies):
            memory.close()
            return False
        if arena.lock(memory):
            return True
        arena.release(memory)
        return False


def packed_share(arena: Arena, patches: Patches, checked: bool) -> NoPackedShare:
    """Where packed copies with ``patches`` may come from, and go to. Those that are ``checked`` by sums of what this
    process has packed are its own (verify.py, Note: what is packed is checked twice)."""
    return NO_PACKED_SHARE if checked or not sharing(arena).is_on else PackedShare(arena, patches)


def take_in(arena: Arena, memory: HostBuffer, copies: UnitCopies) -> bool:
    """Count memory for a packed copy as page-locked. Where there is no room for it the unit's own goes first: nothing
    is read from that any more."""
    if arena.take_in(memory):
        return True
    for own in (copies.drop_packed(), copies.drop_master() if copies.pinned else None):
        if own is not None:
            arena.release(own)
    return arena.take_in(memory)


def replace_by(copies: UnitCopies, packed: PackedCopy, release: Callable[[HostBuffer], object]) -> None:
    """Have a unit stream from ``packed``. The packed copy before that, and the master copy, are released."""
    before, copies.packed = copies.drop_packed(), packed
    for memory in (before, copies.drop_master()):
        if memory is not None:
            release(memory)
