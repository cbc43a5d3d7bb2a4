"""Brings weights from where they are, a file or pageable memory, to the device: through a small page-locked ring.

[Note: one order for all copies]
Several threads read ahead, each into chunks of the ring that are its own, and queue the copies out of them. Copies are
queued in the order in which pieces were taken up for reading, and pieces are taken up in the order in which they were
asked for. So the backend carries all copies out in that order, as it does when the thread that runs the model queues
them itself (lane.py, Note: two events guard a slot, 3). Only transfers in the background are overtaken, which is safe
because no other copy has their targets. The reader and the model's thread never queue at the same time: the model's
thread queues only while :attr:`Reader.idle`, and no other thread asks for transfers.
 1. Only its own thread writes to a chunk. The thread takes up a piece for the chunk when the copy of the chunk's
    previous piece is queued, and writes to the chunk when that copy is over (``finish``).
 2. A thread that has read a piece queues it, and every piece behind it that is read, if all pieces before it are
    queued. One thread at a time does that, and the others go on reading (in_order.py, Note: who hands on).
 3. Of the pieces that are not queued, the first was taken up by a thread that had a chunk for it. So it will be read,
    and queued: there is no circular wait.
A separate thread that sends would have to be woken for every piece, and so would a reader that waits for its turn: with
that, 2,900 pieces a second came through, however many threads read (H200, 4 MiB each: 12 GB/s).
A transfer that fails, or is given up, keeps its place in the order; its other pieces are neither read nor copied.

[Note: what the collector may do]
The garbage collector frees an owner on any thread, at any moment: also on a reader's thread that holds a lock of ours,
or one of Python's own. So :meth:`Reader.forsake` waits for no lock without a time limit; it sets a flag. Threads check
the flag at every turn, and now and then while they wait. They end when it is set, and the ring is freed with the last
of them. A thread that has checked just before the flag is set may still queue a copy: it waits for that copy, and holds
target and source until then. Closing the backend, which comes next, waits for copies that were queued earlier.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import wait as wait_for_futures

import torch

from ..devices.backend import Backend
from ..devices.copies import ALIGNMENT, Event
from ..model.contents import ranges, read_range
from ..model.layout import Layout
from ..threads import end_with_process
from .arena import Arena
from .host_memory import HostBuffer
from .in_order import InOrder
from .transfer import Chunk, Load, Move, Piece, Tick, Transfer, TransferAbandonedError, copies_from, wait_for

# How often a waiting thread checks whether it is still wanted.
FORSAKEN_SECONDS = 0.2

# How long the garbage collector waits at most for a copy that is being queued: long enough for any.
FORSAKE_SECONDS = 1.0


class Reader:
    """Reads ahead on ``threads`` threads, or fewer where there are fewer chunks, through a ring of ``chunks`` chunks.

    The ring and the threads exist from the first transfer to :meth:`close`.

    Args:
        backend: the device.
        arena: where the ring's memory comes from.
        threads, chunk_bytes, chunks: see :class:`StreamingConfig`.

    Attributes:
        sent_bytes: bytes whose copies were queued so far; step_bytes: those of them that were not asked for in the
            background.
        drop_behind: have the system forget the parts of files that were read (RAM is short).
        workers: its threads.
    """

    def __init__(self, backend: Backend, arena: Arena, threads: int, chunk_bytes: int, chunks: int) -> None:
        self.sent_bytes = 0
        self.step_bytes = 0
        self._forsaken = False
        self._step_seconds = 0.0
        self.drop_behind = False
        self._backend = backend
        self._arena = arena
        self._threads = min(threads, chunks)
        self._chunk_bytes = max(ALIGNMENT, chunk_bytes)
        self._chunks = chunks
        self._ring: HostBuffer | None = None
        self._urgent: deque[Piece] = deque()
        self._background: deque[Piece | None] = deque()
        self._in_order: InOrder[Piece] = InOrder(_of_one_transfer)
        self._asked = threading.Condition()
        self._counting = threading.Lock()
        self._pending: set[Transfer] = set()
        self._for_steps = 0
        self._since = 0.0
        self.workers: list[threading.Thread] = []

    @property
    def idle(self) -> bool:
        """Whether every transfer is queued as a whole, or has failed."""
        return not self._pending

    @property
    def step_seconds(self) -> float:
        """Seconds so far in which a transfer was under way that was not asked for in the background."""
        with self._counting:
            return self._step_seconds + (time.perf_counter() - self._since if self._for_steps else 0.0)

    @property
    def ring_bytes(self) -> int:
        """Host memory of the ring; 0 while there is none."""
        ring = self._ring  # Read once: other threads ask for the status.
        return ring.nbytes if ring is not None else 0

    @property
    def missing_bytes(self) -> int:
        """Host memory that the ring will take when it is made; 0 while there is one."""
        return 0 if self._ring is not None else self._chunk_bytes * self._chunks

    def transfer(
        self, parts: Sequence[Load | Move], after: Sequence[Event], fine: bool = False, background: bool = False
    ) -> Transfer:
        """Bring ``parts`` to the device, behind all earlier transfers of the same kind (background or not).

        Args:
            parts: what goes where.
            after: the copies start when all of these events have happened.
            fine: cut copies into fine pieces (backend.py, Note: copies take turns).
            background: transfers without this go before it.
        """
        self.open()
        transfer = Transfer(after, fine, background)
        pieces = [piece for part in parts for piece in self._pieces(transfer, part)]
        if not pieces:
            transfer.queued.set_result(self._backend.mark())
            return transfer
        pieces[-1].last = True
        with self._counting:
            if not self._for_steps:
                self._since = time.perf_counter()
            self._pending.add(transfer)
            self._for_steps += not background
        with self._asked:
            (self._background if background else self._urgent).extend(pieces)
            self._asked.notify(len(pieces))
        return transfer

    def wait(self, transfer: Transfer, tick: Tick) -> Event:
        """Return the event behind ``transfer`` when its copies are queued. ``tick`` is called meanwhile, and may raise.

        Raises:
            CheckpointError: the file could not be read.
        """
        try:
            return wait_for(transfer.queued, tick)
        except BaseException:
            transfer.forget_error()
            raise

    def flush(self) -> None:
        """Wait until every transfer is queued, or has failed: as long as it takes to read what fits into the slots."""
        wait_for_futures([transfer.queued for transfer in list(self._pending)])

    def abandon(self) -> None:
        """Give up what is not queued yet, and return when nothing is on its way any more.

        Copies that are queued already still take place: synchronize the backend before their targets are freed.
        """
        with self._in_order.pause(self._send_together), self._counting:
            pending = list(self._pending)
            for transfer in pending:
                transfer.abandoned = True
        wait_for_futures([transfer.queued for transfer in pending])

    def close(self) -> None:
        """Abandon everything, end the threads and give the ring's memory back. The reader can be used again."""
        if self._ring is None:
            return
        self.abandon()
        self._stop_threads()
        for worker in self.workers:
            worker.join()
        self.workers.clear()
        self._background.clear()  # Stop marks that no thread took, if this was interrupted before.
        self._backend.synchronize()  # Race: copies out of the ring may still be under way.
        self._arena.release(self._ring)
        self._ring = None

    def forsake(self) -> None:
        """As :meth:`close`, for an owner that is garbage collected (Note: what the collector may do)."""
        self._forsaken = True
        self._in_order.wait_a_moment(FORSAKE_SECONDS)

    def _stop_threads(self) -> None:
        """Have the threads end after all that was asked for."""
        with self._asked:
            self._background.extend([None] * len(self.workers))
            self._asked.notify_all()

    # -- pieces --------------------------------------------------------------------------------------------------

    def _pieces(self, transfer: Transfer, part: Load | Move) -> list[Piece]:
        if isinstance(part, Move) and part.pinned:
            return [Piece(transfer, part.target, part.source, None)]
        if isinstance(part, Move):
            starts = range(0, part.target.nbytes, self._chunk_bytes)
            spans = [(start, min(start + self._chunk_bytes, part.target.nbytes)) for start in starts]
            return [
                Piece(transfer, part.target[start:stop], None, copies_from(part.source[start:stop]))
                for start, stop in spans
            ]
        return [
            Piece(transfer, part.target[start:stop], None, self._reads(part.layout, start, stop))
            for start, stop in ranges(part.layout, self._chunk_bytes)
        ]

    def _reads(self, layout: Layout, start: int, stop: int) -> Callable[[torch.Tensor], None]:
        return lambda chunk: read_range(layout, start, stop, chunk, self.drop_behind)

    # -- the threads ---------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Make the ring and start the threads; :meth:`transfer` does it too."""
        if self._ring is not None:
            return
        ring = self._arena.allocate(self._chunk_bytes * self._chunks)
        try:
            ring.memory.fill_(0)  # Touched pages are page-locked several times faster.
            self._arena.lock(ring)
        except BaseException:
            self._arena.release(ring)
            raise
        self._ring = ring
        end_with_process(self)
        chunks = [Chunk(memory) for memory in ring.memory.split(self._chunk_bytes)]
        try:
            for number in range(self._threads):
                own = chunks[number :: self._threads]
                worker = threading.Thread(target=self._read_ahead, args=[own], name="weightstream-read", daemon=True)
                worker.start()
                self.workers.append(worker)
        except BaseException:
            self.close()
            raise

    def _read_ahead(self, chunks: Sequence[Chunk]) -> None:
        for chunk in itertools.cycle(chunks):
            # A call of its own for each piece, so that a waiting thread keeps no memory of the previous one alive.
            if not self._read_next(chunk):
                return

    def _read_next(self, chunk: Chunk) -> bool:
        while not chunk.free.wait(FORSAKEN_SECONDS):
            if self._forsaken:
                return False
        piece = self._take()
        if piece is None:
            return False
        try:
            if piece.fill is not None:
                self._read(piece, chunk)
        except BaseException as error:
            piece.transfer.fail(error)
        self._in_order.finish(piece, self._send_together)
        del piece  # An error refers to this frame, and the transfer to the error.
        return True

    def _take(self) -> Piece | None:
        """Return the next piece, in the order in which they are sent; None ends the thread."""
        with self._asked:
            while not (self._urgent or self._background or self._forsaken):
                self._asked.wait(FORSAKEN_SECONDS)
            if self._forsaken:
                self._urgent.clear()  # Pieces refer to the reader.
                self._background.clear()
                return None
            piece = self._urgent.popleft() if self._urgent else self._background.popleft()
            if piece is not None:
                self._in_order.begin(piece)
            return piece

    def _read(self, piece: Piece, chunk: Chunk) -> None:
        piece.chunk = chunk
        chunk.free.clear()
        if chunk.sent is not None:
            self._backend.finish(chunk.sent)  # Race: the copy out of this chunk may still read it.
            chunk.sent = None
        if not piece.transfer.stopped:
            piece.fill(chunk.memory[: piece.target.nbytes])

    def _send_together(self, pieces: list[Piece]) -> None:
        """Queue the copies of pieces of one transfer."""
        transfer = pieces[0].transfer
        try:
            if not (transfer.stopped or self._forsaken):
                self._send(pieces, transfer)
        except BaseException as error:
            transfer.fail(error)
        last = pieces[-1].last
        while pieces:  # An error refers to this frame, and the transfer to the error: the frame must hold no piece.
            if (chunk := pieces.pop().chunk) is not None:
                chunk.free.set()
            del chunk
        if last:
            self._finish(transfer)

    def _send(self, pieces: list[Piece], transfer: Transfer) -> None:
        event = self._backend.copy([piece.pair for piece in pieces], transfer.after, transfer.fine)
        transfer.events.append(event)
        transfer.after = ()
        for piece in pieces:
            if piece.chunk is not None:
                piece.chunk.sent = event
            self.sent_bytes += piece.target.nbytes
            self.step_bytes += 0 if transfer.background else piece.target.nbytes
        if self._forsaken:
            self._backend.finish(event)  # Note: what the collector may do.

    def _finish(self, transfer: Transfer) -> None:
        with self._counting:
            self._pending.discard(transfer)
            self._for_steps -= not transfer.background
            if not (transfer.background or self._for_steps):
                self._step_seconds += time.perf_counter() - self._since
        if transfer.error is not None:
            transfer.queued.set_exception(transfer.error)
        elif transfer.abandoned or self._forsaken:
            transfer.queued.set_exception(TransferAbandonedError("a transfer was given up"))
        else:
            transfer.queued.set_result(self._backend.all_of(transfer.events))


def _of_one_transfer(first: Piece, second: Piece) -> bool:
    return first.transfer is second.transfer
