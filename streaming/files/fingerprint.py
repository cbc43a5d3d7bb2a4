"""What tells the contents of one checkpoint file from those of another, without reading all of it.

[Note: touched is not changed]
Programs that synchronise, restore or index files set the modification time and leave the bytes. The system cannot tell
this from a change of the contents, so when the time differs, a fingerprint is taken again: size, header, and bytes at
the begin, in the middle and at the end of tensors, of all of them in a file of up to 100. Another training of a model
differs nearly everywhere. A change that the fingerprint misses, such as a few numbers between those places, is not
mixed with the old contents: when the model is loaded next, all copies are made anew (``Streamer.refresh``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

from .header import Entry

# Tensors that are sampled, evenly spread over a file, and bytes of each sample. If the file is not in memory, the reads
# take as long as a disk needs to find 300 places: some 30 ms on flash memory, 2 s on a turning disk.
SAMPLED_TENSORS = 100
SAMPLE_BYTES = 64


def fingerprint(read: Callable[[int, int], bytes], nbytes: int, header_bytes: int, entries: Iterable[Entry]) -> bytes:
    """A digest of a file's contents.

    Args:
        read: takes an offset and a number of bytes, and returns these bytes, or fewer at the end of the file.
        nbytes: size of the file.
        header_bytes: bytes at the file's begin that belong to its header.
        entries: the tensors.
    """
    digest = hashlib.blake2b(nbytes.to_bytes(8, "little"), digest_size=16)
    digest.update(read(0, header_bytes))
    for begin, end in places(list(entries)):
        digest.update(read(begin, end - begin))
    return digest.digest()


def places(entries: list[Entry]) -> list[tuple[int, int]]:
    """Return begin and end of each sample, in bytes, in the order of the file."""
    entries = [entry for entry in entries if entry.begin < entry.end]
    count = min(len(entries), SAMPLED_TENSORS)
    chosen = [entries[number * (len(entries) - 1) // max(1, count - 1)] for number in range(count)]
    return sorted({place for entry in chosen for place in _places(entry)})


def _places(entry: Entry) -> Iterable[tuple[int, int]]:
    size = min(SAMPLE_BYTES, entry.end - entry.begin)
    for begin in (entry.begin, (entry.begin + entry.end - size) // 2, entry.end - size):
        yield begin, begin + size
