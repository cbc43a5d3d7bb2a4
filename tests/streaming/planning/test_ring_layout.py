from __future__ import annotations

import itertools
import math

from weightstream.streaming.planning.ring_layout import lay_out, used_bytes, waited_for


def test_every_segment_has_a_place_and_laps_are_as_few_as_there_can_be() -> None:
    for count in range(1, 6):
        for sizes in itertools.product(range(1, 5), repeat=count):
            for room in range(max(sizes), sum(sizes) + 2):
                offsets = lay_out(sizes, room)
                assert used_bytes(sizes, offsets) <= room
                assert offsets[0] == 0
                for before, (offset, end) in enumerate(zip(offsets[1:], ends(sizes, offsets), strict=False)):
                    assert offset in (0, end), (sizes, room, before)
                assert offsets.count(0) == fewest_laps(sizes, room)


def ends(sizes: tuple[int, ...], offsets: tuple[int, ...]) -> list[int]:
    return [offset + size for offset, size in zip(offsets, sizes, strict=True)]


def fewest_laps(sizes: tuple[int, ...], room: int) -> int:
    """By trying all ways to cut."""
    for laps in range(1, len(sizes) + 1):
        for cuts in itertools.combinations(range(1, len(sizes)), laps - 1):
            bounds = (0, *cuts, len(sizes))
            if all(sum(sizes[begin:end]) <= room for begin, end in itertools.pairwise(bounds)):
                return laps
    raise AssertionError("a segment is larger than the room")


def test_no_more_memory_is_used_than_laps_of_one_length_need() -> None:
    sizes = [7, 3, 5, 1, 6, 2] * 20
    for room in range(7, 200):
        offsets = lay_out(sizes, room)
        laps = offsets.count(0)
        assert used_bytes(sizes, offsets) <= math.ceil(sum(sizes) / laps) + max(sizes)


def test_nothing_streams_through_nothing() -> None:
    assert lay_out([], 0) == ()
    assert used_bytes([], ()) == 0
    assert waited_for([], ()) == ()


def test_a_segment_waits_for_the_last_one_that_lay_in_its_place() -> None:
    for count in range(1, 6):
        for sizes in itertools.product(range(1, 4), repeat=count):
            for room in range(max(sizes), sum(sizes) + 1):
                offsets = lay_out(sizes, room)
                for number, last in enumerate(waited_for(sizes, offsets)):
                    between = [(last + distance) % count for distance in range(1, (number - last - 1) % count + 1)]
                    assert meet(sizes, offsets, number, last)
                    assert not any(meet(sizes, offsets, number, other) for other in between)


def meet(sizes: tuple[int, ...], offsets: tuple[int, ...], one: int, other: int) -> bool:
    mine, its = (set(range(offsets[each], offsets[each] + sizes[each])) for each in (one, other))
    return bool(mine & its)
