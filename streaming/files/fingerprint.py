"""What tells the contents of one checkpoint file from those of another, without reading all of it.

[Note: touched is not changed]
Programs that synchronise, copy back or index files set their time of change and leave their bytes. Which happened
cannot be asked of the system, so when the time is another, a fingerprint is taken once more: size, header, and bytes at
the begin, in the middle and at the end of tensors, of all of them in a file of up to 100. Another training of a model
differs nearly everywhere. What escapes it, as a few numbers written between those places, is not mixed with what was
there before: when the model is loaded next, all copies are made anew (``Streamer.refresh``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

from .header import Entry

# Tensors whose bytes are looked at, evenly spread over a file, and how many bytes at a place. Reads of a file that is
# not in memory take as long as a disk needs to find 300 places: some 30 ms on flash memory, 2 s on a turning disk.
SAMPLED_TENSORS = 100
SAMPLE_BYTES = 64


def fingerprint(read: Callable[[int, int], bytes], nbytes: int, header_bytes: int, entries: Iterable[Entry]) -> bytes:
    """A digest of a file's contents.

    Args:
        read: gives so many bytes from this offset, or fewer where there are no more.
        nbytes: size of the file.
        header_bytes: how many at its begin are no tensors.
        entries: the tensors.
    """
    digest = hashlib.blake2b(nbytes.to_bytes(8, "little"), digest_size=16)
    digest.update(read(0, header_bytes))
    for begin, end in places(list(entries)):
        digest.update(read(begin, end - begin))
    return digest.digest()


def places(entries: list[Entry]) -> list[tuple[int, int]]:
    """Where the bytes are that are looked at: begins and ends, in the order of the file."""
    entries = [entry for entry in entries if entry.begin < entry.end]
    count = min(len(entries), SAMPLED_TENSORS)
    chosen = [entries[number * (len(entries) - 1) // max(1, count - 1)] for number in range(count)]
    return sorted({place for entry in chosen for place in _places(entry)})


def _places(entry: Entry) -> Iterable[tuple[int, int]]:
    size = min(SAMPLE_BYTES, entry.end - entry.begin)
    for begin in (entry.begin, (entry.begin + entry.end - size) // 2, entry.end - size):
        yield begin, begin + size
