"""A model on one device: what lies there, what streams there, and the host memory that both come from."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Sequence

from ..config import StreamingConfig
from ..devices.backend import Backend
from ..memory.changes import Changes
from ..memory.host_memory import PinBudget, PinOwner
from ..memory.supply import Supply, Watch
from ..memory.weight_copies import WeightCopies
from ..memory.weights import Patches
from ..model.blocks import BlockSet
from ..planning.packing import Refusals
from ..planning.plan import Plan
from ..sharing.share import NoShare
from .lane import Lane
from .telemetry import Counters, Meters, StepListener
from .verify import Verifier


class Site:
    """Brings, streams and drops the weights of a model on one device, when the streamer asks for it.

    Args:
        blocks: the model cut into blocks, units and rest.
        backend: the device.
        config: settings.
        pins: page-locked memory that this model shares with others; None makes a budget of its own without limit.
        watch: is called with the progress of loading, and may raise to cancel it.
        counters: where to count.
        verifier: is asked to check copies that have arrived.
        listeners: are told of waits for copies.
        share: where copies come from that others have too; None takes that of ``pins``.

    Attributes:
        supply: where weights come from.
        weight_copies: every copy of every unit.
        meters: count and time what happens.
        lane: what streams; None where nothing does, or not yet.
        unbuilt: whether master copies of streamed units are still to be built, or tried again.
    """

    def __init__(
        self,
        blocks: BlockSet,
        backend: Backend,
        config: StreamingConfig,
        pins: PinBudget | None,
        watch: Watch,
        counters: Counters,
        verifier: Verifier,
        listeners: Sequence[StepListener],
        share: NoShare | None = None,
    ) -> None:
        largest = max(unit.nbytes for unit in (*blocks.units, blocks.rest))
        self.backend = backend
        self.supply = Supply(backend, config, largest, pins, watch, share)
        self.weight_copies = WeightCopies(blocks, backend, self.supply, verifier)
        self.meters = Meters(backend, counters, listeners)
        self.lane: Lane | None = None
        self.unbuilt = False
        self._verifier = verifier
        # Threads and streams end before the memory goes, also when a model is dropped without unloading.
        self._finalizer = weakref.finalize(self, _close, self.supply, backend)
        self._finalizer.atexit = False

    # -- loading -------------------------------------------------------------------------------------------------

    def carry_out(self, plan: Plan, patches: Patches, copy_streams: int, owner: PinOwner, builds: bool) -> Refusals:
        """Have the weights where ``plan`` has them, with ``patches``; nothing is under way, and there is no lane.

        Returns the units that cannot be packed. Where there are some, residents are where ``plan`` has them, nothing
        streams, and another plan is needed.

        Args:
            owner: of page-locked memory, in its budget.
            builds: whether master copies are built now. Packed ones are in any case: without them nothing streams.
        """
        self.supply.arena.begin()
        self.backend.open(copy_streams)
        self.weight_copies.carry_out(plan, patches)
        self.unbuilt = True
        if refused := self.weight_copies.pack(plan, patches, owner):
            return refused
        if builds:
            self.build(plan, owner)
        self.weight_copies.bake(plan, patches)
        self.unbuilt = self.unbuilt or bool(self.weight_copies.to_share(plan))
        self.weight_copies.bind()
        if plan.segments:
            reader, tick = self.supply.reader, self.supply.tick
            copies = self.weight_copies.copies
            self.lane = self._verifier.make_lane(self.backend, plan, copies, reader, copy_streams, self.meters, tick)
        return Refusals()

    def prefetch(self) -> None:
        """Begin to copy what the next step needs first."""
        if self.lane is not None:
            self.lane.prefetch()

    def put_away(self, plan: Plan) -> None:
        """Give the reader's ring back once everything streams from page-locked memory."""
        if self.supply.reader.ring_bytes and not self.weight_copies.arriving:
            self.weight_copies.adopt()
            if self.weight_copies.pinned_bytes(plan) == plan.streamed_bytes:
                self.supply.reader.flush()
                self.supply.reader.close()

    def bind(self) -> None:
        """Point the modules at the copies that are in use, which may be others now."""
        self.weight_copies.bind()
        if self.lane is not None:
            self.lane.refresh()

    # -- master copies -------------------------------------------------------------------------------------------

    @property
    def building(self) -> bool:
        """Whether master copies are being built, or will be before the next step."""
        return self.unbuilt or self.supply.builder.active

    def prepare(self, plan: Plan, owner: PinOwner) -> None:
        """``plan`` may be carried out soon: begin to build what streams then."""
        self.supply.builder.stop()  # Called again: two builds of one unit must not run at once.
        self.weight_copies.adopt()
        self.supply.build_behind(self.weight_copies.unbuilt(plan), owner)

    def build(self, plan: Plan, owner: PinOwner, patched: bool = False) -> None:
        """Build what ``plan`` streams and has no master copy, and if all is ``patched`` share what has one. Nothing is
        under way."""
        wanted = self.weight_copies.unbuilt(plan) + (self.weight_copies.to_share(plan) if patched else [])
        try:
            self.supply.build(wanted, owner)
            self.unbuilt = self.supply.builder.left > 0
        finally:
            self.weight_copies.adopt()

    def finish_building(self, plan: Plan | None, owner: PinOwner) -> None:
        """Build all master copies that are wanted and missing."""
        self.supply.builder.wait(self.supply.tick)
        if self.unbuilt and not self.supply.waits_for_others:
            assert plan is not None
            self.drain()
            self.build(plan, owner, patched=True)
            self.bind()

    def retry_building(self, plan: Plan) -> None:
        """What could not be page-locked before may be possible now."""
        if self.weight_copies.unbuilt(plan) or self.weight_copies.to_share(plan):
            self.supply.arena.begin()
            self.unbuilt = True

    def make_masters(self, names: Collection[str]) -> None:
        """Have modules point at copies of these tensors that other code may write to."""
        self.weight_copies.arrive_all()
        self.halt()
        try:
            self.weight_copies.make_masters(names)
        finally:
            self.bind()
            self.unbuilt = True

    # -- giving memory back --------------------------------------------------------------------------------------

    def give_way(self, nbytes: int, residents: Iterable[int]) -> int:
        """Give up these residents, in this order, until ``nbytes`` are free; returns the bytes that were freed."""
        before = self.backend.allocated
        if self.weight_copies.arriving:
            self.halt()  # What is still on its way is not needed.
        else:
            self.drain()
        for unit in residents:
            if before - self.backend.allocated >= nbytes:
                break
            self.weight_copies.drop_residents([unit])
        self.backend.give_back()
        return before - self.backend.allocated

    def give_up_masters(self, nbytes: int) -> int:
        """Free ``nbytes`` of page-locked memory or all, the reader's ring included; gives what was freed."""
        self.halt()
        before = self.supply.reader.ring_bytes
        self.supply.reader.close()
        return before + self.weight_copies.drop_masters(nbytes)

    def drop_lane(self) -> None:
        """Give the staging memory back. No copy may be under way."""
        if self.lane is not None:
            self.lane.close()
        self.lane = None
        self.meters.stalls.clear()

    def clear_device(self) -> None:
        """Take everything off the device; modules use the originals again. Master copies stay. Nothing is under way."""
        self.drop_lane()
        self.weight_copies.clear_device()
        self.backend.give_back()
        self.supply.reader.close()
        self.backend.close_feeders()
        self.unbuilt = False

    def take_up(self, blocks: BlockSet, verifier: Verifier, changes: Changes) -> None:
        """The model was cut anew, after ``changes``; modules show what is there. Nothing is under way."""
        self._verifier = verifier
        self.weight_copies.take_up(blocks, verifier, changes)

    def close(self) -> None:
        """Free the master copies too, and end threads and copy streams. The site can be used again."""
        self.supply.close()
        self.weight_copies.clear_host()
        self.backend.close()

    def leave(self) -> None:
        """As :meth:`close`, for good: the backend goes on with another site."""
        self.close()
        self._finalizer.detach()

    # -- waiting -------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Release what an exception or an interrupt left bound. Harmless when there is nothing."""
        if self.lane is not None:
            self.lane.settle()

    def drain(self) -> None:
        """Let every copy and every kernel that uses our memory finish (lane.py, Note: two events guard a slot, 4)."""
        self.settle()
        self.finish_copies()

    def finish_copies(self) -> None:
        """As :meth:`drain`, also in the middle of a step."""
        self.supply.reader.flush()
        self.backend.synchronize()

    def halt(self) -> None:
        """As :meth:`drain`, but what is not queued yet is given up, and nothing is being built any more."""
        self.settle()
        self.supply.halt()
        self.backend.synchronize()
        self.weight_copies.adopt()
        self.weight_copies.stop_awaiting()

    def copy_synchronously(self) -> None:
        """Copy nothing ahead from now on, also in the middle of a step. Nothing is on its way."""
        self.backend.open(0)
        if self.lane is not None:
            self.lane.copy_nothing_ahead()

    def forget_copies(self) -> None:
        """Other code has changed weights in place: copy them anew."""
        if self.lane is not None:
            self.drain()
            self.lane.forget()


def _close(supply: Supply, backend: Backend) -> None:
    supply.forsake()
    backend.close()
