"""The hot path of one device: a segment is copied ahead, waited for, bound while its units run, and released.

[Note: two events guard a slot]
A slot's memory is written by copies and read by the compute stream. Four things keep them apart:
 1. write after read: a copy into a slot waits for ``free``, recorded on the compute stream when the slot's last
    segment has queued its kernels (``_release``);
 2. read after write: a segment's kernels are queued behind a wait for ``ready``, recorded after the copy (``_begin``);
 3. write after write: the backend carries copies out in the order in which they are queued;
 4. the host never rewrites a master copy while a copy from it may be under way: who does drains the copy streams
    first (``streamer.py``).
Segments with page-locked master copies are copied straight from them. The others, and then those behind them, go
through a reader, which reads and queues copies on threads of its own, in the same order (reader.py, Note: one order
for all copies).
What a block writes to its weights while they are in a slot, or puts in their place, would be lost with the next copy.
It shows in torch's count of writes to the slot, and in what modules hold; the step ends in an error then (runner.py).
A segment is released when its units have run as often as they did before, and at the latest when its block or the
step ends. A unit that runs once more begins its segment anew, with a wait and a binding of its own; so nothing here
relies on how often units ran before. The host itself waits for nothing but for readers. Tensors never tell torch's
allocator about the second stream (``record_stream``): staging memory is freed only after ``synchronize``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.autograd import profiler

from .backend import Backend, Pair
from .layout import Binding
from .masters import UnitCopies
from .plan import Plan
from .reader import Reader
from .ring import Ring, Slot
from .schedule import Entry, Schedule
from .telemetry import Meters
from .transfer import Load, Move, Tick, Transfer

# A unit's memory in a slot, and the unit.
Place = tuple[torch.Tensor, UnitCopies]


class _Run:
    """A segment that is bound to a slot.

    Attributes:
        active: its units that are running now.
        left: runs of its units after which it is released; never reached by one that its block holds.
        writes: how often the slot had been written to when it was bound; None before that.
    """

    __slots__ = ("active", "left", "slot", "writes")

    def __init__(self, slot: int, left: int) -> None:
        self.slot = slot
        self.active = 0
        self.left = left
        self.writes: int | None = None


class Lane:
    """Streams the segments of a plan through a ring.

    Args:
        backend: the device.
        plan: a plan with segments.
        copies: gives the copies of a streamed unit.
        reader: brings what has no page-locked master copy.
        copy_streams: 0 copies each segment when it is needed, on the compute stream.
        meters: where to count.
        tick: is called while the host waits for a reader, and may raise.
    """

    def __init__(
        self,
        backend: Backend,
        plan: Plan,
        copies: Callable[[int], UnitCopies],
        reader: Reader,
        copy_streams: int,
        meters: Meters,
        tick: Tick,
    ) -> None:
        self._backend = backend
        self._segments = plan.segments
        self._reader = reader
        self._counters = meters.counters
        self._stalls = meters.stalls
        self._overwritten = meters.overwritten
        self._tick = tick
        self.segment_of = {unit: number for number, segment in enumerate(plan.segments) for unit in segment.units}
        self._of_block: dict[int, list[int]] = {}
        for number, segment in enumerate(plan.segments):
            self._of_block.setdefault(segment.block, []).append(number)
        self._running: set[int] = set()
        self._open: dict[int, _Run] = {}
        self._ring = Ring(backend, plan.slots, plan.slot_bytes)
        self._schedule = Schedule(range(len(plan.segments)), plan.slots, plan.slots if copy_streams else 0)
        self._copies = [[copies(unit) for unit in segment.units] for segment in plan.segments]
        self._home = [[unit.home for unit in group] for group in self._copies]
        self._pairs: list[list[list[Pair]] | None] = [None] * len(plan.segments)
        self._bindings: list[list[list[Binding]]] = []
        try:
            self._prepare()
        except BaseException:
            self._ring.release()
            raise

    def _prepare(self) -> None:
        """Make once what steps use, so that a step makes no view and no parameter.

        For each segment and slot: the bindings to it, and, where all units have page-locked master copies, the copies.
        """
        with torch.inference_mode(False):
            for number, group in enumerate(self._copies):
                places = [places_in(slot.buffer, group) for slot in self._ring.slots]
                self._bindings.append([[unit.binding_to(place) for place, unit in each] for each in places])
                self._prepare_pairs(number)

    def _prepare_pairs(self, number: int) -> None:
        group = self._copies[number]
        if all(unit.pinned for unit in group):
            places = [places_in(slot.buffer, group) for slot in self._ring.slots]
            self._pairs[number] = [[(place, unit.master.buffer) for place, unit in each] for each in places]

    @property
    def streamed_blocks(self) -> tuple[int, ...]:
        return tuple(self._of_block)

    # -- steps and blocks ----------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        self.settle()
        self._schedule.begin_step()

    def end_step(self, completed: bool) -> None:
        self._release_all(list(self._open))
        self._schedule.end_step(completed)
        if completed:
            self.prefetch()

    def enter_block(self, block: int) -> None:
        """A block begins: bind what it needs all the time."""
        self._running.add(block)
        for number in self._of_block.get(block, ()):
            if self._segments[number].runs == 0 and number not in self._open:
                self._begin(number)

    def leave_block(self, block: int) -> None:
        """A block ends: release what is left of it."""
        self._running.discard(block)
        if self._open:
            self._release_all([number for number in self._of_block.get(block, ()) if number in self._open])

    # -- units ---------------------------------------------------------------------------------------------------

    def enter(self, number: int) -> None:
        """A unit of segment ``number`` begins: its weights are on the device, or on their way, and bound."""
        run = self._open.get(number)
        if run is None:
            run = self._begin(number)
        run.active += 1

    def leave(self, number: int) -> None:
        """A unit of segment ``number`` ends."""
        run = self._open.get(number)
        if run is None:
            return  # Released already: an exception inside was handled by somebody.
        run.active -= 1
        run.left -= 1
        if run.left == 0 and run.active == 0:
            self._release(number)
            self.prefetch()

    def settle(self) -> None:
        """Release what an exception or an interrupt left bound. Harmless when there is nothing."""
        self._running.clear()
        if self._open:
            for number in list(self._open):
                self._release(number)
            self._schedule.end_step(completed=False)

    def forget(self) -> None:
        """Master copies were changed: copy them anew. No copy may be under way."""
        self._schedule.forget()
        self.prefetch()

    def refresh(self) -> None:
        """Master copies were made, and prefetched segments given up; no copy may be under way."""
        for number, group in enumerate(self._copies):
            self._home[number] = [unit.home for unit in group]
            with torch.inference_mode(False):
                self._prepare_pairs(number)
        self.forget()

    def prefetch(self) -> None:
        """Queue copies of what is needed next, as far as slots are free."""
        while (copy := self._schedule.next_copy()) is not None:
            try:
                self._fill(copy.segment, copy.slot, copy.opening)
            except BaseException:
                self._schedule.drop(copy.slot)
                raise

    def copy_nothing_ahead(self) -> None:
        """From now on a segment is copied when it is needed."""
        self._schedule.lookahead = 0

    def close(self) -> None:
        """Give the staging memory back. No copy may be under way, and no segment bound."""
        self._ring.release()

    # -- one segment ---------------------------------------------------------------------------------------------

    def _begin(self, number: int) -> _Run:
        self._make_way()
        entry = self._schedule.enter(number)
        run = self._open[number] = _Run(entry.slot, self._segments[number].runs)
        try:
            if entry.hit:
                self._counters.hits += 1
            else:
                self._counters.misses += 1
                self._fill(number, entry.slot, opening=True)
            with _phase("stream::wait"):
                self._wait(number, entry)
            for binding in self._bindings[number][entry.slot]:
                binding.apply()
            run.writes = self._ring.slots[entry.slot].buffer._version
        except BaseException:
            self._release(number)
            self._schedule.drop(entry.slot)
            raise
        return run

    def _wait(self, number: int, entry: Entry) -> None:
        """Make compute wait for the slot; the host waits too where a reader has not queued the copies yet."""
        slot = self._ring.slots[entry.slot]
        if not isinstance(slot.ready, Transfer):
            self._stalls.add(self._backend.wait(slot.ready))
            return
        backend = self._backend  # A wait that is kept does not keep the lane.
        before = backend.moment()
        try:
            slot.ready = self._reader.wait(slot.ready, self._tick)
        except Exception:
            if not entry.hit:
                raise
            # What went wrong ahead of time may go well now, and else fails now.
            self._counters.misses += 1
            self._fill(number, entry.slot, opening=True)
            slot.ready = self._reader.wait(slot.ready, self._tick) if isinstance(slot.ready, Transfer) else slot.ready
        backend.wait(slot.ready)
        after = backend.moment()
        self._stalls.add(lambda: backend.seconds(before, after))

    def _make_way(self) -> None:
        """When every slot is taken, release segments that nobody uses now: a unit of theirs was left out this time."""
        if len(self._open) < len(self._ring.slots):
            return
        for number, run in list(self._open.items()):
            segment = self._segments[number]
            if run.active == 0 and (segment.runs > 0 or segment.block not in self._running):
                self._release(number)

    def _release_all(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._release(number)
        if numbers:
            self.prefetch()

    def _release(self, number: int) -> None:
        run = self._open.pop(number)
        with _phase("stream::release"):
            self._schedule.leave(run.slot)
            slot = self._ring.slots[run.slot]
            slot.free = self._backend.mark()
            if run.writes is not None:
                self._look_for_writes(number, run, slot)
            for binding in self._home[number]:
                binding.apply()

    def _look_for_writes(self, number: int, run: _Run, slot: Slot) -> None:
        """What somebody has written to a slot is not what the next run of the segment shall find."""
        bindings = self._bindings[number][run.slot]
        if slot.buffer._version != run.writes or not all(map(_is_in_place, bindings)):
            self._overwritten += [copies.unit.name for copies in self._copies[number]]
            self._schedule.drop(run.slot)

    def _fill(self, number: int, slot: int, opening: bool) -> None:
        with _phase("stream::prefetch"):
            pairs = self._pairs[number]
            if pairs is not None and self._reader.idle:
                self._ring.fill(slot, pairs[slot], opening)
            else:
                target = self._ring.slots[slot]
                parts = [_part(place, unit) for place, unit in places_in(target.buffer, self._copies[number])]
                target.ready = self._reader.transfer(parts, target.free, opening)
        self._counters.copies += 1
        self._counters.streamed_bytes += self._segments[number].nbytes


def places_in(buffer: torch.Tensor, group: Sequence[UnitCopies]) -> list[Place]:
    """Where in a slot each unit of a segment lies: one behind another."""
    places, offset = [], 0
    for unit in group:
        end = offset + unit.unit.nbytes
        places.append((buffer[offset:end], unit))
        offset = end
    return places


def _part(place: torch.Tensor, unit: UnitCopies) -> Load | Move:
    """What a reader does for a unit."""
    if unit.master is None:
        return Load(unit.unit.layout, place)
    return Move(unit.master.buffer, place, unit.pinned)


_is_in_place = operator.methodcaller("is_in_place")
_NO_PHASE = nullcontext()


def _phase(name: str) -> AbstractContextManager[object]:
    """A span in a profiler's trace; nothing while nobody profiles."""
    return profiler.record_function(name) if profiler._is_profiler_enabled else _NO_PHASE
