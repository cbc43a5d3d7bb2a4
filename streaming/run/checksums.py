"""Sums of memory, the same on every device, which are other ones if the memory was damaged.

[Note: the sums]
Memory is cut into pieces of 65,536 words of 32 bits. Of each piece two sums are taken: of its words, and of its words
times their places in the piece, which count from 1. Words are signed, so no sum is beyond 2^31 * (2^31 + 2^15) < 2^63:
64 bits hold it, nothing is rounded, and the order of adding makes no difference. So the sums are the same on every
device, and only they are copied back from it.
Any change of one or two words of a piece is found. If words change by d and e at the places p and q, both sums stay as
they are only where d + e = 0 and p * d + q * e = 0; so (p - q) * d = 0, and there is no change. A flipped bit is such a
change, and so are two words that have changed places. Damage to more words (zeros, an older block, words that moved on
by one) is missed only if it fits two equations by chance, of which one is of 63 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch.nn.functional import pad

PIECE_WORDS = 1 << 16
WORD_BYTES = 4
PIECE_BYTES = PIECE_WORDS * WORD_BYTES
# On the device the sums take memory that no plan knows of: five times this.
BATCH_BYTES = 16 * 1024**2


def checksums(memory: torch.Tensor) -> torch.Tensor:
    """The two int64 sums of each piece of uint8 ``memory``, on its device, in a row for each piece (Note: the sums)."""
    sums = [_sums(words) for words in _pieces(memory)]
    return torch.cat(sums) if sums else torch.zeros(0, 2, dtype=torch.int64, device=memory.device)


def checksums_of(memories: Iterable[torch.Tensor]) -> torch.Tensor:
    """The sums of several memories, one behind another, in host memory."""
    found = [checksums(memory) for memory in memories]
    return torch.cat(found).cpu() if found else torch.zeros(0, 2, dtype=torch.int64)


def differences(names: Iterable[str], memories: Sequence[torch.Tensor], expected: torch.Tensor) -> list[str]:
    """Describe those of ``memories`` of which the sums are not as ``expected``, and from which byte on they differ."""
    differs = (checksums_of(memories) != expected).any(1)
    counts = [-(-memory.nbytes // PIECE_BYTES) for memory in memories]
    return [
        f"{name} differs in {int(wrong.sum())} of {len(wrong)} pieces, from byte "
        f"{int(wrong.nonzero()[0]) * PIECE_BYTES} on"
        for name, wrong in zip(names, differs.split(counts), strict=True)
        if wrong.any()
    ]


def _pieces(memory: torch.Tensor) -> Iterator[torch.Tensor]:
    """Words of whole pieces, a few pieces at once; then those of the last one, if it is shorter."""
    whole = memory.nbytes // PIECE_BYTES * PIECE_BYTES
    for start in range(0, whole, BATCH_BYTES):
        yield memory[start : min(whole, start + BATCH_BYTES)].view(torch.int32).view(-1, PIECE_WORDS)
    if whole < memory.nbytes:
        last = memory[whole:]
        yield pad(last, (0, -last.nbytes % WORD_BYTES)).view(torch.int32).view(1, -1)


def _sums(words: torch.Tensor) -> torch.Tensor:
    words = words.long()
    places = torch.arange(1, words.shape[1] + 1, device=words.device)
    return torch.stack([words.sum(1), (words * places).sum(1)], 1)
