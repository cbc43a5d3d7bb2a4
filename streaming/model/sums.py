"""Sums of what lies on the device, which show writes that torch has not counted (*Note: who has written*).

A sum is taken modulo 2^64 of words of 64 bits, each times an odd number. So one other word is always noticed. Several
other words, and words that changed places, are noticed too, unless their differences happen to cancel out. The number
of a word in a large tensor is made of those of its column, its row and its diagonal, when the words are laid out as a
table: so they need not be multiplied one by one, which would take as much memory again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..devices.copies import aligned
from .layout import Value

# More words of 8 bytes than this are laid out as a table.
MOST_WORDS = 1 << 16

# Increment and factors of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014),
# as signed numbers. The shifts are arithmetic here, so a few numbers are the same.
_INCREMENT, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685


class Summing:
    """Takes the sums of one value after another, all on one device, and keeps the odd numbers for the next."""

    def __init__(self) -> None:
        self._factors = torch.empty(0, dtype=torch.int64)

    def __call__(self, buffer: torch.Tensor, value: Value) -> torch.Tensor:
        """Return an int64 sum for each tensor of ``value`` that has bytes, on the device of ``buffer``."""
        found = [self._sum(words) for words in _words(buffer, value)]
        return torch.stack(found) if found else torch.zeros(0, dtype=torch.int64, device=buffer.device)

    def _sum(self, words: torch.Tensor) -> torch.Tensor:
        if words.numel() > MOST_WORDS:
            words = _as_table(words)
        return (words * self._factors_of(words)).sum()

    def _factors_of(self, words: torch.Tensor) -> torch.Tensor:
        """An odd number for each word."""
        count = words.numel()
        if self._factors.numel() < count:
            self._factors = _mix(torch.arange(count, device=words.device) * _INCREMENT).bitwise_or_(1)
        return self._factors[:count]


def _as_table(words: torch.Tensor) -> torch.Tensor:
    """Return what is left to be multiplied: the sums of columns, those of rows and diagonals, doubled so that the
    number of each word is odd, and the words behind the last row."""
    columns = 1 << words.numel().bit_length() // 2
    rows = words.numel() // columns
    inside, rest = words[: rows * columns], words[rows * columns :]
    table = inside.view(rows, columns)
    # In rows that are longer by one, what was on a diagonal is in a column.
    longer = inside.numel() // (columns + 1)
    diagonals = inside[: longer * (columns + 1)].view(longer, columns + 1).sum(0)
    return torch.cat([table.sum(0), table.sum(1).mul_(2), diagonals.mul_(2), rest])


def _mix(numbers: torch.Tensor) -> torch.Tensor:
    """Make numbers that look random of int64 ``numbers``, in place."""
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        numbers.bitwise_xor_(numbers >> shift).mul_(factor)
    return numbers.bitwise_xor_(numbers >> 31)


def _words(buffer: torch.Tensor, value: Value) -> Iterator[torch.Tensor]:
    for spec in value.specs:
        # The padding between tensors stays as it is, too.
        end = spec.offset + aligned(spec.nbytes)
        if spec.nbytes:
            yield buffer[spec.offset : end].view(torch.int64)
