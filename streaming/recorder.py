"""Measures one step: compute of every block, the bus, and which units run in which order. Nothing in it waits."""

from __future__ import annotations

from .backend import Backend, Moment, Stall
from .profile import Outline, Profile, by_kind

# Shorter copies say more about starting a copy than about the bus.
LEAST_TIMED_BYTES = 4 * 1024**2


class _BlockRun:
    """One run of one block."""

    def __init__(self, begin: Moment) -> None:
        self.begin = begin
        self.end: Moment | None = None
        self.stalls: list[Stall] = []
        self.runs: dict[int, int] = {}
        self.running: list[int] = []
        self.outer: set[int] = set()


class Recorder:
    """The events of one step, told by the streamer; afterwards a :class:`Profile`."""

    def __init__(self, outline: Outline, backend: Backend) -> None:
        self._outline = outline
        self._backend = backend
        self._begin: Moment | None = None
        self._end: Moment | None = None
        self._runs: list[tuple[int, _BlockRun]] = []
        self._open: list[tuple[int, _BlockRun]] = []
        backend.time_copies()

    @property
    def complete(self) -> bool:
        """Whether a whole step was recorded."""
        return self._end is not None

    def begin_step(self) -> None:
        self._begin, self._end = self._backend.moment(), None
        self._runs.clear()
        self._open.clear()

    def end_step(self) -> None:
        self._end = self._backend.moment()

    def begin_block(self, block: int) -> None:
        run = _BlockRun(self._backend.moment())
        self._runs.append((block, run))
        self._open.append((block, run))

    def end_block(self, block: int) -> None:
        for position in range(len(self._open) - 1, -1, -1):
            if self._open[position][0] == block:
                self._open.pop(position)[1].end = self._backend.moment()
                return

    def begin_unit(self, unit: int) -> None:
        run = self._run_of(unit)
        if run is None:
            return
        run.runs[unit] = run.runs.get(unit, 0) + 1
        # Whatever runs inside another unit may come before that one reads its weights: keep the outer one.
        run.outer.update(run.running)
        run.running.append(unit)

    def end_unit(self, unit: int) -> None:
        run = self._run_of(unit)
        if run is not None and unit in run.running:
            run.running.remove(unit)

    def stalled(self, stall: Stall) -> None:
        """Compute waits for a copy, in the block that runs now."""
        if self._open:
            self._open[-1][1].stalls.append(stall)

    def profile(self, known: Profile) -> Profile:
        """What was recorded. Everything recorded must be over; ``known`` fills what this step has not shown."""
        outline = self._outline
        spent: list[float | None] = [None] * outline.blocks
        inside = 0.0
        for block, run in self._runs:
            if run.end is None:
                continue
            elapsed = self._seconds(run.begin, run.end)
            inside += elapsed
            compute = max(0.0, elapsed - sum(stall() or 0.0 for stall in run.stalls))
            spent[block] = (spent[block] or 0.0) + compute
        order = tuple(dict.fromkeys(block for block, _ in self._runs))
        bandwidth = self._bandwidth()
        return Profile(
            by_kind(outline, spent),
            max(0.0, self._seconds(self._begin, self._end) - inside),
            bandwidth or known.bandwidth,
            known.unit_runs or self._unit_runs(),
            order or known.block_order,
            measured=bandwidth is not None or known.measured,
        )

    def close(self) -> None:
        """Stop timing copies."""
        self._backend.copy_times()

    def _bandwidth(self) -> float | None:
        times = self._backend.copy_times()
        times = [time for time in times if time.nbytes >= LEAST_TIMED_BYTES] or times
        busy = sum(self._seconds(time.begin, time.end) for time in times)
        return sum(time.nbytes for time in times) / busy if busy > 0 else None

    def _seconds(self, begin: Moment, end: Moment) -> float:
        seconds = self._backend.seconds(begin, end)
        assert seconds is not None, "a step is not over"
        return seconds

    def _run_of(self, unit: int) -> _BlockRun | None:
        block = self._outline.unit_block[unit]
        return next((run for number, run in reversed(self._open) if number == block), None)

    def _unit_runs(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Which units run by themselves. A block that did not run is taken to be like others of its kind."""
        outline = self._outline
        shown: dict[int, list[tuple[int, int]]] = {}
        of_block: dict[int, tuple[tuple[int, int], ...]] = {}
        for block, run in self._runs:
            found = [(unit, count) for unit, count in run.runs.items() if unit not in run.outer]
            of_block[block] = tuple(found)
            first = min(outline.block_units[block], default=0)
            shown[outline.block_kind[block]] = [(unit - first, count) for unit, count in found]
        for block, kind in enumerate(outline.block_kind):
            if block not in of_block:
                first = min(outline.block_units[block], default=0)
                of_block[block] = tuple((first + unit, count) for unit, count in shown.get(kind, []))
        return tuple(of_block[block] for block in range(outline.blocks))
