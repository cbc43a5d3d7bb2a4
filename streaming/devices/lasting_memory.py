"""Device memory for what stays, in pages of its own instead of torch's allocator.

[Note: weights in pages]
torch's allocators keep memory in large pieces: the driver's pool behind cudaMallocAsync grows by 32 MiB. Residents are
made and dropped whenever the plan changes, and what a dropped one left between two that stay was in unusable pieces:
0.4 to 1.1 GB of FLUX in 16 GB. In pages (pages.py) all of it goes back to the driver. So does the memory of slots and
that to unpack in: made anew with another plan in torch's memory, they left up to 80 MB more that torch could not give
back, and the next prompt had to plan with less (FLUX in 8 GB). What torch has is activations alone. Pages can be
reached by their own device only, so slots that other GPUs copy into stay with torch (feeder.py).

[Note: memory that goes later]
torch frees behind the kernels of a stream; a page that is unmapped is gone at once, also for kernels that read it. And
the last reference to a buffer may be dropped anywhere: on any thread, in a garbage collection, while a lock is held.
 1. The finalizer of a buffer only puts its address in a queue, which takes no lock and waits for nothing.
 2. The queue is processed where memory is allocated or given back, or free memory is read (``Backend.memory``), and
    only behind a synchronize of the whole device, because streams of other code may read weights too. If nothing was
    dropped, this costs a look at an empty queue.
 3. Addresses are taken out of the queue before the synchronize: a buffer whose address comes into it meanwhile may have
    been read by kernels that were launched after the synchronize began.
 4. After a model was dropped without unloading, there may be no further such call. Its buffers are orphans once its
    backend is closed: the thread that drops one processes the queue, unless that is being done already.
torch's ``record_stream`` knows no such memory, and with cudaMallocAsync raises; nothing here or in the host calls it on
weights, and 2 makes it needless.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

from .pages import OutOfPagesError, PageDriver, Pages

logger = logging.getLogger(__name__)


class PageCounts(NamedTuple):
    """Bytes of one device: of buffers that are referred to, and of all pages that are in memory."""

    used: int = 0
    mapped: int = 0


class Memory:
    """A buffer's memory, as ``torch.as_tensor`` takes it: torch keeps this object as long as any view of it."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.address = address
        self.nbytes = nbytes
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "stream": None,
            "version": 3,
        }


class LastingMemory:
    """Buffers of one device in pages of its own (Note: weights in pages), for every model in the process.

    Args:
        driver: of the device.
        range_bytes: see :class:`Pages`.
        as_tensor: makes a uint8 tensor of a :class:`Memory`, which the tensor keeps alive.
        synchronize: waits for everything that was launched on the device.

    Attributes:
        works: False once the driver has refused something; existing buffers stay, and none are added.
    """

    def __init__(
        self,
        driver: PageDriver,
        range_bytes: int,
        as_tensor: Callable[[Memory], torch.Tensor],
        synchronize: Callable[[], None],
    ) -> None:
        self._pages = Pages(driver, range_bytes)
        self._as_tensor = as_tensor
        self._synchronize = synchronize
        self._lock = threading.RLock()
        self._busy = False
        self._gone: deque[int] = deque()
        self._orphans: set[int] = set()
        self.works = True

    def allocate(self, nbytes: int) -> torch.Tensor | None:
        """Return a uint8 buffer of ``nbytes``, at least 1; None if there is no room, or the driver does not work."""
        with self._turn() as ours:
            if ours:
                self._work_off()
            address = self._try_pages(nbytes) if ours else None
        if address is None:
            return None
        memory = Memory(address, nbytes)
        weakref.finalize(memory, self._let_go, address).atexit = False  # The pages go with the process.
        try:
            with torch.inference_mode(False):
                return self._as_tensor(memory)
        except RuntimeError as error:  # torch makes no tensor of it: it may have been built without numpy.
            self._stop(error)
            return None

    def give_back(self) -> None:
        """Free dropped buffers (Note: memory that goes later); waits for the device if there are any."""
        if self._gone:
            with self._turn() as ours:
                if ours:
                    self._work_off()

    def orphan(self, addresses: Iterable[int]) -> None:
        """Make the buffers at these addresses orphans (Note: memory that goes later); other addresses are ignored."""
        for address in addresses:
            if self._pages.size(address):
                self._orphans.add(address)

    def counts(self) -> PageCounts:
        """Return the bytes in use and mapped. This takes no lock, so the two may differ by what happens meanwhile."""
        dropped = sum(map(self._pages.size, tuple(self._gone)))
        return PageCounts(self._pages.buffer_bytes - dropped, self._pages.mapped_bytes)

    def _try_pages(self, nbytes: int) -> int | None:
        if not self.works:
            return None
        try:
            return self._pages.allocate(nbytes)
        except OutOfPagesError:
            return None
        except RuntimeError as error:
            self._stop(error)
            return None

    def _let_go(self, address: int) -> None:
        """The last reference was dropped, on whatever thread."""
        self._gone.append(address)
        if address not in self._orphans or sys.is_finalizing():
            return
        with self._turn(wait=False) as ours:
            try:
                if ours:
                    self._work_off()
            except RuntimeError as error:  # A finalizer cannot raise it, and the next use of the device does.
                logger.debug("the device has failed before memory could be given back: %s", error)

    @contextlib.contextmanager
    def _turn(self, wait: bool = True) -> Iterator[bool]:
        """Lock the account for this call while this lasts; yields whether that worked.

        It does not while another thread has the account, unless we ``wait``, nor if this thread has it already: a
        garbage collection in the middle of its work may end a model.
        """
        if not self._lock.acquire(blocking=wait):
            yield False
            return
        ours, self._busy = not self._busy, True
        try:
            yield ours
        finally:
            self._busy = not ours
            self._lock.release()

    def _work_off(self) -> None:
        while self._gone:  # An orphan that comes into the queue meanwhile is left to this call.
            self._work_off_what_is_there()

    def _work_off_what_is_there(self) -> None:
        gone = [self._gone.popleft() for _ in range(len(self._gone))]
        try:
            self._synchronize()  # Race: kernels may still read memory without references.
        except BaseException:
            self._gone.extend(gone)
            raise
        self._orphans.difference_update(gone)
        for address in gone:
            try:
                self._pages.free(address)
            except RuntimeError as error:
                self._stop(error)

    def _stop(self, error: RuntimeError) -> None:
        if self.works:
            # As text: a log record that is kept would keep the error's frames, and with them the buffer.
            logger.warning("weights get their memory from torch from now on: %s", str(error))
        self.works = False
