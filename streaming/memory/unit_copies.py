"""The copies of one unit: original, master copy in host memory, resident copy on the device."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch

from ..devices.backend import Backend
from ..errors import StreamingError
from ..model.blocks import Unit, is_small_buffer
from ..model.lasting_binding import LastingBinding, ShownBinding
from ..model.layout import Binding
from ..model.sums import Summing
from .arena import Arena
from .host_memory import HostBuffer
from .master_copy import MasterCopy
from .packed_copy import PackedCopy
from .reader import Reader
from .transfer import Tick, Transfer
from .weights import Patches, Weights


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
        master_copy: makes and keeps the master copy.
    """

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self.original_binding = unit.layout.original_binding()
        self.shown = ShownBinding(unit.layout)
        self.bound: LastingBinding = self.shown
        self.resident: Weights | None = None
        self.arriving: _Arriving | None = None
        self.master_copy = MasterCopy(unit)
        self.packed: PackedCopy | None = None
        self.too_large_with: dict[str, object] | None = None
        self._sums: dict[str, torch.Tensor] | None = None

    @property
    def master(self) -> Weights | None:
        """What is in the master copy."""
        return self.master_copy.weights

    @property
    def pinned(self) -> bool:
        """Whether there is a master copy in page-locked memory."""
        return self.master_copy.pinned

    @property
    def is_read_only(self) -> bool:
        """Whether there is a master copy that other processes may have too: nobody may write to it."""
        return self.master_copy.is_read_only

    @property
    def may_be_shared(self) -> bool:
        """Whether there is a master copy of this process's own, with patches by which others may know it, and nothing
        else. Hooks of the host may be in it, so nothing is noted here (:meth:`note_writes`)."""
        bound = self.bound
        return self.master_copy.may_be_shared and not any(
            bound.written(value) or bound.handed_out(value) or bound.replaced(value) or bound.moved(value)
            for value in self.unit.layout.values
        )

    def patched_by(self, patches: Patches) -> bool:
        return any(patches.signature(value.name) is not None for value in self.unit.layout.values)

    def holds(self, names: Collection[str]) -> bool:
        """Whether one of these tensors is the unit's."""
        return any(name in names for value in self.unit.layout.values for name in value.names)

    # -- copies in host memory -----------------------------------------------------------------------------------

    def drop_master(self) -> HostBuffer | None:
        """Drop the master copy, or what was built of one, and return its memory. No builder may be at work."""
        dropped = self.master_copy.drop()
        self.bind()
        return dropped

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
        if self.resident is not None:
            self.resident.take_up(unit)
        self.master_copy.take_up(unit)
        if changed:
            self._sums = None

    def release(self, backend: Backend, arena: Arena) -> None:
        """Free every copy of a unit that is not laid out like this any more; modules are left as they are."""
        resident, self.resident = self.resident, None
        if resident is not None:
            backend.free(resident.buffer)
        self.master_copy.release(arena)
        if (packed := self.drop_packed()) is not None:
            arena.release(packed)

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
