"""Which pages of an address range are in memory: bookkeeping alone, the driver maps them (cuda_pages.py).

[Note: shared pages]
A driver gives memory in whole pages (2 MiB with CUDA), and units' weights are of any size. So a buffer begins right
behind the one before it, and both share the page on their border. The pages that one buffer fills alone, its inner
ones, are mapped at once and unmapped with it. A border page is mapped by itself, and unmapped with the last buffer that
touches it. So the mapped pages are those that some buffer touches, and around each gap at most two are partly unused.
Addresses are not given out again, except those of a range that was returned as a whole: there are plenty, and so the
use of an address that is gone is an error instead of a wrong weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from .copies import ALIGNMENT


class OutOfPagesError(Exception):
    """The device has no memory for a page."""


class PageDriver(Protocol):
    """Maps pages. Addresses and sizes are whole pages.

    Attributes:
        page_bytes: the size of one; a multiple of :data:`ALIGNMENT`.
    """

    page_bytes: int

    def reserve(self, nbytes: int) -> int:
        """Reserve addresses without memory; return the first, which begins a page."""

    def unreserve(self, address: int, nbytes: int) -> None:
        """Return what :meth:`reserve` has reserved. Nothing is mapped there."""

    def map(self, address: int, nbytes: int) -> None:
        """Map new memory there.

        Raises:
            OutOfPagesError: there is none; nothing has changed then.
        """

    def unmap(self, address: int, nbytes: int) -> None:
        """Unmap and free exactly what one :meth:`map` has mapped."""


@dataclass(eq=False)
class _Range:
    """Reserved addresses: all of them, where the next buffer may begin, and how many buffers there are."""

    span: range
    next: int
    buffers: int = 0


class _Buffer(NamedTuple):
    span: range
    home: _Range


class Pages:
    """Allocates addresses with memory behind them (Note: shared pages). Not thread-safe.

    Args:
        driver: of one device.
        range_bytes: addresses that are reserved at once; no buffer may be larger.

    Attributes:
        mapped_bytes: of all pages that are in memory.
        buffer_bytes: of all buffers.
    """

    def __init__(self, driver: PageDriver, range_bytes: int) -> None:
        self._driver = driver
        self._page = driver.page_bytes
        self._range_bytes = self._up(range_bytes)
        self._range: _Range | None = None
        self._buffers: dict[int, _Buffer] = {}
        self._borders: dict[int, int] = {}
        self.mapped_bytes = 0
        self.buffer_bytes = 0

    def allocate(self, nbytes: int) -> int:
        """Return the address of a new buffer of ``nbytes``, at least 1.

        Raises:
            OutOfPagesError: the device has no room, or the buffer is too large.
        """
        if nbytes > self._range_bytes:
            raise OutOfPagesError
        home = self._range_with(nbytes)
        begin = self._begin(home)
        span = range(begin, begin + nbytes)
        self._map(span)
        home.next = span.stop
        home.buffers += 1
        self._buffers[begin] = _Buffer(span, home)
        self.buffer_bytes += nbytes
        return begin

    def size(self, address: int) -> int:
        """Return the bytes of the buffer that begins at ``address``; 0 if none does."""
        buffer = self._buffers.get(address)
        return 0 if buffer is None else len(buffer.span)

    def free(self, address: int) -> None:
        """Free the buffer at ``address``, and the pages that no other buffer touches."""
        span, home = self._buffers.pop(address)
        self.buffer_bytes -= len(span)
        home.buffers -= 1
        inner, borders = self._cut(span)
        gone = [(inner.start, len(inner))] if inner else []
        for page in borders:
            self._borders[page] -= 1
            if not self._borders[page]:
                del self._borders[page]
                gone.append((page, self._page))
        for piece in gone:
            self._unmap(*piece)
        if home is not self._range:
            self._unreserve_empty(home)

    def _range_with(self, nbytes: int) -> _Range:
        """Return a range with room for ``nbytes``; the previous range is returned to the driver if it is empty."""
        old = self._range
        if old is not None and self._begin(old) + nbytes <= old.span.stop:
            return old
        start = self._driver.reserve(self._range_bytes)
        self._range = _Range(range(start, start + self._range_bytes), start)
        if old is not None:
            self._unreserve_empty(old)
        return self._range

    def _unreserve_empty(self, home: _Range) -> None:
        if not home.buffers:
            self._driver.unreserve(home.span.start, len(home.span))

    def _begin(self, home: _Range) -> int:
        """Return where the next buffer begins: on the last page if a buffer touches that, else on a new one."""
        begin = home.next + -home.next % ALIGNMENT
        return begin if self._down(begin) in self._borders else self._up(home.next)

    def _map(self, span: range) -> None:
        inner, borders = self._cut(span)
        wanted = [(page, self._page) for page in borders if page not in self._borders]
        if inner:
            wanted.append((inner.start, len(inner)))
        done: list[tuple[int, int]] = []
        try:
            for address, nbytes in wanted:
                self._driver.map(address, nbytes)
                done.append((address, nbytes))
                self.mapped_bytes += nbytes
        except BaseException:
            for piece in done:
                self._unmap(*piece)
            raise
        for page in borders:
            self._borders[page] = self._borders.get(page, 0) + 1

    def _unmap(self, address: int, nbytes: int) -> None:
        self._driver.unmap(address, nbytes)
        self.mapped_bytes -= nbytes

    def _cut(self, span: range) -> tuple[range, list[int]]:
        """Return the pages that ``span`` fills, and the first bytes of those that it fills in part."""
        inner = range(self._up(span.start), self._down(span.stop))
        touched = dict.fromkeys((self._down(span.start), self._down(span.stop - 1)))
        return inner, [page for page in touched if page not in inner]

    def _down(self, address: int) -> int:
        return address - address % self._page

    def _up(self, address: int) -> int:
        return address + -address % self._page
