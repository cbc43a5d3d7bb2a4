"""The master copy of a unit in host memory: how it comes about, and how it is shared with other processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from ..errors import SharingError
from ..model.blocks import Unit
from ..model.contents import needs_work, ranges, read_range
from ..sharing.ledger import Kind
from .arena import Arena
from .copy_keys import NO_SIGNATURES, check_files, key_of
from .host_memory import HostBuffer
from .shared_buffer import SharedBuffer, claim_shared, sharing
from .transfer import copies_from
from .weights import KnownSignature, Patches, Weights

# A builder checks after so many bytes whether it shall stop: 16 threads have 64 MB under way.
BUILD_BYTES = 4 * 1024**2


class _Master(NamedTuple):
    """A master copy and the memory that it lies in."""

    weights: Weights
    memory: HostBuffer


class MasterCopy:
    """A unit's weights in host memory, patches included, or what there is of them so far.

    Attributes:
        built: a copy that a builder's thread has finished and that is not adopted yet (builder.py, Note: handed over,
            not shared).
        wanted: signatures of the patches that a copy which is needed will get.
        left_to_others: another process builds the copy that was to be built here.
    """

    def __init__(self, unit: Unit) -> None:
        self.built: _Master | None = None
        self.wanted: dict[str, object] = {}
        self.left_to_others = False
        self._unit = unit
        self._stays_own: Weights | None = None
        self._master: _Master | None = None
        self._begun: tuple[HostBuffer, int] | None = None

    @property
    def weights(self) -> Weights | None:
        return self._master.weights if self._master is not None else None

    @property
    def pinned(self) -> bool:
        """Whether there is one in page-locked memory."""
        return self._master is not None and self._master.memory.pinned

    @property
    def is_read_only(self) -> bool:
        """Whether there is one that other processes may have too: nobody may write to it."""
        return self._master is not None and self._master.memory.read_only

    @property
    def nbytes(self) -> int:
        """Host memory that it takes, what is being built included."""
        return self._unit.nbytes if self._master or self.built or self._begun else 0

    def take_up(self, unit: Unit) -> None:
        """The unit was laid out anew, and lies in the memory as before."""
        self._unit = unit
        if self._master is not None:
            self._master.weights.take_up(unit)

    def lacks(self, patches: Patches) -> bool:
        """Whether there is no master copy with these patches in it, nor one that they may be written to."""
        return self._master is None or (self.is_read_only and bool(self._master.weights.stale(patches)))

    def is_shared_elsewhere(self, arena: Arena) -> bool:
        """Whether the master copy that is missing is there already, in memory of other processes."""
        share = sharing(arena)
        key = key_of(self._unit.layout) if share.is_on else None
        return key is not None and share.is_whole(key)

    @property
    def may_be_shared(self) -> bool:
        """Whether it is this process's own, has patches by which others may know it, and was not written to."""
        if self._master is None or self.is_read_only or self._master.weights is self._stays_own:
            return False
        weights = self._master.weights
        known = all(isinstance(one, KnownSignature) for one in weights.signatures.values())
        return known and weights.patched and weights.fills_layout and not weights.written

    def move_from(self, resident: Weights, arena: Arena) -> None:
        """Make it from a resident copy, patches included."""
        memory, _ = self._take_begun(arena, own=True) or (arena.allocate(self._unit.nbytes), 0)
        try:
            master = Weights(self._unit, memory.memory, computes=False)
            master.write_from(resident)
            arena.lock(memory)
        except BaseException:
            arena.release(memory)
            raise
        self._master = _Master(master, memory)

    def fill(self, arena: Arena, stopped: Callable[[], bool], forget: bool, needed: bool = False) -> bool:
        """On a builder's thread: fill memory with the weights as they were loaded, for :meth:`lock`.

        It goes on with what was begun before, and returns whether memory was available. An unpatched master copy in
        pageable memory is of no use, since the original is as good, unless weights are cast on the way, or the copy is
        ``needed`` for other code to write to.
        """
        self.left_to_others = False
        if self._master is not None:
            copy = self._copy_to_own if needed else self._copy_to_share
            self._begun = copy(arena, self._master, stopped)
            return True
        begun = self._take_begun(arena, own=needed) or self._claim(arena, needed)
        if begun is None:
            return self.left_to_others
        memory, filled = begun
        try:
            for start, end in ranges(self._unit.layout, BUILD_BYTES):
                if start < filled:
                    continue
                if stopped():
                    break
                memory.fill(start, end, self._reads(start, end, forget))
                filled = end
            if filled == self._unit.nbytes:
                memory.finish(
                    not isinstance(memory, SharedBuffer) or memory.key == key_of(self._unit.layout, memory.signatures)
                )
        except SharingError as error:
            arena.release(memory)
            sharing(arena).give_up(str(error))
            return self.fill(arena, stopped, forget, needed)  # It is this process's own then.
        except BaseException:
            arena.release(memory)
            raise
        self._begun = memory, filled
        return True

    def _key_of(self, memory: HostBuffer) -> bytes | None:
        return key_of(self._unit.layout, memory.signatures)

    def _reads(self, start: int, end: int, forget: bool) -> Callable[[torch.Tensor], None]:
        return lambda target: read_range(self._unit.layout, start, end, target, forget)

    def _take_begun(self, arena: Arena, own: bool) -> tuple[HostBuffer, int] | None:
        """Return what was begun. Where the copy must be this process's ``own`` one that is to be shared is dropped."""
        begun, self._begun = self._begun, None
        if begun is not None and own and begun[0].read_only:
            arena.release(begun[0])
            return None
        return begun

    def _claim(self, arena: Arena, needed: bool) -> tuple[HostBuffer, int] | None:
        """Return memory for a master copy, and how much of it is filled already; None where there is none, or where
        another process fills it."""
        found = self._take_patched(arena) if needed else self._claim_shared(arena)
        if isinstance(found, SharedBuffer):
            return found, found.nbytes if found.is_there else 0
        if found is Kind.LATER:
            self.left_to_others = True
            return None
        if (memory := arena.claim(self._unit.nbytes)) is not None:
            return memory, 0
        of_use = needs_work(self._unit.layout) and arena.budget.has_room(self._unit.nbytes)
        return (arena.allocate(self._unit.nbytes), 0) if of_use or needed else None

    def _claim_shared(self, arena: Arena, signatures: Mapping[str, object] = NO_SIGNATURES) -> SharedBuffer | Kind:
        """Ask for a copy with these patches (:func:`claim_shared`)."""
        if not sharing(arena).is_on:
            return Kind.REFUSED
        check_files(self._unit.layout)
        key = key_of(self._unit.layout, signatures)
        return Kind.REFUSED if key is None else claim_shared(arena, key, self._unit.nbytes, signatures)

    def _take_patched(self, arena: Arena) -> SharedBuffer | Kind:
        """Take the copy that is needed if it is there, patches included. Else it is patched in memory of this process,
        as what is shared is never written to, and may be shared later (:meth:`_copy_to_share`)."""
        key = key_of(self._unit.layout, self.wanted) if self.wanted and sharing(arena).is_on else None
        if key is None or not sharing(arena).is_whole(key):
            return Kind.REFUSED
        found = self._claim_shared(arena, self.wanted)
        if isinstance(found, SharedBuffer) and not found.is_there:  # The last one who had it has just let go of it.
            arena.release(found)
            return Kind.REFUSED
        return found if isinstance(found, SharedBuffer) else Kind.REFUSED

    def _copy_to_own(self, arena: Arena, master: _Master, stopped: Callable[[], bool]) -> tuple[HostBuffer, int] | None:
        """Put memory of this process's own in the place of a shared master copy, which gets patches; or a shared one
        that has them already. Returns it, to be locked; None if it was stopped."""
        taken = self._take_patched(arena)
        if isinstance(taken, SharedBuffer):
            memory: HostBuffer = taken
        else:
            memory = arena.claim(self._unit.nbytes) or arena.allocate(self._unit.nbytes)
            memory.signatures = master.weights.signatures
            for start, end in ranges(self._unit.layout, BUILD_BYTES):
                if stopped():
                    arena.release(memory)
                    return None
                memory.fill(start, end, copies_from(master.weights.newest[start:end]))
        self._master = None
        arena.release(master.memory)
        return memory, self._unit.nbytes

    def _copy_to_share(
        self, arena: Arena, master: _Master, stopped: Callable[[], bool]
    ) -> tuple[SharedBuffer, int] | None:
        """Return a copy of the master copy that others may have too, or theirs; None where there is none (now)."""
        weights, reason = master.weights, arena.reason
        memory = self._claim_shared(arena, weights.signatures)
        arena.reason = reason  # The master copy is page-locked already.
        if not isinstance(memory, SharedBuffer):
            self.left_to_others = memory is Kind.LATER
            if not self.left_to_others:
                self._stays_own = weights  # Nobody else can know it, or there is no room: do not ask in each prompt.
            return None
        try:
            for start, end in () if memory.is_there else ranges(self._unit.layout, BUILD_BYTES):
                if stopped():
                    arena.release(memory)
                    return None
                memory.fill(start, end, copies_from(weights.buffer[start:end]))
            memory.finish()
        except SharingError as error:
            arena.release(memory)
            sharing(arena).give_up(str(error))
            return None
        except BaseException:
            arena.release(memory)
            raise
        return memory, self._unit.nbytes

    def make_own(self, arena: Arena) -> None:
        """Put a copy that may be written to in the place of the shared one, patches included."""
        assert self._master is not None
        shared, memory = self._master, arena.allocate(self._unit.nbytes)
        try:
            own = Weights(self._unit, memory.memory, computes=False)
            own.write_from(shared.weights)
            arena.lock(memory)
        except BaseException:
            arena.release(memory)
            raise
        self._master = _Master(own, memory)
        arena.release(shared.memory)

    def lock(self, arena: Arena, needed: bool = False) -> bool:
        """On a builder's thread: if the memory was filled as a whole, page-lock it and leave it to be adopted.

        Returns whether others shall be built: false when no more memory may be page-locked.
        """
        if self._begun is None:
            return True  # Another process builds it.
        memory, filled = self._begun
        if filled < self._unit.nbytes:
            return True
        self._begun = None
        try:
            locked = memory.pinned or arena.lock(memory)
            of_use = self._master is None and (needed or needs_work(self._unit.layout))
            if locked or of_use:
                seen = memory.seen if isinstance(memory, SharedBuffer) else None
                weights = Weights(self._unit, memory.memory, False, memory.read_only, seen)
                self.built = _Master(weights, memory)
                self.built.weights.sign(memory.signatures)
            else:
                arena.release(memory)
        except BaseException:
            arena.release(memory)
            raise
        return locked

    @property
    def begun_is_there(self) -> bool:
        """Whether what was begun takes no more memory of the machine, as others have it already."""
        return self._begun is not None and self._begun[0].is_there

    def give_up_begun(self, arena: Arena) -> None:
        """On a builder's thread: free memory that was filled and shall not be page-locked after all."""
        begun, self._begun = self._begun, None
        if begun is not None:
            arena.release(begun[0])

    def adopt(self) -> HostBuffer | None:
        """Take the master copy that a builder has finished, if there is one; returns the memory of one before it."""
        built, self.built = self.built, None
        if built is None:
            return None
        before, self._master = self._master, built
        return before.memory if before is not None else None

    def begin_anew(self) -> None:
        """The master copy holds patches that are not wanted any more: have it filled again, in the same memory."""
        assert self._master is not None
        self._begun, self._master = (self._master.memory, 0), None

    def drop(self) -> HostBuffer | None:
        """Drop the copy, or what was built of one, and return its memory. No builder may be at work."""
        self.adopt()
        dropped, self._master = self._master, None
        begun, self._begun = self._begun, None
        if dropped is not None:
            return dropped.memory
        return begun[0] if begun is not None else None

    def release(self, arena: Arena) -> None:
        """Give all its memory back."""
        before = self.adopt()
        master = self._master.memory if self._master else None
        for memory in (before, master, self._begun[0] if self._begun else None):
            if memory is not None:
                arena.release(memory)
        self._master = self._begun = None
