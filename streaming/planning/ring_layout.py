"""Where in the staging memory each segment lies, and which earlier segment must have run before its copy. Pure.

[Note: laps]
Segments lie one behind another, in the order of need, and begin anew at the front when the memory is full: a lap. They
lie in the same places in every step, so that nothing must be created when one is copied. All laps are about equally
long: a segment waits for those of the previous lap whose memory it reuses, and after a short lap these would be
segments that are needed just before it.
"""

from __future__ import annotations

from collections.abc import Sequence

# The length of laps is searched for to 1 / PRECISION of the room.
PRECISION = 1 << 10


def lay_out(sizes: Sequence[int], room: int) -> tuple[int, ...]:
    """Return the first byte of each segment, in as little memory as the fewest possible laps need (Note: laps).

    Args:
        sizes: bytes of the segments in the order of need.
        room: bytes that all of them may take, at least as many as the largest.
    """
    offsets = _in_laps_of(room, sizes)
    laps = offsets.count(0)
    low, high = max(sizes, default=0) - 1, room
    while high - low > max(1, room // PRECISION):
        length = (low + high) // 2
        shorter = _in_laps_of(length, sizes)
        if shorter.count(0) == laps and used_bytes(sizes, shorter) <= length:
            offsets, high = shorter, length
        else:
            low = length
    return offsets


def used_bytes(sizes: Sequence[int], offsets: Sequence[int]) -> int:
    """Return the bytes of memory that segments of these sizes take at these offsets."""
    return max((offset + size for size, offset in zip(sizes, offsets, strict=True)), default=0)


def waited_for(sizes: Sequence[int], offsets: Sequence[int]) -> tuple[int, ...]:
    """Return, for each segment, the number of the last one before it in the same memory: its copy waits for that one.

    Steps follow each other, so that may be a segment of the previous step, with a higher number. For a segment that
    shares its memory with no other it is the segment itself.
    """
    count = len(sizes)
    found = []
    for number in range(count):
        begin, end = offsets[number], offsets[number] + sizes[number]
        others = ((number - distance) % count for distance in range(1, count + 1))
        found.append(next((one for one in others if offsets[one] < end and begin < offsets[one] + sizes[one]), number))
    return tuple(found)


def _in_laps_of(length: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """Laps of at most ``length`` bytes, or of one segment."""
    offsets, end = [], 0
    for size in sizes:
        begin = end if end + size <= length else 0
        offsets.append(begin)
        end = begin + size
    return tuple(offsets)
