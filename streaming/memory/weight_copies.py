"""Carries out plans: makes and drops the copies of units, and points modules at those in use."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence, Set

import torch

from ..devices.backend import Backend
from ..model.blocks import BlockSet, Unit
from ..model.sums import Summing
from ..planning.packing import Refusals
from ..planning.plan import Plan
from .baking import bake_masters, bake_residents
from .changes import Changes, find_changes, find_overwritten
from .checks import Checks
from .host_memory import HostBuffer, PinOwner
from .memory_ahead import Wanted
from .packing import pack_units
from .packing_place import unpack_to_master
from .sampling import planned_bytes_of
from .shared_buffer import sharing
from .shared_packed import packed_share
from .supply import Supply
from .transfer import Load, Tick
from .unit_copies import UnitCopies
from .weights import NoPatches, Patches, Weights


class WeightCopies:
    """Every copy of every unit of one model, on one device and in host memory.

    Args:
        blocks: the model cut into blocks and rest.
        backend: the device.
        supply: where weights come from.
        verifier: is asked to check what has arrived on the device.
    """

    def __init__(self, blocks: BlockSet, backend: Backend, supply: Supply, verifier: Checks) -> None:
        self.backend = backend
        self._supply = supply
        self._verifier = verifier
        self._copies = [UnitCopies(unit) for unit in blocks.units]
        self._rest = UnitCopies(blocks.rest)
        self._arriving: dict[int, list[UnitCopies]] = {}
        specs = [spec for copies in (*self._copies, self._rest) for spec in copies.unit.layout.specs]
        self._files = [*{id(spec.source.file): spec.source.file for spec in specs if spec.source is not None}.values()]
        self._summed = False

    def copies(self, unit: int) -> UnitCopies:
        return self._copies[unit]

    def carry_out(self, plan: Plan, patches: Patches) -> None:
        """Make the copies that a step needs and drop the others; what frees memory comes first.

        Only streamed units whose weights are patched get a master copy here. The others stream from where they are,
        until a builder has made one (:meth:`unbuilt`). Residents without patches may still be on their way
        (:meth:`arrive`).
        """
        streamed = [self._copies[unit] for unit in sorted(plan.streamed)]
        resident = [self._copies[unit] for unit in plan.resident]
        self._summed = False
        for copies in streamed:
            copies.check_may_go()
        for unit, copies in enumerate(self._copies):
            if unit not in plan.packed:
                self._free(copies.drop_packed())
        self._renew(streamed, [self._rest, *resident], patches)
        whole = [self._copies[unit] for unit in sorted(plan.streamed - plan.packed)]
        needed = [copies for copies in whole if copies.patched_by(patches) and copies.master_copy.lacks(patches)]
        self._make_masters(needed, patches)
        for copies in streamed:
            copies.drop_resident(self.backend)
        # Freed memory is given back whole. Otherwise it would be cut up for the next copies, and what is left between
        # them would be too small for a step's activations.
        self.backend.trim()
        self._make_residents([self._rest, *resident], [self._copies[unit] for unit in plan.order])
        if not plan.segments:
            self.arrive_all()  # No block is hooked then after the first step, so none would wait for them.
        self.arrive(-1)
        for block in {copies.unit.block for copies in resident if copies.arriving and copies.patched_by(patches)}:
            self.arrive(block)
        for copies in resident:
            self._free(copies.drop_master())

    def unpackable(self, plan: Plan) -> Refusals:
        """Units that ``plan`` packs and that must stream as they are, as other code has written to their copies."""
        return Refusals(written=frozenset(unit for unit in plan.packed if _is_written_to(self._copies[unit])))

    def may_fit(self, too_large: Collection[int], patches: Patches) -> frozenset[int]:
        """Those of these units, which were too large to be packed, of which that is not known with ``patches``."""
        return frozenset(unit for unit in too_large if not self._copies[unit].is_too_large_with(patches))

    def packed_sizes(self, tick: Tick) -> tuple[int, ...]:
        """Return of each unit the most bytes that it takes when it is packed; its own where it is not to be packed.

        ``tick`` is called before each unit, and may raise.
        """
        return tuple(planned_bytes_of(copies, tick) for copies in self._copies)

    def pack(self, plan: Plan, patches: Patches, owner: PinOwner) -> Refusals:
        """Make the packed copies that ``plan`` streams from; nothing is under way, and there is no ring on the device.

        Returns the units that have none.
        """
        missing = [unit for unit in sorted(plan.packed) if not self._copies[unit].is_packed_with(patches)]
        for unit in plan.packed.difference(missing):
            self._free(self._copies[unit].drop_master())
        if not missing:
            return Refusals()
        wanted = {unit: Wanted(self._copies[unit], plan.outline.bytes_in_slot(unit)) for unit in missing}
        shared = packed_share(self._supply.arena, patches, self._verifier.sums_up)
        there = sum(one.most_bytes for one in wanted.values() if shared.is_there(one.copies))
        self._supply.make_room(self._needed_to_pack(missing, plan), owner, there)
        self.arrive_all()  # The reader goes through its transfers in order.
        room = plan.staging_bytes + plan.unpacking_bytes
        return pack_units(self.backend, self._supply, wanted, patches, room, self._verifier, shared)

    def _needed_to_pack(self, units: Collection[int], plan: Plan) -> int:
        """Bytes of host memory to take for packed copies, beside those that their units give back one by one."""
        sizes = [plan.outline.bytes_in_slot(unit) for unit in units if self._copies[unit].packed is None]
        given_back = sum(self._copies[unit].master_copy.nbytes for unit in units)
        return max(0, sum(sizes) + self._supply.reader.missing_bytes - given_back)

    def adopt(self) -> None:
        """Take the master copies that a builder has finished, in the place of those before them."""
        for copies in self._copies:
            self._free(copies.master_copy.adopt())

    def unbuilt(self, plan: Plan) -> list[UnitCopies]:
        """The units that stream without a master copy, in the order in which they are needed."""
        units = (unit for segment in plan.segments for unit in segment.units)
        return [self._copies[unit] for unit in units if unit not in plan.packed and self._copies[unit].master is None]

    def to_share(self, plan: Plan) -> list[UnitCopies]:
        """The units whose master copies have patches in them and could be shared, and are this process's own so far."""
        if not sharing(self._supply.arena).is_on:
            return []
        mine = (self._copies[unit] for unit in sorted(plan.streamed - plan.packed))
        return [copies for copies in mine if copies.may_be_shared]

    def pinned_bytes(self, plan: Plan) -> int:
        """Bytes that ``plan`` streams from page-locked memory, packed or not."""
        found = 0
        for unit in plan.streamed:
            copies = self._copies[unit]
            packed = copies.packed  # Another thread may drop it.
            pinned = packed is not None and packed.memory.pinned if unit in plan.packed else copies.pinned
            found += plan.outline.bytes_in_slot(unit) if pinned else 0
        return found

    def check_sources(self) -> int:
        """Raise if a file is not the one that was loaded any more; returns how often files were touched."""
        for file in self._files:
            file.check_unchanged()
        return sum(file.touches for file in self._files)

    def unread_bytes(self, plan: Plan) -> int:
        """Bytes that ``plan`` needs on the device and that are in no copy yet."""
        packed = {id(self._copies[unit]) for unit in plan.packed if self._copies[unit].packed is not None}
        needed = [copies for copies in (self._rest, *self._copies) if id(copies) not in packed]
        return sum(copies.unit.nbytes for copies in needed if copies.resident is None and copies.master is None)

    def is_stale(self, plan: Plan, patches: Patches) -> bool:
        """Whether some weight has other patches in it than ``patches``."""
        if not all(self._copies[unit].is_packed_with(patches) for unit in plan.packed):
            return True
        if any(copies.is_read_only and copies.has_written_values() for copies in self._copies):
            return True  # That is not in what streams.
        unpatched = [self._copies[unit] for unit in plan.streamed - plan.packed if self._copies[unit].master is None]
        unpatched += [copies for waiting in self._arriving.values() for copies in waiting]
        return any(copies.patched_by(patches) for copies in unpatched) or any(
            weights.stale(patches) for weights in self._weights(plan)
        )

    def bake(self, plan: Plan, patches: Patches) -> None:
        """Write the weights whose patches have changed, and no others. There must be no ring on the device."""
        stale = [weights for weights in self._weights(plan) if weights.stale(patches)]
        if not stale:
            return
        masters = {id(copies.master) for copies in self._copies}
        bake_residents([one for one in stale if id(one) not in masters], patches, self._supply.tick)
        held = [one for one in stale if id(one) in masters]
        if held:
            self.arrive_all()  # The reader queues copies too.
        bake_masters(self.backend, held, patches, plan.staging_bytes, self._supply.tick)

    def bind(self) -> None:
        """Point the modules at the copies that are in use."""
        for copies in (*self._copies, self._rest):
            copies.bind()

    def bind_again(self) -> None:
        """As :meth:`bind`, but also where the copy in use is the same as before: modules were pointed elsewhere."""
        for copies in (*self._copies, self._rest):
            copies.bound.apply()

    def bind_originals(self) -> None:
        """Point the modules at the weights as loaded, in the dtypes of the file."""
        for copies in (*self._copies, self._rest):
            copies.original_binding.apply()

    def show(self) -> None:
        """Point the modules at what they show while no copy is bound (shown.py)."""
        for copies in (*self._copies, self._rest):
            copies.show()

    # -- what others do to it ------------------------------------------------------------------------------------

    def changes(self, exchanged: Set[str] = frozenset()) -> Changes:
        """Find what was written to, exchanged or deleted; no block may run, and no copy be under way."""
        everything = (*self._copies, self._rest)
        overwritten = find_overwritten(everything)
        return Changes(change for copies in everything for change in find_changes(copies, exchanged, overwritten))

    def written(self) -> list[str]:
        """Names of weights that were written to or exchanged, except small buffers (blocks.py)."""
        return [name for copies in (*self._copies, self._rest) for name in copies.written()]

    def settle(self) -> None:
        """What other code had written to weights was undone."""
        for copies in (*self._copies, self._rest):
            copies.settle()

    def take_up(self, blocks: BlockSet, verifier: Checks, changes: Changes) -> None:
        """The model was cut anew, after ``changes``: keep the copies of units that have the same layout and weights."""
        known = {_identity(copies.unit): copies for copies in (*self._copies, self._rest)}
        self._copies = [self._taken_up(unit, known, changes) for unit in blocks.units]
        self._rest = self._taken_up(blocks.rest, known, changes)
        self._verifier = verifier
        for copies in known.values():
            copies.release(self.backend, self._supply.arena)
        self.show()

    def _taken_up(self, unit: Unit, known: dict[object, UnitCopies], changes: Changes) -> UnitCopies:
        copies = known.get(_identity(unit))
        if copies is None:
            return UnitCopies(unit)
        changed = changes.of(copies.unit.layout.values)
        if not all(change.in_copy for change in changed):
            return UnitCopies(unit)
        del known[_identity(unit)]
        if changed and copies.resident is not None:
            self._free(copies.drop_master())
        copies.take_up(unit, bool(changed))
        return copies

    @property
    def resident_bytes(self) -> int:
        """Bytes of units that have a resident copy now."""
        return sum(copies.unit.nbytes for copies in self._copies if copies.resident or copies.arriving)

    def drop_residents(self, units: Iterable[int]) -> None:
        """Drop resident copies, except those that were written to, and make nothing in their place."""
        for unit in units:
            if not any(find_changes(self._copies[unit])):
                self._copies[unit].drop_resident(self.backend)

    def drop_masters(self, nbytes: int) -> int:
        """Drop master copies until ``nbytes`` of host memory are free, or all; returns the bytes that were freed."""
        freed = 0
        for copies in reversed(self._copies):
            if freed >= nbytes:
                break
            freed += self._free(copies.drop_packed())
            if copies.master_copy.nbytes and not any(find_changes(copies)):  # Those that were written to stay.
                freed += self._free(copies.drop_master())
        return freed

    def clear_device(self) -> None:
        """Drop everything on the device. Modules use the originals then: master copies may have patches in them."""
        for copies in (*self._copies, self._rest):
            copies.forget_writes()
            copies.drop_resident(self.backend)
        self.show()

    def clear_host(self) -> None:
        """Drop the master copies, and the packed ones."""
        for copies in self._copies:
            self._free(copies.drop_master())
            self._free(copies.drop_packed())

    def _free(self, memory: HostBuffer | None) -> int:
        if memory is None:
            return 0
        self._supply.arena.release(memory)
        return memory.nbytes

    def _weights(self, plan: Plan) -> Iterable[Weights]:
        """The copies that a step uses; a unit that streams from its original has none, and no patch."""
        for unit, copies in enumerate(self._copies):
            weights = copies.master if unit in plan.streamed else copies.resident
            if weights is not None:
                yield weights
        if self._rest.resident is not None:
            yield self._rest.resident

    def bare(self, names: Collection[str]) -> set[str]:
        """Those of these tensors of which only the original exists."""
        everything = (*self._copies, self._rest)
        units = [each.unit for each in everything if each.resident is None and (not each.master or each.is_read_only)]
        values = (value for unit in units for value in unit.layout.values)
        return {name for value in values for name in value.names if name in names}

    def holding(self, names: Collection[str]) -> frozenset[int]:
        """The units of blocks that hold one of these tensors."""
        return frozenset(unit for unit, copies in enumerate(self._copies) if copies.holds(names))

    def make_masters(self, names: Collection[str]) -> None:
        """Make master copies of units that hold one of these tensors and of which there is no copy yet."""
        for copies in self._copies:
            if copies.is_read_only and copies.holds(names):
                copies.master_copy.make_own(self._supply.arena)
        bare = [copies for copies in self._copies if copies.resident is None and copies.master is None]
        bare = [copies for copies in bare if copies.holds(names)]
        for copies in bare:
            if copies.packed is not None:  # With the patches that are in it.
                unpack_to_master(self.backend, self._supply.arena, copies, self._verifier)
                self._free(copies.drop_packed())
        self._make_masters([copies for copies in bare if copies.master is None], NoPatches())

    def _make_masters(self, copies: list[UnitCopies], patches: Patches) -> None:
        """Make master copies: of patched residents as they are (where ``patches`` allow), of others as loaded."""
        if not copies:
            return
        residents = [item for item in copies if item.resident is not None and item.resident.patched]
        moved = [item for item in residents if not item.resident.spoiled(patches)]
        for item in moved:
            self._supply.tick()
            item.master_copy.move_from(item.resident, self._supply.arena)
        missing = [item for item in copies if item not in moved]
        for item in missing if sharing(self._supply.arena).is_on else ():
            names = {value.name: patches.signature(value.name) for value in item.unit.layout.values}
            item.master_copy.wanted = {name: signature for name, signature in names.items() if signature is not None}
        try:
            self._supply.build_needed(missing)
        finally:
            self.adopt()
            for item in missing:
                item.master_copy.wanted = {}

    def _renew(self, streamed: Iterable[UnitCopies], resident: Iterable[UnitCopies], patches: Patches) -> None:
        """Fill copies whose patches are not wanted any more again, in their own memory, as they were loaded.

        Residents are asked for at once: they need no memory that others must give up first.
        """
        shares = sharing(self._supply.arena).is_on
        for copies in streamed:
            if copies.is_read_only and copies.has_written_values():
                copies.master_copy.make_own(self._supply.arena)  # What others have written is in no shared memory.
            if copies.master is not None and copies.master.spoiled(patches):
                if copies.is_read_only or (shares and not copies.patched_by(patches)):
                    self._free(copies.drop_master())  # Others may have what is wanted now.
                else:
                    copies.master_copy.begin_anew()
        for copies in resident:
            if copies.master is not None and copies.master.spoiled(patches):
                self._free(copies.drop_master())
            if copies.resident is not None and copies.resident.spoiled(patches):
                self._supply.reader.open()  # First, as it may fail: the resident must not be lost then.
                self._read_resident(copies, copies.take_resident_buffer())

    def _make_residents(self, wanted: Sequence[UnitCopies], order: Sequence[UnitCopies]) -> None:
        """Make resident copies: from master copies now, from originals while a step runs (:meth:`arrive`).

        Residents that will be given up together lie together, by ``order``: then all of their pages can be given back
        (pages.py, Note: shared pages).
        """
        missing = [copies for copies in wanted if copies.resident is None and copies.arriving is None]
        places = {id(copies): place for place, copies in enumerate(order)}
        buffers: dict[int, torch.Tensor] = {}
        try:
            for copies in sorted(missing, key=lambda copies: places.get(id(copies), -1)):
                buffers[id(copies)] = self.backend.allocate(copies.unit.nbytes, lasting=True)
            for copies in missing:
                if copies.master is not None:
                    copies.copy_resident(buffers[id(copies)])
                    del buffers[id(copies)]
                    self._check(copies)
                else:
                    self._supply.reader.open()
                    self._read_resident(copies, buffers[id(copies)])
                    del buffers[id(copies)]
        except BaseException:
            for buffer in buffers.values():
                self.backend.free(buffer)
            raise

    def _read_resident(self, copies: UnitCopies, buffer: torch.Tensor) -> None:
        """Have the reader fill ``buffer``, which becomes the resident copy."""
        # Race: kernels of this memory's previous user may still be under way.
        free = self.backend.mark()
        load = Load(copies.unit.layout, buffer)
        copies.await_resident(buffer, self._supply.reader.transfer([load], [free], background=True))
        self._arriving.setdefault(copies.unit.block, []).append(copies)

    def _check(self, copies: UnitCopies) -> None:
        try:
            with self.backend.record.paused():  # It may have arrived in the middle of a step.
                self._verifier.check_resident(copies)
        except BaseException:
            copies.drop_resident(self.backend)  # It must not be used.
            raise

    # -- residents on their way ----------------------------------------------------------------------------------

    @property
    def arriving(self) -> Collection[int]:
        """Numbers of blocks of which residents are on their way; -1 for what is outside of blocks."""
        return self._arriving.keys()

    def arrive(self, block: int) -> None:
        """A block begins: its residents must be there. The host waits until the copies of all of them are queued."""
        waiting = self._arriving.get(block, ())
        while waiting:
            waiting[0].arrive(self.backend, self._supply.reader, self._supply.tick)
            self._check(waiting.pop(0))
        self._arriving.pop(block, None)

    def arrive_all(self) -> None:
        for block in list(self._arriving):
            self.arrive(block)

    def complete(self) -> None:
        """A whole step has run: everything that it needs has been read."""
        self.arrive_all()
        self._supply.arrived()
        if not self._summed:
            self._summed = True
            sums = Summing()
            with self.backend.record.paused():
                for copies in (*self._copies, self._rest):
                    copies.sum_up(sums)

    def stop_awaiting(self) -> None:
        """Every transfer is over or given up, and the device is idle: keep what has arrived."""
        for waiting in self._arriving.values():
            for copies in waiting:
                copies.stop_awaiting(self.backend)
                if not self._verifier.trusting:
                    copies.drop_resident(self.backend)
        self._arriving.clear()

    def lacks(self, plan: Plan) -> bool:
        """Whether a resident of ``plan`` is missing, because it could not be read."""
        residents = [self._rest, *(self._copies[unit] for unit in plan.resident)]
        return any(copies.resident is None and not _is_on_its_way(copies) for copies in residents)


def _is_written_to(copies: UnitCopies) -> bool:
    """Whether other code has written to the copy in use. What was written to patched values goes with the patches, and
    so must not come into a packed copy that is known by them."""
    if copies.bound_weights is None:
        return False
    copies.note_writes()
    return bool(copies.bound_weights.written) or any(find_changes(copies))


def _identity(unit: Unit) -> object:
    """Equal for two units that consist of the same places of the same modules, and have the same layout."""
    return tuple(
        (value.names, tuple((id(place.holder), place.attribute) for place in value.places), value.is_plain, *lies)
        for value in unit.layout.values
        for lies in [tuple((spec.shape, spec.stride, spec.dtype, spec.offset) for spec in value.specs)]
    )


def _is_on_its_way(copies: UnitCopies) -> bool:
    if copies.arriving is None:
        return False
    queued = copies.arriving.transfer.queued
    return not queued.done() or queued.exception() is None
