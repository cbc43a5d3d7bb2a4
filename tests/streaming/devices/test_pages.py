"""Buffers share the pages on their borders; no page is mapped that nobody touches."""

from __future__ import annotations

import itertools
import random

import pytest
from page_drivers import RamPages
from weightstream.streaming.devices.pages import ALIGNMENT, OutOfPagesError, Pages

PAGE = 2048


class Checked:
    """Pages, of which everything is checked after each step.

    Attributes:
        live: sizes of buffers by their addresses.
    """

    def __init__(self, range_bytes: int = 1 << 20, free_pages: int = 1 << 30) -> None:
        self.driver = RamPages(PAGE, free_pages)
        self.pages = Pages(self.driver, range_bytes)
        self.live: dict[int, int] = {}
        self._given: set[int] = set()

    def allocate(self, nbytes: int) -> int:
        address = self.pages.allocate(nbytes)
        assert address % ALIGNMENT == 0
        assert address not in self._given, "an address that is gone was given out again"
        self._given.add(address)
        self.live[address] = nbytes
        self.check()
        return address

    def free(self, address: int) -> None:
        self.pages.free(address)
        del self.live[address]
        self.check()

    def check(self) -> None:
        spans = sorted(self.live.items())
        gaps = 1
        for (start, nbytes), (behind, _) in itertools.pairwise(spans):
            assert start + nbytes <= behind, "two buffers overlap"
            gaps += behind - (start + nbytes) >= ALIGNMENT
        touched = {page for start, nbytes in spans for page in range(start - start % PAGE, start + nbytes, PAGE)}
        assert self.driver.mapped_pages == touched
        assert self.pages.mapped_bytes == len(touched) * PAGE
        assert self.pages.buffer_bytes == sum(self.live.values())
        assert self.pages.mapped_bytes - self.pages.buffer_bytes < 2 * PAGE * gaps + ALIGNMENT * len(spans)

    def free_all(self) -> None:
        for address in list(self.live):
            self.free(address)
        assert self.driver.mapped == {}
        assert len(self.driver.reserved) <= 1


SIZES = (1, 512, 1500, PAGE, 2 * PAGE + 700)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_every_order_of_three_buffers_and_one_more(order: tuple[int, ...]) -> None:
    for sizes in itertools.product(SIZES, repeat=4):
        for moment in range(3):
            checked = Checked(1 << 15)
            buffers = [checked.allocate(nbytes) for nbytes in sizes[:3]]
            for number, which in enumerate(order):
                if number == moment:
                    checked.allocate(sizes[3])
                checked.free(buffers[which])
            checked.free_all()


@pytest.mark.parametrize("seed", range(20))
def test_many_buffers_that_come_and_go(seed: int) -> None:
    chance = random.Random(seed)
    checked = Checked(range_bytes=40 * PAGE, free_pages=100)
    refused = 0
    for _ in range(400):
        if checked.live and chance.random() < 0.4:
            checked.free(chance.choice(list(checked.live)))
            continue
        try:
            checked.allocate(chance.choice([chance.randint(1, 3 * PAGE), PAGE, chance.randint(1, 9 * PAGE)]))
        except OutOfPagesError:
            refused += 1
            checked.check()
    assert refused > 0
    checked.free_all()
    assert checked.driver.free_pages == 100


def test_neighbours_share_a_page() -> None:
    checked = Checked()
    first = checked.allocate(PAGE + 512)
    second = checked.allocate(PAGE)
    assert second == first + PAGE + 512
    assert checked.pages.mapped_bytes == 3 * PAGE
    checked.free(first)
    assert checked.pages.mapped_bytes == 2 * PAGE
    checked.free(second)
    assert checked.pages.mapped_bytes == 0


def test_a_buffer_without_a_neighbour_begins_a_page() -> None:
    checked = Checked()
    checked.free(checked.allocate(PAGE + 512))
    assert checked.allocate(PAGE) % PAGE == 0
    assert checked.pages.mapped_bytes == PAGE


def test_the_pages_of_one_buffer_are_mapped_at_once() -> None:
    checked = Checked()
    checked.allocate(512)
    before = checked.driver.maps
    checked.allocate(9 * PAGE)
    assert checked.driver.maps - before == 2, "its inner pages, and the border behind it"


def test_what_fails_half_way_leaves_nothing() -> None:
    """The inner pages are the second thing to be mapped, behind the border."""
    checked = Checked(free_pages=2)
    checked.allocate(512)
    with pytest.raises(OutOfPagesError):
        checked.allocate(4 * PAGE)
    checked.check()
    checked.allocate(PAGE)
    checked.free_all()


@pytest.mark.parametrize("nth", range(2))
def test_an_error_half_way_leaves_nothing(nth: int) -> None:
    checked = Checked()
    checked.allocate(PAGE + 512)
    calls = itertools.count()

    def fail(address: int, nbytes: int) -> None:
        if next(calls) == nth:
            raise RuntimeError("the driver is ill")

    checked.driver.before_map = fail
    with pytest.raises(RuntimeError, match="ill"):
        checked.allocate(2 * PAGE)
    checked.check()
    checked.allocate(2 * PAGE)
    checked.free_all()


def test_a_range_that_is_used_up_goes_back_with_its_last_buffer() -> None:
    checked = Checked(range_bytes=4 * PAGE)
    first = checked.allocate(3 * PAGE)
    second = checked.allocate(3 * PAGE)
    assert len(checked.driver.reserved) == 2
    checked.free(first)
    assert len(checked.driver.reserved) == 1
    checked.free(second)
    assert len(checked.driver.reserved) == 1, "the next buffer has room in this one"
    checked.allocate(PAGE)
    assert len(checked.driver.reserved) == 1
    checked.free_all()
    checked.allocate(2 * PAGE)
    assert len(checked.driver.reserved) == 1, "the one before was empty when it was used up"


def test_a_buffer_that_ends_with_the_range_has_room() -> None:
    checked = Checked(range_bytes=4 * PAGE)
    checked.allocate(PAGE + 512)
    checked.allocate(3 * PAGE - 512)
    assert len(checked.driver.reserved) == 1


def test_what_is_larger_than_a_range_has_no_room() -> None:
    checked = Checked(range_bytes=4 * PAGE)
    checked.allocate(4 * PAGE)
    with pytest.raises(OutOfPagesError):
        checked.allocate(4 * PAGE + 1)


def test_what_is_dropped_between_others_is_free_for_anybody() -> None:
    """Sizes are FLUX's units, in pages of 2 MiB; the memory of every third goes back but for its two borders."""
    page = 1 << 21
    driver = RamPages(page)
    driver.map = lambda address, nbytes: None
    driver.unmap = lambda address, nbytes: None
    driver.reserve = lambda nbytes: page
    pages = Pages(driver, 1 << 40)
    units = [18_882_560, 56_647_680, 113_283_072, 132_157_440, 9_216] * 20
    buffers = [pages.allocate(nbytes) for nbytes in units]
    assert pages.mapped_bytes - sum(units) < page + len(units) * ALIGNMENT
    before = pages.mapped_bytes
    dropped = buffers[::3]
    for address in dropped:
        pages.free(address)
    assert before - pages.mapped_bytes > sum(units[::3]) - len(dropped) * 2 * page
