"""The copies of one unit: original, master copy in host memory, resident copy on the device."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

from ..devices.backend import Backend
from ..errors import SharingError, StreamingError
from ..model.blocks import Unit, is_small_buffer
from ..model.contents import needs_work, ranges, read_range
from ..model.identity import identity_of, patched_identity
from ..model.lasting_binding import LastingBinding, ShownBinding
from ..model.layout import Binding
from ..model.packed_units import PackedLayout
from ..model.sums import Summing
from ..sharing.ledger import Kind
from .arena import Arena, HostBuffer
from .reader import Reader
from .shared_buffer import SharedBuffer, claim_shared, sharing
from .transfer import Tick, Transfer, copies_from
from .weights import KnownSignature, Patches, Weights

# A builder checks after so many bytes whether it shall stop: 16 threads have 64 MB under way.
BUILD_BYTES = 4 * 1024**2


class _Master(NamedTuple):
    """A master copy and the memory that it lies in."""

    weights: Weights
    memory: HostBuffer


class PackedCopy(NamedTuple):
    """The unit's weights, patches included, packed in host memory.

    Attributes:
        layout: where its tensors lie.
        memory: in which it lies, from the beginning on; as much as the unit may take with other patches.
        signatures: of the patches in it, by the names of values.
        sums, packed_sums: of the weights before they were packed, and of what was made of them, on the device; None
            where nobody checks that (checks.py).
        spoiled: whether it must not be used, as it was damaged or something else came out.
    """

    layout: PackedLayout
    memory: HostBuffer
    signatures: dict[str, object]
    sums: torch.Tensor | None = None
    packed_sums: torch.Tensor | None = None
    spoiled: bool = False

    @property
    def buffer(self) -> torch.Tensor:
        return self.memory.memory[: self.layout.nbytes]


class _Arriving(NamedTuple):
    """Device memory that is being filled."""

    buffer: torch.Tensor
    transfer: Transfer


class UnitCopies:
    """Every copy of one unit that exists now.

    The original is a view of the mapped file (or memory that the host filled), so letting go of any other copy
    loses nothing but work.

    Attributes:
        arriving: a resident copy that is on its way.
        packed: a packed copy. Modules never point at it; while it is in use they show the original between blocks.
        too_large_with: signatures of the patches with which it turned out to take more than planned when it is packed.
        bound: what modules point at between blocks.
        built: a master copy that a builder's thread has finished and that is not adopted yet (builder.py, Note: handed
            over, not shared).
        wanted: signatures of the patches that a master copy which is needed will get.
        left_to_others: another process builds the copy that was to be built here.
    """

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self.original_binding = unit.layout.original_binding()
        self.shown = ShownBinding(unit.layout)
        self.bound: LastingBinding = self.shown
        self.resident: Weights | None = None
        self.arriving: _Arriving | None = None
        self.built: _Master | None = None
        self.packed: PackedCopy | None = None
        self.too_large_with: dict[str, object] | None = None
        self.wanted: dict[str, object] = {}
        self.left_to_others = False
        self._stays_own: Weights | None = None
        self._master: _Master | None = None
        self._begun: tuple[HostBuffer, int] | None = None
        self._sums: dict[str, torch.Tensor] | None = None

    @property
    def master(self) -> Weights | None:
        return self._master.weights if self._master is not None else None

    @property
    def pinned(self) -> bool:
        """Whether there is a master copy in page-locked memory."""
        return self._master is not None and self._master.memory.pinned

    @property
    def is_read_only(self) -> bool:
        """Whether there is a master copy that other processes may have too: nobody may write to it."""
        return self._master is not None and self._master.memory.read_only

    def lacks_master_for(self, patches: Patches) -> bool:
        """Whether there is no master copy with these patches in it, nor one that they may be written to."""
        return self._master is None or (self.is_read_only and bool(self._master.weights.stale(patches)))

    def is_shared_elsewhere(self, arena: Arena) -> bool:
        """Whether the master copy that is missing is there already, in memory of other processes."""
        share = sharing(arena)
        key = self._key() if share.is_on else None
        return key is not None and share.is_whole(key)

    @property
    def may_be_shared(self) -> bool:
        """Whether there is a master copy of this process's own, with patches by which others may know it, and nothing
        else. Hooks of the host may be in it, so nothing is noted here (:meth:`note_writes`)."""
        if self._master is None or self.is_read_only or self._master.weights is self._stays_own:
            return False
        weights, bound = self._master.weights, self.bound
        known = all(isinstance(one, KnownSignature) for one in weights.signatures.values())
        if not (known and weights.patched and weights.fills_layout) or weights.written:
            return False
        return not any(
            bound.written(value) or bound.handed_out(value) or bound.replaced(value) or bound.moved(value)
            for value in self.unit.layout.values
        )

    def _key(self, signatures: Mapping[str, object] = MappingProxyType({})) -> bytes | None:
        """What others know a copy with these patches by; None where it is of use to this process alone."""
        raw = identity_of(self.unit.layout)
        if raw is None or not signatures:
            return raw
        known = []
        for number, value in enumerate(self.unit.layout.values):
            if (signature := signatures.get(value.name)) is not None:
                identity = signature.identity() if isinstance(signature, KnownSignature) else None
                if identity is None:
                    return None
                known.append((number, identity))
        return patched_identity(raw, known)

    @property
    def master_bytes(self) -> int:
        """Host memory that the master copy takes, one that is being built included."""
        return self.unit.nbytes if self._master or self.built or self._begun else 0

    def patched_by(self, patches: Patches) -> bool:
        return any(patches.signature(value.name) is not None for value in self.unit.layout.values)

    def holds(self, names: Collection[str]) -> bool:
        """Whether one of these tensors is the unit's."""
        return any(name in names for value in self.unit.layout.values for name in value.names)

    # -- master copies -------------------------------------------------------------------------------------------

    def move_to_master(self, arena: Arena) -> None:
        """Make the master copy from the resident one, patches included."""
        assert self.resident is not None
        memory, _ = self._take_begun(arena, own=True) or (arena.allocate(self.unit.nbytes), 0)
        try:
            master = Weights(self.unit, memory.memory, computes=False)
            master.write_from(self.resident)
            arena.lock(memory)
        except BaseException:
            arena.release(memory)
            raise
        self._master = _Master(master, memory)

    def fill_master(self, arena: Arena, stopped: Callable[[], bool], forget: bool, needed: bool = False) -> bool:
        """On a builder's thread: fill memory with the weights as they were loaded, for :meth:`lock_master`.

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
            for start, end in ranges(self.unit.layout, BUILD_BYTES):
                if start < filled:
                    continue
                if stopped():
                    break
                memory.fill(start, end, self._reads(start, end, forget))
                filled = end
            if filled == self.unit.nbytes:
                memory.finish(not isinstance(memory, SharedBuffer) or memory.key == self._key(memory.signatures))
        except SharingError as error:
            arena.release(memory)
            sharing(arena).give_up(str(error))
            return self.fill_master(arena, stopped, forget, needed)  # It is this process's own then.
        except BaseException:
            arena.release(memory)
            raise
        self._begun = memory, filled
        return True

    def _reads(self, start: int, end: int, forget: bool) -> Callable[[torch.Tensor], None]:
        return lambda target: read_range(self.unit.layout, start, end, target, forget)

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
        if (memory := arena.claim(self.unit.nbytes)) is not None:
            return memory, 0
        of_use = needs_work(self.unit.layout) and arena.budget.has_room(self.unit.nbytes)
        return (arena.allocate(self.unit.nbytes), 0) if of_use or needed else None

    def _claim_shared(
        self, arena: Arena, signatures: Mapping[str, object] = MappingProxyType({})
    ) -> SharedBuffer | Kind:
        """Ask for a copy with these patches (:func:`claim_shared`)."""
        if not sharing(arena).is_on:
            return Kind.REFUSED
        for spec in self.unit.layout.specs:
            if spec.source is not None:
                spec.source.file.check_unchanged()  # As a read would, before the file's state goes into the key.
        key = self._key(signatures)
        return Kind.REFUSED if key is None else claim_shared(arena, key, self.unit.nbytes, signatures)

    def _take_patched(self, arena: Arena) -> SharedBuffer | Kind:
        """Take the copy that is needed if it is there, patches included. Else it is patched in memory of this process,
        as what is shared is never written to, and may be shared later (:meth:`_copy_to_share`)."""
        key = self._key(self.wanted) if self.wanted and sharing(arena).is_on else None
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
            memory = arena.claim(self.unit.nbytes) or arena.allocate(self.unit.nbytes)
            memory.signatures = master.weights.signatures
            for start, end in ranges(self.unit.layout, BUILD_BYTES):
                if stopped():
                    arena.release(memory)
                    return None
                memory.fill(start, end, copies_from(master.weights.newest[start:end]))
        self._master = None
        arena.release(master.memory)
        return memory, self.unit.nbytes

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
            for start, end in () if memory.is_there else ranges(self.unit.layout, BUILD_BYTES):
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
        return memory, self.unit.nbytes

    def own_master(self, arena: Arena) -> None:
        """Make a master copy that may be written to of the shared one, patches included."""
        assert self._master is not None
        shared, memory = self._master, arena.allocate(self.unit.nbytes)
        try:
            own = Weights(self.unit, memory.memory, computes=False)
            own.write_from(shared.weights)
            arena.lock(memory)
        except BaseException:
            arena.release(memory)
            raise
        self._master = _Master(own, memory)
        arena.release(shared.memory)

    def lock_master(self, arena: Arena, needed: bool = False) -> bool:
        """On a builder's thread: if the memory was filled as a whole, page-lock it and leave it to be adopted.

        Returns whether others shall be built: false when no more memory may be page-locked.
        """
        if self._begun is None:
            return True  # Another process builds it.
        memory, filled = self._begun
        if filled < self.unit.nbytes:
            return True
        self._begun = None
        try:
            locked = memory.pinned or arena.lock(memory)
            of_use = self._master is None and (needed or needs_work(self.unit.layout))
            if locked or of_use:
                seen = memory.seen if isinstance(memory, SharedBuffer) else None
                weights = Weights(self.unit, memory.memory, False, memory.read_only, seen)
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

    def is_packed_with(self, patches: Patches) -> bool:
        """Whether there is a packed copy with these patches and no others, and nothing is known to be wrong with it."""
        if self.packed is None or self.packed.spoiled:
            return False
        return self._are_signatures_of(patches, self.packed.signatures)

    def is_too_large_with(self, patches: Patches) -> bool:
        """Whether it is known to take more than planned when it is packed with these patches."""
        return self.too_large_with is not None and self._are_signatures_of(patches, self.too_large_with)

    def _are_signatures_of(self, patches: Patches, found: dict[str, object]) -> bool:
        return all(patches.signature(value.name) == found.get(value.name) for value in self.unit.layout.values)

    def spoil_packed(self) -> None:
        """The packed copy must not be used: the next load makes it anew."""
        assert self.packed is not None
        self.packed = self.packed._replace(spoiled=True)

    def drop_packed(self) -> HostBuffer | None:
        """Drop the packed copy, and return its memory."""
        dropped, self.packed = self.packed, None
        return dropped.memory if dropped is not None else None

    def begin_master_anew(self) -> None:
        """The master copy holds patches that are not wanted any more: have it filled again, in the same memory."""
        assert self._master is not None
        self._begun, self._master = (self._master.memory, 0), None

    def drop_master(self) -> HostBuffer | None:
        """Drop the master copy, or what was built of one, and return its memory. No builder may be at work."""
        self.adopt()
        dropped, self._master = self._master, None
        begun, self._begun = self._begun, None
        self.bind()
        if dropped is not None:
            return dropped.memory
        return begun[0] if begun is not None else None

    # -- resident copies -----------------------------------------------------------------------------------------

    def await_resident(self, buffer: torch.Tensor, transfer: Transfer) -> None:
        """``buffer`` on the device will hold the weights as they were loaded, once ``transfer`` is over."""
        self.arriving = _Arriving(buffer, transfer)

    def arrive(self, backend: Backend, reader: Reader, tick: Tick) -> None:
        """Make the awaited buffer the resident copy; the host waits until the copies into it are queued."""
        if self.arriving is None:
            return
        event = reader.wait(self.arriving.transfer, tick)
        backend.wait(event)  # Race: kernels must not read the buffer before the copies into it are done.
        self.resident, self.arriving = Weights(self.unit, self.arriving.buffer), None
        self.bind()

    def stop_awaiting(self, backend: Backend) -> None:
        """No copy is under way any more: keep what has arrived, and free what has not."""
        arriving, self.arriving = self.arriving, None
        if arriving is None:
            return
        if arriving.transfer.queued.exception() is None:
            self.resident = Weights(self.unit, arriving.buffer)
            self.bind()
        else:
            backend.free(arriving.buffer)

    def copy_resident(self, buffer: torch.Tensor) -> None:
        """Make the resident copy from the master copy, patches included, in ``buffer``."""
        assert self.master is not None
        resident = Weights(self.unit, buffer)
        resident.write_from(self.master)
        self.resident = resident

    def take_resident_buffer(self) -> torch.Tensor:
        """End the resident copy, and return its memory."""
        assert self.resident is not None
        resident, self.resident, self._sums = self.resident, None, None
        return resident.buffer

    def drop_resident(self, backend: Backend) -> None:
        resident, self.resident, self._sums = self.resident, None, None
        self.bind()  # A module that still pointed at the buffer would keep its memory.
        if resident is not None:
            backend.free(resident.buffer)

    # -- what others do to it ------------------------------------------------------------------------------------

    def sum_up(self, sums: Summing) -> None:
        """Remember sums of what the resident copy holds, unless that is done. The host does not wait for the device."""
        resident = self.resident
        if resident is not None and self._sums is None:
            values = [value for value in self.unit.layout.values if not resident.is_baked(value.name)]
            self._sums = {value.name: sums(resident.buffer, value) for value in values}

    def sums_again(self, sums: Summing) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """For each value that was summed up yield its name, and the sums then and now. The host does not wait."""
        if self._sums is None or self.resident is None:
            return
        for value in self.unit.layout.values:
            if (before := self._sums.get(value.name)) is not None:
                yield value.name, before, sums(self.resident.buffer, value)

    def take_up(self, unit: Unit, changed: bool) -> None:
        """The unit was laid out anew. Its copies hold its weights, also if these were ``changed``."""
        self.unit = unit
        self.original_binding, self.shown = unit.layout.original_binding(), ShownBinding(unit.layout)
        self.bound = self.shown
        for weights in (self.resident, self.master):
            if weights is not None:
                weights.take_up(unit)
        if changed:
            self._sums = None

    def release(self, backend: Backend, arena: Arena) -> None:
        """Free every copy of a unit that is not laid out like this any more; modules are left as they are."""
        resident, self.resident = self.resident, None
        if resident is not None:
            backend.free(resident.buffer)
        before = self.adopt()
        master = self._master.memory if self._master else None
        for memory in (before, master, self._begun[0] if self._begun else None, self.drop_packed()):
            if memory is not None:
                arena.release(memory)
        self._master = self._begun = None

    def written(self) -> list[str]:
        """Names of values that were written to in ways that torch counts, or exchanged, while this copy was in use;
        small buffers are left out."""
        values = [value for value in self.unit.layout.values if not is_small_buffer(value)]
        return [value.name for value in values if self.bound.written(value) or self.bound.replaced(value)]

    def check_may_go(self) -> None:
        """Raise a :class:`StreamingError` if only the resident copy has what was written to it between two loads."""
        weights = self.bound_weights
        if weights is None or weights is not self.resident:
            return
        lost = [name for name in self.written() if not weights.is_baked(name)]
        if lost:
            raise StreamingError(
                f"{lost[0]} was written to while the model ran, and would be lost now that it must make room on the "
                "device. Lower vram_limit_gb or free memory, and queue the prompt once more, or have ComfyUI load this "
                "model itself (mode off)"
            )

    def has_written_values(self) -> bool:
        """Whether other code has written to patched values of the master copy, now or before it was laid out anew."""
        self.note_writes()
        return self.master is not None and bool(self.master.written)

    def note_writes(self) -> None:
        """Remember which patched values were written to: such writes go when the copy goes out of use."""
        weights = self.bound_weights
        for value in self.unit.layout.values if weights is not None else ():
            if weights.is_baked(value.name) and (self.bound.written(value) or self.bound.handed_out(value)):
                weights.written.add(value.name)

    def forget_writes(self) -> None:
        """The copy goes out of use: what was written to patched values goes with their patches."""
        self.note_writes()
        if self.bound_weights is not None:
            self.bound_weights.spoil_written()

    def settle(self) -> None:
        """What was written to the unit's values was undone."""
        for value in self.unit.layout.values:
            self.bound.settle(value)

    # -- modules -------------------------------------------------------------------------------------------------

    @property
    def lasting(self) -> LastingBinding:
        """Points the modules at the resident copy, else at the master copy, else at what they show without one.

        They are never pointed at memory that others may have too: other code may write to what modules hold
        (pages.py, Note: a write reaches nobody else).
        """
        master = self.master
        if master is not None and self.is_read_only and not master.patched:
            master = None
        weights = self.resident or master
        return weights.lasting if weights is not None else self.shown

    @property
    def bound_weights(self) -> Weights | None:
        """The copy that modules point at between blocks; None while they point at none."""
        return None if self.bound is self.shown else self.resident or self.master

    def bind(self) -> None:
        """Point the modules at the copy in use, unless they do already: what was put in its place since stays."""
        lasting = self.lasting
        if lasting is not self.bound:
            self.bound = lasting
            lasting.apply()

    def show(self) -> None:
        """Point the modules at what they show while no copy is bound."""
        self.bound = self.shown
        self.bound.apply()

    def binding_to(self, place: torch.Tensor) -> Binding:
        """Points the module at a place in a slot, to which the weights will be copied from where they are now."""
        return self.unit.layout.binding(place) if self.master is None else self.master.binding_to(place)
