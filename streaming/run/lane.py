"""The hot path of one device: a segment is copied ahead, waited for, bound while its units run, and released.

[Note: two events guard a slot]
A segment has one slot, the same in every step. Slots overlap, and a segment is copied to its slot when what lies there
is not needed any more. Copies write this memory and the compute stream reads it. Four rules keep them apart:
 1. write after read: a copy into a slot waits for the events that were recorded on the compute stream when the
    segments that lay there had queued their kernels (``_release``). Once a copy that waits for such an event is queued,
    later copies need not wait for that event: by 3 they come behind that copy (``Ring.filled``);
 2. read after write: a segment's kernels are queued behind a wait for ``ready``, recorded after the copy (``_begin``);
 3. write after write: the backend carries copies out in the order in which they are queued;
 4. the host never rewrites a master copy while a copy from it may be under way: code that rewrites one drains the copy
    streams first (``site.py``).
Segments with page-locked master copies are copied straight from them. The others, and then those behind them, go
through a reader, which reads and queues copies on threads of its own, in the same order (reader.py, Note: one order
for all copies). A transfer that fails may not have waited for its events, so these stay for the next (``Ring.guards``).
A segment that is needed while a segment that runs lies in its place gets memory of its own for that time. (This happens
where units unexpectedly run inside of others.)
What a block writes to its weights while they are in a slot, or puts in their place, would be lost with the next copy.
It shows in torch's count of writes to the slot, and in what modules hold; the step ends in an error then (runner.py).
A segment is released when its units have run as often as they did before, and at the latest when its block or the
step ends. A unit that runs once more begins its segment anew, with a wait and a binding of its own; so nothing here
relies on how often units ran before.
What is packed is unpacked when its segment begins (unpacking.py, Note: unpacked in turn).
The host itself waits for nothing but readers. torch's allocator is never told about the second stream
(``record_stream``): instead, staging memory is freed only after ``synchronize``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch.autograd import profiler

from ..collector import uncollected
from ..config import format_bytes
from ..devices.backend import Backend, is_out_of_memory
from ..devices.copies import Event, Pair, Unpacking
from ..memory.reader import Reader
from ..memory.transfer import Tick, Transfer
from ..memory.unit_copies import UnitCopies
from ..packing.unpackers import unpacker_of
from ..planning.plan import Plan
from .open_segment import OpenSegment
from .places import DevicePlace, Ways, pairs_to, places_in, ways_to
from .ring import Ring, Slot
from .schedule import Entry, Schedule
from .telemetry import Meters
from .unpacking import UnpackingMemory

logger = logging.getLogger(__name__)


class Lane:
    """Streams the segments of a plan through a ring.

    Args:
        backend: the device.
        plan: a plan with segments.
        copies: returns the copies of a streamed unit.
        reader: brings what has no page-locked master copy.
        copy_streams: 0 copies each segment when it is needed, on the compute stream.
        meters: where to count.
        tick: is called while the host waits for a reader, and may raise.
    """

    @uncollected()
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
        self._open: dict[int, OpenSegment] = {}
        self._copies = [[copies(unit) for unit in segment.units] for segment in plan.segments]
        self._lasting = [[unit.lasting for unit in group] for group in self._copies]
        ends = zip(plan.offsets, plan.segments, strict=True)
        spans = [range(offset, offset + segment.nbytes) for offset, segment in ends]
        self._ring = Ring(backend, plan.staging_bytes, spans)
        self._schedule = Schedule(range(len(spans)), spans, ahead=copy_streams > 0)
        self._packed = plan.packed
        self._sizes = [list(map(plan.outline.bytes_in_slot, segment.units)) for segment in plan.segments]
        self._unpacker = unpacker_of(backend.device) if plan.packed else None
        self._pairs: list[list[Pair] | None] = []
        self._ways: list[Ways] = []
        self._unpacking = UnpackingMemory(backend)
        try:
            self._unpacking.allocate(plan.unpacking_bytes)
            self._prepare()
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        """Make once what steps use, so that a step makes no view and no parameter.

        For each segment: the bindings to its slot, and, where all units have page-locked master copies, the copies.
        """
        with torch.inference_mode(False):
            for number, slot in enumerate(self._ring.slots):
                places = self._places_in(number, slot.buffer)
                self._ways.append(ways_to(places, self._unpacking.memory, self._unpacker))
                self._pairs.append(pairs_to(places))

    def _places_in(self, number: int, buffer: torch.Tensor) -> list[DevicePlace]:
        return places_in(buffer, self._copies[number], self._sizes[number], self._packed)

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
        """A block begins: bind the segments that it needs until it ends."""
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
        opened = self._open.get(number)
        if opened is None:
            opened = self._begin(number)
        opened.active += 1

    def leave(self, number: int) -> None:
        """A unit of segment ``number`` ends."""
        opened = self._open.get(number)
        if opened is None:
            return  # Released already: code in between has handled an exception.
        opened.active -= 1
        opened.left -= 1
        if opened.left == 0 and opened.active == 0:
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
        """Master copies were made: copy from them, and copy held segments anew. No copy may be under way."""
        for number, group in enumerate(self._copies):
            self._lasting[number] = [unit.lasting for unit in group]
            with torch.inference_mode(False):
                self._pairs[number] = pairs_to(self._places_in(number, self._ring.slots[number].buffer))
        self.forget()

    def prefetch(self) -> None:
        """Queue copies of what is needed next, as far as there is room."""
        while (copy := self._schedule.next_copy()) is not None:
            self._fill(copy.segment, copy.opening)

    def copy_nothing_ahead(self) -> None:
        """From now on a segment is copied when it is needed."""
        self._schedule.ahead = False

    def close(self) -> None:
        """Give the staging memory back. No copy may be under way, and no segment bound."""
        self._ring.close()
        self._unpacking.close()
        self._ways.clear()

    # -- one segment ---------------------------------------------------------------------------------------------

    def _begin(self, number: int) -> OpenSegment:
        self._make_way(number)
        entry = self._schedule.enter(number)
        if entry is Entry.CROWDED_OUT:
            return self._begin_elsewhere(number)
        slot = self._ring.slots[number]
        opened = self._open[number] = self._open_in(number, slot.buffer, self._ways[number])
        try:
            if entry is Entry.HELD:
                self._counters.hits += 1
            else:
                self._counters.misses += 1
                self._fill(number, opening=True)
            with _phase("stream::wait"):
                self._wait(number, slot, entry)
            self._arrived(number, slot.buffer)
            self._bind(number, opened)
        except BaseException:
            self._release(number)
            self._schedule.drop(number)
            raise
        return opened

    def _begin_elsewhere(self, number: int) -> OpenSegment:
        """Begin a segment in memory of its own; compute waits while it is copied there."""
        self._counters.misses += 1
        buffer = self._own_memory(number, self._segments[number].nbytes)
        opened = None
        try:
            opened = self._open_in(number, buffer, None)
            # Race: kernels of this memory's previous user may still be under way.
            pairs = pairs_to(self._places_in(number, buffer))
            ready = self._copy(number, buffer, pairs, [self._backend.mark()], opening=True)
            self._backend.wait(self._reader.wait(ready, self._tick) if isinstance(ready, Transfer) else ready)
            self._arrived(number, buffer)
        except BaseException:
            self._reader.flush()
            self._backend.synchronize()  # Race: a copy to it may be under way.
            self._backend.free(buffer)
            if opened is not None:
                self._unpacking.leave(opened.unpacked)
            raise
        self._open[number] = opened
        self._bind(number, opened)
        return opened

    def _bind(self, number: int, opened: OpenSegment) -> None:
        """Have the modules of a segment that has arrived use it."""
        if opened.ways.unpacking:
            self._unpack(number, opened)
        opened.bind()

    def _unpack(self, number: int, opened: OpenSegment) -> None:
        """Unpack what has arrived. A plan counts that apart from compute."""
        if not self._stalls.has_listeners:
            return opened.unpack()
        backend = self._backend
        before = backend.moment()
        opened.unpack()
        after = backend.moment()
        return self._stalls.tell(Unpacking(backend.seconds, before, after))

    def _open_in(self, number: int, buffer: torch.Tensor, ways: Ways | None) -> OpenSegment:
        """A segment in ``buffer``; ``ways`` hold where the memory for unpacking is free."""
        segment = self._segments[number]
        unpacked = self._unpacking.take() if segment.unpacked_bytes else None
        if segment.unpacked_bytes and unpacked is None:
            unpacked, ways = self._own_memory(number, segment.unpacked_bytes), None
        if ways is None:
            try:
                with torch.inference_mode(False):
                    ways = ways_to(self._places_in(number, buffer), unpacked, self._unpacker)
            except BaseException:
                self._unpacking.leave(unpacked)
                raise
        return OpenSegment(segment.runs, buffer, unpacked, ways)

    def _own_memory(self, number: int, nbytes: int) -> torch.Tensor:
        try:
            return self._backend.allocate(nbytes)
        except Exception as error:
            if is_out_of_memory(error):
                text = "%s runs inside of another part and needs %s beside that: the VRAM limit is too small for both"
                logger.warning(text, self._copies[number][0].unit.name, format_bytes(nbytes))
            raise

    def _wait(self, number: int, slot: Slot, entry: Entry) -> None:
        """Make compute wait for the slot; the host waits too where a reader has not queued the copies yet."""
        if not isinstance(slot.ready, Transfer):
            self._stalls.add(self._backend.wait(slot.ready))
            return
        backend = self._backend
        before = backend.moment()
        try:
            slot.ready = self._reader.wait(slot.ready, self._tick)
        except Exception:
            if entry is not Entry.HELD:
                raise
            # A copy that failed ahead of time may succeed now, or else fails now.
            self._counters.misses += 1
            self._fill(number, opening=True)
            slot.ready = self._reader.wait(slot.ready, self._tick) if isinstance(slot.ready, Transfer) else slot.ready
        self._ring.filled(slot)
        backend.wait(slot.ready)
        after = backend.moment()
        self._stalls.add(partial(backend.seconds, before, after))

    def _arrived(self, number: int, buffer: torch.Tensor) -> None:
        """Does nothing here. A lane that verifies compares the segment in ``buffer`` with its source (verify.py)."""

    def _make_way(self, number: int) -> None:
        """Release unused segments in the place of segment ``number``: a unit of theirs was left out this time."""
        slots = self._ring.slots
        for other, opened in list(self._open.items()) if self._open else ():
            segment = self._segments[other]
            unused = opened.active == 0 and (segment.runs > 0 or segment.block not in self._running)
            if unused and slots[other].overlaps(slots[number]):
                self._release(other)

    def _release_all(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._release(number)
        if numbers:
            self.prefetch()

    def _release(self, number: int) -> None:
        opened = self._open.pop(number)
        with _phase("stream::release"):
            slot = self._ring.slots[number]
            is_in_slot = opened.buffer is slot.buffer
            if is_in_slot:
                self._schedule.leave(number)
                self._ring.release(slot)
            if opened.is_written:
                self._overwritten += [copies.unit.name for copies in self._copies[number]]
                if is_in_slot:  # The next run of the segment must not find it.
                    self._schedule.drop(number)
            for binding in self._lasting[number]:
                binding.apply()
            self._unpacking.leave(opened.unpacked)
            if not is_in_slot:
                self._backend.free(opened.buffer)

    def _fill(self, number: int, opening: bool) -> None:
        with _phase("stream::prefetch"):
            slot = self._ring.slots[number]
            slot.ready = self._copy(number, slot.buffer, self._pairs[number], self._ring.guards(slot), opening)
            if not isinstance(slot.ready, Transfer):
                self._ring.filled(slot)
            self._schedule.hold(number)

    def _copy(
        self, number: int, buffer: torch.Tensor, pairs: list[Pair] | None, after: Sequence[Event], opening: bool
    ) -> Event | Transfer:
        """Have a segment copied to ``buffer``, straight from its page-locked master copies or by a reader."""
        if pairs is not None and self._reader.idle:
            ready = self._backend.bring(pairs, after, opening)
        else:
            parts = [place.request() for place in self._places_in(number, buffer)]
            ready = self._reader.transfer(parts, after, opening)
        self._counters.copies += 1
        self._counters.streamed_bytes += self._segments[number].nbytes
        return ready


_NO_PHASE = nullcontext()


def _phase(name: str) -> AbstractContextManager[object]:
    """A span in a profiler's trace; nothing while no profiler runs."""
    return profiler.record_function(name) if profiler._is_profiler_enabled else _NO_PHASE
