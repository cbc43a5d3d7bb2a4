"""Sums of what lies on the device, which show writes that torch has not counted (*Note: who has written*).

A sum is taken modulo 2^64 of words of 64 bits, each times an odd number of its own, so moved words are noticed as well.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..devices.copies import ALIGNMENT
from .layout import Value

# Words of 8 bytes that are summed at once. Factors and products take as much memory of the device, each.
BATCH_WORDS = 1 << 21

# From Knuth's multiplicative hashing: 2^64 divided by the golden ratio, as a signed number.
_MULTIPLIER = -7046029254386353131


class Summing:
    """Takes the sums of one value after another, all on one device, and keeps the factors for the next."""

    def __init__(self) -> None:
        self._factors = torch.empty(0, dtype=torch.int64)

    def __call__(self, buffer: torch.Tensor, value: Value) -> torch.Tensor:
        """Return an int64 sum for each batch of the bytes of ``value`` in ``buffer``, on the device of ``buffer``."""
        found = [(words * self._factors_of(words)).sum() for words in _batches(buffer, value)]
        return torch.stack(found) if found else torch.zeros(0, dtype=torch.int64, device=buffer.device)

    def _factors_of(self, words: torch.Tensor) -> torch.Tensor:
        """An odd number for each word."""
        count = words.numel()
        if self._factors.numel() < count:
            self._factors = torch.arange(1, 2 * count, 2, device=words.device).mul_(_MULTIPLIER)
        return self._factors[:count]


def _batches(buffer: torch.Tensor, value: Value) -> Iterator[torch.Tensor]:
    for spec in value.specs:
        # The padding between tensors stays as it is, too.
        end = spec.offset + -(-spec.nbytes // ALIGNMENT) * ALIGNMENT
        yield from buffer[spec.offset : end].view(torch.int64).split(BATCH_WORDS) if spec.nbytes else ()
