"""What streaming did: counters, and one snapshot of them for logs, nodes and routes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import NamedTuple, Protocol

from ..devices.backend import Backend
from ..devices.copies import Moment, Stall
from .averages import average, timed_steps
from .step_log import RunLog, StepLog, StepRow

# More waits than any step has; the oldest are dropped beyond.
MOST_PENDING = 4096

# A wait shorter than this is the cost of asking, not a stall.
STALL_SECONDS = 20e-6


@dataclass
class Counters:
    """Totals since the model was loaded.

    Attributes:
        runs: times that the host got the model ready to run.
        steps: whole forwards.
        reruns: times that a step ran again: memory ran out, or a weight was not where it was read.
        copies, streamed_bytes: segments copied to the device, ahead or late, and their bytes.
        hits, misses: segments that were in a slot, or on their way to one, when they were needed; and those that were
            not.
        stalls, stall_seconds: times that compute waited for a copy, and for how long in all.
        corrupted: copies that were not what was sent; 0 unless copies are verified (verify.py).
    """

    runs: int = 0
    steps: int = 0
    reruns: int = 0
    copies: int = 0
    streamed_bytes: int = 0
    hits: int = 0
    misses: int = 0
    stalls: int = 0
    stall_seconds: float = 0.0
    corrupted: int = 0

    def since(self, before: Counters) -> Counters:
        """What was counted after ``before``, a copy of these."""
        return Counters(*(now - then for now, then in zip(astuple(self), astuple(before), strict=True)))


@dataclass(frozen=True)
class Run:
    """The steps since the host got a model ready to run.

    Attributes:
        counters: of these steps.
        step_seconds, rate, waiting: their average (averages.py): seconds, bytes per second, and the part in which
            compute waits; None while none was timed.
    """

    counters: Counters
    step_seconds: float | None = None
    rate: float | None = None
    waiting: float | None = None

    @classmethod
    def of(cls, counters: Counters, log: RunLog | None) -> Run:
        """The run in ``log``, None where no step was timed."""
        found = average(timed_steps(log)) if log is not None else None
        return cls(counters) if found is None else cls(counters, *found)


class Activity(NamedTuple):
    """What a model does and has done, at one moment.

    Attributes:
        busy: whether it runs a step, or is being loaded, or its device still computes one.
        idle_seconds: since it was loaded or began a step.
        step_seconds: how long the last step took; None before the first.
        counters: totals.
        run, last_run: the run that is on or has ended last, and the last one before it that had steps.
    """

    busy: bool
    idle_seconds: float
    step_seconds: float | None
    counters: Counters
    run: Run
    last_run: Run | None


class StepListener(Protocol):
    """Measures a step, which may run on several devices."""

    def stalled(self, device: Backend, stall: Stall) -> None:
        """Compute of ``device`` waits for a copy, or weights are unpacked: time that a resident would not take."""

    def computed(self, device: Backend, seconds: Callable[[], float]) -> None:
        """A block has run on ``device``; ``seconds`` waits for it, and returns its compute."""


class StallMeter:
    """Collects waits whose length is known only later, without ever waiting for them.

    Args:
        backend: the device that waits.
        counters: where to count.
        listeners: are told of each wait too.

    Only the thread that runs the model may use it. Another thread that asks for a status reads the counters alone.
    """

    def __init__(self, backend: Backend, counters: Counters, listeners: Sequence[StepListener] = ()) -> None:
        self._backend = backend
        self._counters = counters
        self._listeners = listeners
        # Bounded, for callers that run blocks outside of the root's forward and so never collect.
        self._pending: deque[Stall] = deque(maxlen=MOST_PENDING)

    def add(self, stall: Stall) -> None:
        self._pending.append(stall)
        self.tell(stall)

    @property
    def has_listeners(self) -> bool:
        """Whether somebody measures the step."""
        return bool(self._listeners)

    def tell(self, stall: Stall) -> None:
        """Tell those who measure the step of time that is no wait for a copy, and is not counted."""
        for listener in self._listeners:
            listener.stalled(self._backend, stall)

    def collect(self) -> None:
        """Count the waits that are over by now. They end in the order in which they began."""
        while self._pending and (seconds := self._pending[0]()) is not None:
            self._pending.popleft()
            if seconds > STALL_SECONDS:
                self._counters.stalls += 1
                self._counters.stall_seconds += seconds

    def clear(self) -> None:
        self._pending.clear()


class StepTimes(NamedTuple):
    """How long the last step took, in seconds, None before one was timed, and whether the device still computes one."""

    last: float | None
    computing: bool


class _Pending(NamedTuple):
    """A step that was queued: its moments, whole steps with it, and the bytes that were copied up to its end."""

    begin: Moment
    end: Moment
    steps: int
    streamed_bytes: int


class StepMeter:
    """Measures how long steps take on the device, without waiting for them.

    Where the host is ahead of the device by more than a step some are not timed. Only the thread that runs the model
    may use it, except for :meth:`times` and :meth:`runs`.

    Attributes:
        log: the steps of the last runs.
    """

    def __init__(self, backend: Backend, counters: Counters) -> None:
        self.log = StepLog()
        self._backend = backend
        self._counters = counters
        self._begin: Moment | None = None
        self._pending: _Pending | None = None
        self._last: float | None = None

    def begin_run(self) -> None:
        """Steps from now on belong to another run."""
        self.collect()
        self._pending = None
        counters = self._counters
        totals = StepRow(counters.steps, 0.0, counters.streamed_bytes, counters.stall_seconds)
        self.log.begin_run(counters.runs + 1, totals)

    def begin(self) -> None:
        self.collect()
        self._begin = self._backend.moment()

    def end(self, completed: bool) -> None:
        if completed and self._pending is None:
            counters = self._counters
            self._pending = _Pending(self._begin, self._backend.moment(), counters.steps + 1, counters.streamed_bytes)

    def collect(self) -> None:
        """Log the step that was queued last, once it is over."""
        pending = self._pending
        if pending is not None and (seconds := self._backend.seconds(pending.begin, pending.end)) is not None:
            self._pending, self._last = None, seconds
            self.log.add(self._row(pending, seconds))

    def _row(self, pending: _Pending, seconds: float) -> StepRow:
        return StepRow(pending.steps, seconds, pending.streamed_bytes, self._counters.stall_seconds)

    def runs(self) -> list[RunLog]:
        """The steps of the last runs as far as they are known, on any thread."""
        pending = self._pending
        seconds = self._backend.seconds(pending.begin, pending.end) if pending is not None else None
        return self.log.runs(self._row(pending, seconds) if pending is not None and seconds is not None else None)

    def times(self) -> StepTimes:
        """The times as far as they are known, on any thread."""
        last, pending = self._last, self._pending
        seconds = self._backend.seconds(pending.begin, pending.end) if pending is not None else None
        return StepTimes(last if seconds is None else seconds, pending is not None and seconds is None)


class Meters:
    """What is counted and timed of one model on one device.

    Attributes:
        counters: totals, which other threads may read.
        stalls: waits for copies.
        step: the times of steps.
        overwritten: names of units that were written to while in a slot, so that the writes are lost; not reported yet.
    """

    def __init__(self, backend: Backend, counters: Counters, listeners: Sequence[StepListener]) -> None:
        self.counters = counters
        self.overwritten: list[str] = []
        self.stalls = StallMeter(backend, counters, listeners)
        self.step = StepMeter(backend, counters)

    def begin_step(self) -> None:
        """Count the waits of the step before first, which its row in the log has."""
        self.stalls.collect()
        self.step.begin()

    def end_run(self) -> None:
        """The device is done with the last step: count it, its waits first."""
        self.stalls.collect()
        self.step.collect()


@dataclass(frozen=True)
class Snapshot:
    """The state of one streamed model at one moment. Sizes in bytes.

    Attributes:
        device: name of the device.
        mode: ``off`` (not loaded), ``resident``, ``streamed`` or ``synchronous``.
        explain: the plan in effect, in a line.
        note: why something that was asked for is not in effect; empty when all is.
        why_unpacked: why weights do not stream packed, where that was asked for, or would help and cannot be.
        blocks, resident_blocks, streamed_blocks: all; those that stay as a whole; those of which some part is streamed.
        segments: copies in one step.
        streamed_block_bytes: bytes that cross the bus in one step.
        streamed_weight_bytes: bytes of the weights that these are; more where some are packed.
        pinned_bytes, pageable_bytes: host memory for master copies and for the ring through which others are staged.
        shared_bytes: of the page-locked bytes, those that other processes may have too (docs/sharing.md).
        staged_bytes: of the bytes that stream, those that come through that ring, from a file or pageable memory.
        ring_bytes: host memory of that ring; 0 when it is not needed.
        building, locking: whether master copies are being built, or will be before the next step; whether they are now.
        device_bytes, device_peak_bytes, device_budget_bytes: what this model has allocated, now and at most, and
            what the device's backend allows (None: no limit of its own).
        limited_by: ``compute`` or ``bus``; empty before a step was measured.
        predicted_step_seconds, step_seconds: what the plan expects of a step, and what the last one took.
        more_bytes, more_seconds: device memory with which a step is as fast as it can be, and what it takes then; 0
            where none would make it faster.
        compute_seconds, bandwidth_bytes_per_second: as measured: a step with everything resident, and the bus.
        busy, idle_seconds, counters, run, last_run: as :class:`Activity` has them.
    """

    device: str
    mode: str
    explain: str
    note: str
    why_unpacked: str
    blocks: int
    resident_blocks: int
    streamed_blocks: int
    segments: int
    resident_bytes: int
    rest_bytes: int
    staging_bytes: int
    streamed_block_bytes: int
    streamed_weight_bytes: int
    pinned_bytes: int
    pageable_bytes: int
    shared_bytes: int
    staged_bytes: int
    ring_bytes: int
    building: bool
    locking: bool
    device_bytes: int
    device_peak_bytes: int
    device_budget_bytes: int | None
    limited_by: str
    predicted_step_seconds: float | None
    more_bytes: int
    more_seconds: float
    step_seconds: float | None
    compute_seconds: float | None
    bandwidth_bytes_per_second: float | None
    busy: bool
    idle_seconds: float
    counters: Counters
    run: Run
    last_run: Run | None

    def as_dict(self) -> dict[str, object]:
        """Plain values, ready for JSON."""
        return asdict(self)
