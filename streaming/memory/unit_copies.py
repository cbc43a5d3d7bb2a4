"""The copies of one unit: original, master copy in host memory, resident copy on the device."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import torch

from ..devices.backend import Backend
from ..errors import StreamingError
from ..model.blocks import Unit, is_small_buffer
from ..model.contents import needs_work, ranges, read_range
from ..model.lasting_binding import LastingBinding, ShownBinding
from ..model.layout import Binding
from ..model.packed_units import PackedLayout
from ..model.sums import Summing
from .arena import Arena, HostBuffer
from .reader import Reader
from .transfer import Tick, Transfer
from .weights import Patches, Weights

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
        memory, _ = self._begun or (arena.allocate(self.unit.nbytes), 0)
        self._begun = None
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
        memory, filled = self._begun or (arena.claim(self.unit.nbytes), 0)
        self._begun = None
        if memory is None:
            of_use = needs_work(self.unit.layout) and arena.budget.has_room(self.unit.nbytes)
            if not (of_use or needed):
                return False
            memory = arena.allocate(self.unit.nbytes)
        try:
            for start, end in ranges(self.unit.layout, BUILD_BYTES):
                if start < filled:
                    continue
                if stopped():
                    break
                read_range(self.unit.layout, start, end, memory.memory[start:end], forget)
                filled = end
        except BaseException:
            arena.release(memory)
            raise
        self._begun = memory, filled
        return True

    def lock_master(self, arena: Arena, needed: bool = False) -> bool:
        """On a builder's thread: if the memory was filled as a whole, page-lock it and leave it to be adopted.

        Returns whether others shall be built: false when no more memory may be page-locked.
        """
        memory, filled = self._begun
        if filled < self.unit.nbytes:
            return True
        self._begun = None
        try:
            locked = memory.pinned or arena.lock(memory)
            if locked or needed or needs_work(self.unit.layout):
                self.built = _Master(Weights(self.unit, memory.memory, computes=False), memory)
            else:
                arena.release(memory)
        except BaseException:
            arena.release(memory)
            raise
        return locked

    def give_up_begun(self, arena: Arena) -> None:
        """On a builder's thread: free memory that was filled and shall not be page-locked after all."""
        begun, self._begun = self._begun, None
        if begun is not None:
            arena.release(begun[0])

    def adopt(self) -> None:
        """Take the master copy that a builder has finished, if there is one."""
        built, self.built = self.built, None
        self._master = built or self._master

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
        self.adopt()
        master = self._master.memory if self._master else None
        for memory in (master, self._begun[0] if self._begun else None, self.drop_packed()):
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
        """Points the modules at the resident copy, else at the master copy, else at what they show without one."""
        weights = self.resident or self.master
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
