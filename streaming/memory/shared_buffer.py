"""Master copies that processes of one host share (sharing/pages.py): host memory of the arena like any other, but
read-only once it is whole."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from ..errors import SharingError
from ..sharing import pages
from ..sharing.ledger import Kind
from ..sharing.pages import PAGE_BYTES, Draft
from ..sharing.share import NO_SHARE, NoShare
from .arena import Arena
from .host_memory import HostBuffer

# A copy takes whole pages, and the broker a descriptor for it: smaller ones are each process's own.
LEAST_BYTES = PAGE_BYTES

_scratch = threading.local()


class SharedBuffer(HostBuffer):
    """A copy that others may have too: one that is there, or one to be filled.

    It is held until it is closed or freed. While it is filled it has no memory that can be seen.

    Args:
        share: where it comes from, and goes to.
        key: of the copy.
        nbytes: its size.
        descriptor: of a whole copy, which stays the caller's; None to fill one.
        signatures: of the patches in it, by the names of values.

    Attributes:
        seen: what modules may hold, and others write to; None where no patches are in it, and they hold the originals.

    Raises:
        OSError: the system gives no such memory.
    """

    read_only = True

    def __init__(
        self,
        share: NoShare,
        key: bytes,
        nbytes: int,
        descriptor: int | None = None,
        signatures: Mapping[str, object] = MappingProxyType({}),
    ) -> None:
        super().__init__(nbytes, _NOTHING)
        self.key: bytes = key
        self.signatures = dict(signatures)
        self.seen: torch.Tensor | None = None
        self._share = share
        self._draft = Draft(nbytes) if descriptor is None else None
        if descriptor is not None:
            self._map(descriptor, shared=True)
        self._end = self._at_end(share.stop_building if descriptor is None else share.drop)

    def _at_end(self, end: Callable[[bytes], None]) -> weakref.finalize:
        finalizer = weakref.finalize(self, end, self.key)
        finalizer.atexit = False  # The connection ends with the process.
        return finalizer

    def _map(self, descriptor: int, shared: bool) -> None:
        self.memory = _tensor_over(pages.Mapping(descriptor, self.nbytes), self.nbytes)
        if self.signatures:
            self.seen = _tensor_over(pages.Mapping(descriptor, self.nbytes, private=True), self.nbytes)
        self.is_shared = shared

    @property
    def is_there(self) -> bool:
        """Whether it is whole: then it takes no more memory of the machine, whoever maps it."""
        return self._draft is None

    def fill(self, start: int, stop: int, read: Callable[[torch.Tensor], None]) -> None:
        place = _scratch_of(stop - start)
        read(place)
        self.write(memoryview(place.numpy()), start)

    def write(self, data: memoryview, start: int) -> None:
        """Fill it with ``data`` from the byte ``start`` on."""
        assert self._draft is not None
        try:
            self._draft.write(data, start)
        except OSError as error:
            raise SharingError(why_no_memory(error)) from None

    def finish(self, unchanged: bool = True) -> None:
        """It is filled: seal it and give it to the broker, unless its source is not what its key says any more."""
        if self._draft is None:
            return
        try:
            descriptor = self._draft.seal()
        except OSError as error:
            raise SharingError(why_no_memory(error)) from None
        try:
            given = unchanged and self._share.give(self.key, self.nbytes, descriptor)
            if given:
                self._end.detach()
                self._end = self._at_end(self._share.drop)
                self._share.built += 1
            else:
                self._end()
            self._draft = None
            self._map(descriptor, shared=given)
        except OSError as error:
            raise SharingError(why_no_memory(error)) from None
        finally:
            os.close(descriptor)

    def close(self) -> None:
        super().close()
        if self._draft is not None:
            self._draft.close()
        self._end()


_NOTHING = torch.empty(0, dtype=torch.uint8)


def sharing(arena: Arena) -> NoShare:
    """Where the arena's copies may come from, and go to. That its device can page-lock such memory is tried first."""
    share = arena.share
    if not (arena.pin_memory and share.is_on):
        return NO_SHARE
    share.try_out(lambda: _why_not_locked(arena))
    return share if share.is_on else NO_SHARE


def claim_shared(
    arena: Arena, key: bytes, nbytes: int, signatures: Mapping[str, object] = MappingProxyType({})
) -> SharedBuffer | Kind:
    """Return a copy that is there, or one to be filled; ``LATER`` while others fill it, ``REFUSED`` where this process
    must have its own."""
    share = sharing(arena)
    if nbytes < LEAST_BYTES or not share.is_on:
        return Kind.REFUSED
    answer = share.want(key, nbytes)
    if answer.kind not in (Kind.HAVE, Kind.BUILD):
        return answer.kind
    try:
        buffer = SharedBuffer(share, key, nbytes, answer.descriptor, signatures)
    except OSError as error:
        (share.drop if answer.kind is Kind.HAVE else share.stop_building)(key)
        share.give_up(why_no_memory(error))
        return Kind.REFUSED
    finally:
        if answer.descriptor is not None:
            os.close(answer.descriptor)
    if not arena.take_in(buffer):
        buffer.close()
        return Kind.REFUSED
    share.taken += answer.kind is Kind.HAVE
    return buffer


def _why_not_locked(arena: Arena) -> str | None:
    """Why memory of this kind cannot be page-locked for the device; None where it can."""
    try:
        draft = Draft(PAGE_BYTES)
        draft.write(memoryview(bytes(PAGE_BYTES)), 0)
        descriptor = draft.seal()
        try:
            memory = _tensor_over(pages.Mapping(descriptor, PAGE_BYTES), PAGE_BYTES)
        finally:
            os.close(descriptor)
    except OSError as error:
        return why_no_memory(error)
    if (reason := arena.backend.register_read_only(memory)) is not None:
        return f"{arena.backend.name} cannot use memory that is read-only: {reason}"
    arena.backend.unregister(memory.data_ptr())
    return None


def why_no_memory(error: OSError) -> str:
    """Why nothing is shared after such an error."""
    return f"this system gives no memory for it ({error.strerror or error})"


def _tensor_over(mapping: pages.Mapping, nbytes: int) -> torch.Tensor:
    """A uint8 tensor over a mapping, which lives as long as the tensor. Torch does not know whether it is read-only."""
    memory = (ctypes.c_ubyte * nbytes).from_address(mapping.address)
    memory.mapping = mapping  # type: ignore[attr-defined]
    with torch.inference_mode(False):
        return torch.frombuffer(memory, dtype=torch.uint8)


def _scratch_of(nbytes: int) -> torch.Tensor:
    """Memory of this thread's own, as far as possible the same as before: fresh pages take longer than the read."""
    found = getattr(_scratch, "memory", None)
    if found is None or found.nbytes < nbytes:
        found = _scratch.memory = torch.zeros(nbytes, dtype=torch.uint8)
    return found[:nbytes]
