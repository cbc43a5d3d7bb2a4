"""Measures a step: compute of every block, the bus, and which units run in which order. Recording waits for nothing.

[Note: the host ahead of the device]
Between the events around a block are its kernels, and the time in which the device waits for the host to launch them.
Where the host is late all the time, as one that launches for several devices may be, nearly all of it is the host's:
two H200 that took 0.23 s for a step were said to compute for 0.31, and no weight was packed for that. So a step that is
measured again gives the host a head start: the first block begins so much later on the device, and what follows is
queued by then. That time counts as a wait.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import groupby, pairwise
from statistics import median
from time import perf_counter
from time import time as time_of_day
from typing import NamedTuple

from ..devices.backend import Backend
from ..devices.copies import CopyTime, Moment, Stall
from ..memory.reader import Reader
from ..planning.profile import Outline, Profile, UnitTime, by_kind
from ..split.assignment import HOP_SECONDS
from .trace import Span, StepTrace, copy_spans, wait_spans

# Shorter copies say more about starting a copy than about the bus.
LEAST_TIMED_BYTES = 4 * 1024**2

# A step of which the host needs this part to launch it may have waited for the host, not for compute.
HOST_SHARE = 0.9

# A block that runs more than this part of its bytes twice in a row streams as a whole.
MOSTLY_TWICE = 0.5


# Called when a block has run on a device, with a function that waits for the block and returns its compute in seconds.
Tell = Callable[[Backend, Callable[[], float]], None]


def _nobody() -> None:
    return None


class _Mark(NamedTuple):
    """A unit begins or ends."""

    unit: int
    begins: bool
    moment: Moment


class _Elsewhere(NamedTuple):
    """A block that has run on another device, and its compute."""

    device: Backend
    seconds: Callable[[], float]


class _Gap:
    """Time outside of the blocks of a device: the waits for copies in it, and the blocks that other devices ran."""

    def __init__(self, begin: Moment) -> None:
        self.begin = begin
        self.stalls: list[Stall] = []
        self.elsewhere: list[_Elsewhere] = []

    def seconds_elsewhere(self) -> float:
        """Seconds that the blocks of other devices compute, and that activations need on their way there and back."""
        hops = 1 + sum(before.device is not after.device for before, after in pairwise(self.elsewhere))
        return sum(block.seconds() for block in self.elsewhere) + (1 + hops) * HOP_SECONDS


class _BlockRun:
    """One run of one block: what happened in it, in order, and what came between it and the one before."""

    def __init__(self, begin: Moment, gap: _Gap | None) -> None:
        self.begin = begin
        self.gap = gap
        self.end: Moment | None = None
        self.events: list[_Mark | Stall] = []
        self.runs: dict[int, int] = {}
        self.running: list[int] = []
        self.outer: set[int] = set()


class _Staged(NamedTuple):
    """Bytes that a reader has brought for steps, seconds in which it worked for them, and bytes that it has brought in
    all. Residents that it brings come once, and say nothing of later steps."""

    nbytes: int
    seconds: float
    sent: int


class _BlockTime(NamedTuple):
    """Seconds of compute, without waits: of a block, from each unit's begin to its end (``hold``), and from each unit's
    begin to the next begin (``work``)."""

    seconds: float
    hold: dict[int, float]
    work: dict[int, float]

    def and_then(self, later: _BlockTime) -> _BlockTime:
        """The sum with another run of the same block in a step."""
        return _BlockTime(self.seconds + later.seconds, _summed(self.hold, later.hold), _summed(self.work, later.work))


class Recorder:
    """Records the events of one step, and makes a :class:`Profile` of them. Events outside of a step are left out.

    Args:
        outline: the model.
        backend: the device.
        reader: brings what has no page-locked master copy.
        tells: returns what to call when a block has run here, to tell all that measure the step on any device, or None.
        head_start: seconds by which the host is to be ahead of the device where the step's first block runs.
    """

    def __init__(
        self,
        outline: Outline,
        backend: Backend,
        reader: Reader,
        tells: Callable[[], Tell | None] = _nobody,
        head_start: float = 0.0,
    ) -> None:
        self._outline = outline
        self._backend = backend
        self._reader = reader
        self._tells = tells
        self._head_start = head_start
        self._staged_before = self._staged = _Staged(0, 0.0, 0)
        self._begin: Moment | None = None
        self._end: Moment | None = None
        self._runs: list[tuple[int, _BlockRun]] = []
        self._open: list[tuple[int, _BlockRun]] = []
        self._gap: _Gap | None = None
        self._running = False
        self._alone: set[int] = set()
        self._on_others = False
        self._host_began = self._host_seconds = self._time = 0.0
        self._copied: list[CopyTime] | None = None
        backend.time_copies()

    @property
    def complete(self) -> bool:
        """Whether a whole step was recorded, and blocks ran in it: a cache may have answered in their place."""
        return self._end is not None and bool(self._runs or self._alone)

    @property
    def never_entered(self) -> set[int]:
        """Blocks of which units ran in the step, though the block itself was not entered."""
        return self._alone - {block for block, _ in self._runs}

    @property
    def host_was_late(self) -> bool:
        """Whether launching the step took the host about as long as the step, so that its times may be the host's.

        A virtual device computes on the host, and where weights are read or several devices take turns the host waits.
        """
        if self._backend.is_virtual or self._staged.nbytes or self._on_others:
            return False
        return self._host_seconds >= HOST_SHARE * _seconds(self._backend, self._begin, self._end)

    @property
    def not_entered(self) -> list[int]:
        """Blocks that were not entered yet."""
        entered = {block for block, _ in self._runs}
        return [block for block in range(self._outline.blocks) if block not in entered]

    def begin_step(self) -> None:
        self._begin, self._end = self._backend.moment(), None
        self._staged_before = self._staged_so_far()
        self._gap = _Gap(self._begin)
        self._runs.clear()
        self._open.clear()
        self._alone.clear()
        self._on_others = False
        self._running = True
        self._time = time_of_day()
        self._host_began = perf_counter()

    def end_step(self) -> None:
        self._host_seconds = perf_counter() - self._host_began
        self._end = self._backend.moment()
        self._running = False
        before, now = self._staged_before, self._staged_so_far()
        self._staged = _Staged(*(after - earlier for after, earlier in zip(now, before, strict=True)))

    def _staged_so_far(self) -> _Staged:
        return _Staged(self._reader.step_bytes, self._reader.step_seconds, self._reader.sent_bytes)

    def begin_block(self, block: int) -> None:
        if not self._running:
            return
        if self._head_start and not (self._runs or self._on_others):
            self._give_head_start()
        run = _BlockRun(self._backend.moment(), self._gap)
        self._gap = None  # A block inside of another one has no gap before it.
        self._runs.append((block, run))
        self._open.append((block, run))

    def _give_head_start(self) -> None:
        """Note: the host ahead of the device."""
        begin = self._backend.moment()
        self._backend.hold_back(self._head_start)
        self.stalled(self._backend, partial(self._backend.seconds, begin, self._backend.moment()))

    def end_block(self, block: int) -> None:
        for position in range(len(self._open) - 1, -1, -1):
            if self._open[position][0] == block:
                run = self._open.pop(position)[1]
                run.end = self._backend.moment()
                if not self._open:
                    self._gap = _Gap(run.end)
                    if (tell := self._tells()) is not None:
                        tell(self._backend, partial(_compute_of, self._backend, run))
                return

    def begin_unit(self, unit: int) -> None:
        run = self._run_of(unit)
        if run is None:
            if self._running:
                self._alone.add(self._outline.unit_block[unit])
            return
        run.runs[unit] = run.runs.get(unit, 0) + 1
        # A unit inside of another one may run before the outer one reads its weights: note the outer one.
        run.outer.update(run.running)
        run.running.append(unit)
        run.events.append(_Mark(unit, True, self._backend.moment()))

    def end_unit(self, unit: int) -> None:
        run = self._run_of(unit)
        if run is not None and unit in run.running:
            run.running.remove(unit)
            run.events.append(_Mark(unit, False, self._backend.moment()))

    def stalled(self, device: Backend, stall: Stall) -> None:
        """Compute waits for a copy, in the block that runs now or between blocks. What waits on another device is part
        of the time there, and CUDA takes no time between events of two devices."""
        if device is not self._backend:
            return
        if self._open:
            self._open[-1][1].events.append(stall)
        elif self._gap is not None:
            self._gap.stalls.append(stall)

    def computed(self, device: Backend, seconds: Callable[[], float]) -> None:
        """A block has run, here or on another device."""
        self._on_others = self._on_others or device is not self._backend
        if device is not self._backend and self._gap is not None:
            self._gap.elsewhere.append(_Elsewhere(device, seconds))

    def profile(self, before: Profile, with_times: bool) -> Profile:
        """Return what was recorded. Everything recorded must be over; ``before`` fills what this step has not shown.

        Args:
            with_times: false keeps the times of ``before``: in a first step kernels are loaded, and the driver sees
                memory for the first time.
        """
        bandwidth = self._bandwidth()
        order = tuple(dict.fromkeys(block for block, _ in self._runs))
        profile = replace(
            before,
            bandwidth=bandwidth or before.bandwidth,
            unit_runs=before.unit_runs or self._unit_runs(),
            block_order=order or before.block_order,
        )
        if not with_times:
            return profile
        times: dict[int, _BlockTime] = {}
        for block, run in self._runs:
            if run.end is not None:
                time = _block_time(self._backend, run)
                times[block] = times[block].and_then(time) if block in times else time
        spent = [times[block].seconds if block in times else None for block in range(self._outline.blocks)]
        gaps = self._gap_times()
        after = self._gap_time(self._gap, self._end) if self._gap is not None else 0.0
        return replace(
            profile,
            block_seconds=by_kind(self._outline, spent),
            other_seconds=sum(gaps.values()) + after,
            gap_seconds=tuple(gaps.get(block, 0.0) for block in range(self._outline.blocks)),
            unit_times=self._unit_times(times),
            measured=bandwidth is not None or before.measured,
        )

    def _gap_times(self) -> dict[int, float]:
        """Seconds before each block that did not run inside of another one."""
        found: dict[int, float] = {}
        for block, run in self._runs:
            if run.gap is not None:
                found[block] = found.get(block, 0.0) + self._gap_time(run.gap, run.begin)
        return found

    def _gap_time(self, gap: _Gap, end: Moment) -> float:
        """Seconds of a gap, without waits. Where other devices compute in it, only that counts: they and the host may
        have taken longer."""
        if gap.elsewhere:
            return gap.seconds_elsewhere()
        waited = sum(stall() or 0.0 for stall in gap.stalls)
        return max(0.0, _seconds(self._backend, gap.begin, end) - waited)

    def _unit_times(self, times: dict[int, _BlockTime]) -> tuple[UnitTime, ...]:
        """For every unit the median of its kind: of the units in its place in blocks that are like its own."""
        outline = self._outline
        found: dict[tuple[int, int], list[tuple[float, float]]] = {}
        for block, time in times.items():
            first = min(outline.block_units[block], default=0)
            for unit, work in time.work.items():
                place = outline.block_kind[block], unit - first
                found.setdefault(place, []).append((time.hold.get(unit, 0.0), work))
        medians = {
            place: UnitTime(*(max(0.0, median(values)) for values in zip(*pairs, strict=True)))
            for place, pairs in found.items()
        }
        return tuple(
            medians.get((outline.block_kind[block], unit - min(outline.block_units[block])), UnitTime(0.0, 0.0))
            for unit, block in enumerate(outline.unit_block)
        )

    def trace(self, step: int) -> StepTrace:
        """Return what was recorded as spans of time. Everything recorded must be over.

        Args:
            step: the number of the step in its run.
        """
        since = partial(_seconds, self._backend, self._begin)
        gaps = [*(run.gap for _, run in self._runs), self._gap]
        stalls = [stall for gap in gaps if gap is not None for stall in gap.stalls]
        stalls += [event for _, run in self._runs for event in run.events if not isinstance(event, _Mark)]
        seconds = since(self._end)
        return StepTrace(
            step,
            self._time,
            self._host_began,
            seconds,
            tuple(Span(since(run.begin), since(run.end), block) for block, run in self._runs if run.end is not None),
            wait_spans(stalls, since),
            wait_spans(stalls, since, unpacking=True),
            copy_spans(self._copies(), since, seconds),
        )

    def _copies(self) -> list[CopyTime]:
        """The copies of the step. They are timed no longer."""
        if self._copied is None:
            self._copied = self._backend.copy_times()
        return self._copied

    def close(self) -> None:
        """Stop timing copies."""
        self._copies()

    def _bandwidth(self) -> float | None:
        """Bytes per second of all copies; those that a reader queued count as fast as it could read them."""
        times = self._copies()
        total = sum(time.nbytes for time in times)
        times = [time for time in times if time.nbytes >= LEAST_TIMED_BYTES] or times
        busy = sum(_seconds(self._backend, time.begin, time.end) for time in times)
        if busy <= 0:
            return None
        bus = sum(time.nbytes for time in times) / busy
        if self._staged.nbytes == 0:
            return bus
        direct = max(0, total - self._staged.sent)
        return (direct + self._staged.nbytes) / (direct / bus + self._staged.seconds)

    def _run_of(self, unit: int) -> _BlockRun | None:
        block = self._outline.unit_block[unit]
        return next((run for number, run in reversed(self._open) if number == block), None)

    def _unit_runs(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Which units run by themselves. A block that did not run is taken to be like others of its kind."""
        outline = self._outline
        shown: dict[int, list[tuple[int, int]]] = {}
        of_block: dict[int, tuple[tuple[int, int], ...]] = {}
        for block in dict.fromkeys(block for block, _ in self._runs):
            found = self._units_alone_in(block)
            of_block[block] = tuple(found)
            first = min(outline.block_units[block], default=0)
            shown[outline.block_kind[block]] = [(unit - first, count) for unit, count in found]
        for block, kind in enumerate(outline.block_kind):
            if block not in of_block:
                first = min(outline.block_units[block], default=0)
                of_block[block] = tuple((first + unit, count) for unit, count in shown.get(kind, []))
        return tuple(of_block[block] for block in range(outline.blocks))

    def _units_alone_in(self, block: int) -> list[tuple[int, int]]:
        """Units of a block that run by themselves, in the order of its fullest run, and how often they run in one.

        A block that is entered by several methods need not run the same units in each. For a block that runs most of
        them twice in a row there are none: in parts each would be copied twice, while as a whole the block is still
        there for the second time.
        """
        if self._bytes_run_twice(block) > MOSTLY_TWICE * self._outline.block_bytes(block):
            return []
        runs = sorted((run for number, run in self._runs if number == block), key=lambda run: -len(run.runs))
        outer = set().union(*(run.outer for run in runs))
        units = dict.fromkeys(unit for run in runs for unit in run.runs if unit not in outer)
        return [(unit, max(run.runs.get(unit, 0) for run in runs)) for unit in units]

    def _bytes_run_twice(self, block: int) -> int:
        """Bytes of the units that run in several runs of a block with no other block between them."""
        found: set[int] = set()
        for number, runs in groupby(self._runs, lambda run: run[0]):
            if number == block:
                ran = Counter(unit for _, run in runs for unit in run.runs)
                found |= {unit for unit, times in ran.items() if times > 1}
        return sum(self._outline.unit_bytes[unit] for unit in found)


