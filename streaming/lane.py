"""The hot path of one device: a segment is copied ahead, waited for, bound while its units run, and released.

[Note: two events guard a slot]
A slot's memory is written by copies and read by the compute stream. Four things keep them apart:
 1. write after read: a copy into a slot waits for ``free``, recorded on the compute stream when the slot's last
    segment has queued its kernels (``_release``);
 2. read after write: a segment's kernels are queued behind a wait for ``ready``, recorded after the copy (``_begin``);
 3. write after write: the backend carries copies out in the order in which they are queued;
 4. the host never rewrites a master copy while a copy from it may be under way: who does drains the copy streams
    first (``streamer.py``).
A segment is released when its units have run as often as they did before, and at the latest when its block or the
step ends. A unit that runs once more begins its segment anew, with a wait and a binding of its own; so nothing here
relies on how often units ran before. The host itself waits for nothing. Tensors never tell torch's allocator about the
second stream (``record_stream``): staging memory is freed only after ``synchronize``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.autograd import profiler

from .backend import Backend, Pair
from .layout import Binding
from .masters import Weights
from .plan import Plan
from .ring import Ring
from .schedule import Schedule
from .telemetry import Counters, StallMeter


class _Run:
    """A segment that is bound to a slot.

    Attributes:
        active: its units that are running now.
        left: runs of its units after which it is released; never reached by one that its block holds.
    """

    __slots__ = ("active", "left", "slot")

    def __init__(self, slot: int, left: int) -> None:
        self.slot = slot
        self.active = 0
        self.left = left


class Lane:
    """Streams the segments of a plan through a ring.

    Args:
        backend: the device.
        plan: a plan with segments.
        masters: gives a streamed unit's master copy.
        copy_streams: 0 copies each segment when it is needed, on the compute stream.
        counters, stalls: where to count.
    """

    def __init__(
        self,
        backend: Backend,
        plan: Plan,
        masters: Callable[[int], Weights],
        copy_streams: int,
        counters: Counters,
        stalls: StallMeter,
    ) -> None:
        self._backend = backend
        self._segments = plan.segments
        self._counters = counters
        self._stalls = stalls
        self.segment_of = {unit: number for number, segment in enumerate(plan.segments) for unit in segment.units}
        self._of_block: dict[int, list[int]] = {}
        for number, segment in enumerate(plan.segments):
            self._of_block.setdefault(segment.block, []).append(number)
        self._running: set[int] = set()
        self._open: dict[int, _Run] = {}
        backend.open(copy_streams)
        self._ring = Ring(backend, plan.slots, plan.slot_bytes)
        self._schedule = Schedule(range(len(plan.segments)), plan.slots, plan.slots if copy_streams else 0)
        self._home: list[list[Binding]] = []
        self._pairs: list[list[list[Pair]]] = []
        self._bindings: list[list[list[Binding]]] = []
        try:
            self._prepare(masters)
        except BaseException:
            self._ring.release()
            raise

    def _prepare(self, masters: Callable[[int], Weights]) -> None:
        """Make once what steps use, so that a step makes no view and no parameter.

        For each segment: what its units are bound to when it is in no slot; and for each slot the copies into it and
        the bindings to it.
        """
        with torch.inference_mode(False):
            for segment in self._segments:
                group = [masters(unit) for unit in segment.units]
                places = [_places(slot.buffer, group) for slot in self._ring.slots]
                self._home.append([weights.binding for weights in group])
                self._pairs.append([[(place, weights.buffer) for place, weights in each] for each in places])
                self._bindings.append([[weights.bind_to(place) for place, weights in each] for each in places])

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

    def prefetch(self) -> None:
        """Queue copies of what is needed next, as far as slots are free."""
        while (copy := self._schedule.next_copy()) is not None:
            try:
                self._fill(copy.segment, copy.slot, copy.opening)
            except BaseException:
                self._schedule.drop(copy.slot)
                raise

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
                self._stalls.add(self._backend.wait(self._ring.slots[entry.slot].ready))
            for binding in self._bindings[number][entry.slot]:
                binding.apply()
        except BaseException:
            self._release(number)
            self._schedule.drop(entry.slot)
            raise
        return run

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
            self._ring.slots[run.slot].free = self._backend.mark()
            for binding in self._home[number]:
                binding.apply()

    def _fill(self, number: int, slot: int, opening: bool) -> None:
        with _phase("stream::prefetch"):
            self._ring.fill(slot, self._pairs[number][slot], opening)
        self._counters.copies += 1
        self._counters.streamed_bytes += self._segments[number].nbytes


def _places(buffer: torch.Tensor, group: Sequence[Weights]) -> list[tuple[torch.Tensor, Weights]]:
    """Where in a slot each unit of a segment lies: one behind another."""
    places, offset = [], 0
    for weights in group:
        end = offset + weights.buffer.nbytes
        places.append((buffer[offset:end], weights))
        offset = end
    return places


_NO_PHASE = nullcontext()


def _phase(name: str) -> AbstractContextManager[object]:
    """A span in a profiler's trace; nothing while nobody profiles."""
    return profiler.record_function(name) if profiler._is_profiler_enabled else _NO_PHASE
