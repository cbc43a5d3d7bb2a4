"""Where a model's weights come from: the arena, the reader and the builder, and how far loading is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..config import StreamingConfig
from ..devices.backend import Backend
from ..sharing.share import NoShare
from .arena import Arena
from .builder import Builder
from .host_memory import PinBudget, PinOwner
from .reader import Reader
from .unit_copies import UnitCopies


class Progress(NamedTuple):
    """How much of a model has been read since it was loaded.

    Attributes:
        done_bytes, total_bytes: bytes read so far, and in all, of what its plan needs on the device in a step.
        seconds: since loading began.
    """

    done_bytes: int
    total_bytes: int
    seconds: float


# Called now and then, on the thread that loads or runs the model; with None while nothing is being loaded. It may raise
# to cancel.
Watch = Callable[[Progress | None], None]


class Supply:
    """Brings the weights of one model into memory.

    Args:
        backend: the device.
        config: settings.
        largest_bytes: bytes of the largest unit.
        pins: page-locked memory that this model shares with others.
        watch: is called with the progress of loading.
        share: where copies come from that others have too; None takes that of ``pins``.

    Attributes:
        arena: host memory for master copies.
        reader: brings to the device what has no page-locked master copy.
        builder: makes master copies.
    """

    def __init__(
        self,
        backend: Backend,
        config: StreamingConfig,
        largest_bytes: int,
        pins: PinBudget | None,
        watch: Watch,
        share: NoShare | None = None,
    ) -> None:
        chunk_bytes = min(config.chunk_bytes, largest_bytes)
        self.arena = Arena(backend, config.pin_memory, pins, config.pinned_limit, share)
        self.reader = Reader(backend, self.arena, config.read_threads, chunk_bytes, config.chunks)
        self.builder = Builder(self.arena, config.build_threads)
        self._threads = config.threads
        self._watch = watch
        self._total = 0
        self._started = 0.0
        self._before = 0
        self._moves = 0

    # -- progress ------------------------------------------------------------------------------------------------

    def begin(self, nbytes: int) -> None:
        """A model of which ``nbytes`` must be read is loaded."""
        self._total = nbytes
        self._started = time.monotonic()
        self._before = self._read_bytes

    def tick(self) -> None:
        """Report progress. Code that waits for weights calls this repeatedly; it raises when loading was cancelled."""
        self._watch(self._progress() if self._total else None)

    def arrived(self) -> None:
        """A step has run, so everything was read: loading is over."""
        if self._total:
            progress = self._progress()._replace(done_bytes=self._total)
            self._total = 0
            self._watch(progress)

    def _progress(self) -> Progress:
        done = min(self._total, self._read_bytes - self._before)
        return Progress(done, self._total, time.monotonic() - self._started)

    @property
    def _read_bytes(self) -> int:
        """Bytes that were read so far, by the reader and for master copies that are needed."""
        return self.reader.sent_bytes + self.builder.needed_bytes

    # -- master copies -------------------------------------------------------------------------------------------

    def build(self, copies: Sequence[UnitCopies], owner: PinOwner) -> None:
        """Build the master copies of these units; other models may lose theirs. The builder must be idle."""
        self._make_room(copies, owner)
        self._moves = self.arena.share.moves()
        self.builder.build(copies, self._threads, self.tick)

    @property
    def waits_for_others(self) -> bool:
        """Whether all that is missing is built by others, which are not done yet."""
        return self.builder.left > 0 and self.arena.share.moves() == self._moves

    def build_needed(self, copies: Sequence[UnitCopies]) -> None:
        """Build the master copies of these units, which other code will write to. The builder must be idle."""
        self.builder.build(copies, self._threads, self.tick, needed=True)

    def build_behind(self, copies: Sequence[UnitCopies], owner: PinOwner) -> None:
        """As :meth:`build`, but without waiting for it."""
        self._make_room(copies, owner)
        self.builder.start(copies)

    def _make_room(self, copies: Sequence[UnitCopies], owner: PinOwner) -> None:
        missing = [unit for unit in copies if not unit.master_copy.nbytes]  # Some are begun.
        there = [unit for unit in missing if unit.master_copy.is_shared_elsewhere(self.arena)]
        needed, found = (sum(unit.unit.nbytes for unit in units) for units in (missing, there))
        if self.arena.share.is_local:
            needed, found = needed - found, 0  # They are counted already.
        self.make_room(needed, owner, found)

    def make_room(self, needed: int, owner: PinOwner, there: int = 0) -> None:
        """Have other models give up page-locked memory until ``needed`` bytes fit, as far as they can.

        Args:
            there: so many of them are in memory already, as other processes have them.
        """
        budget = self.arena.budget
        self.reader.drop_behind = self.builder.drop_behind = not budget.has_room(needed - there)
        if needed:
            budget.make_room(needed, owner, there)

    def halt(self) -> None:
        """Give up what is under way. Copies that are queued already still take place."""
        self.builder.stop()
        self.reader.abandon()

    def close(self) -> None:
        self.builder.stop()
        self.reader.close()

    def forsake(self) -> None:
        """As :meth:`close`, for an owner that is garbage collected, on any thread."""
        self.builder.forsake()
        self.reader.forsake()