def _summed(one: dict[int, float], other: dict[int, float]) -> dict[int, float]:
    return {unit: one.get(unit, 0.0) + other.get(unit, 0.0) for unit in {**one, **other}}


def _compute_of(backend: Backend, run: _BlockRun) -> float:
    """Wait for a run, and return its seconds of compute. A run refers only to earlier runs: there is no cycle."""
    backend.synchronize()
    return _block_time(backend, run).seconds


def _block_time(backend: Backend, run: _BlockRun) -> _BlockTime:
    hold: dict[int, float] = {}
    work: dict[int, float] = {}
    begun: dict[int, float] = {}
    now, stalled, last = 0.0, 0.0, None
    for event in run.events:
        if not isinstance(event, _Mark):
            stalled += event() or 0.0
            continue
        now = _seconds(backend, run.begin, event.moment) - stalled
        if not event.begins:
            hold[event.unit] = hold.get(event.unit, 0.0) + now - begun[event.unit]
            continue
        if last is not None:
            work[last] = work.get(last, 0.0) + now - begun[last]
        begun[event.unit], last = now, event.unit
    end = _seconds(backend, run.begin, run.end) - stalled
    if last is not None:
        work[last] = work.get(last, 0.0) + end - begun[last]
    return _BlockTime(max(0.0, end), hold, work)


def _seconds(backend: Backend, begin: Moment, end: Moment) -> float:
    seconds = backend.seconds(begin, end)
    assert seconds is not None, "a step is not over"
    return seconds
