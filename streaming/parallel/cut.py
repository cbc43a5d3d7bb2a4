"""How tokens are divided among devices. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise


def cut(length: int, shares: Sequence[float]) -> list[range]:
    """Divide ``length`` tokens, one behind another, by ``shares``, of which each gets at least one token.

    Args:
        length: at least as many tokens as shares.
        shares: positive numbers, whatever their sum.
    """
    assert length >= len(shares)
    total = sum(shares)
    ends = [round(length * part / total) for part in accumulate(shares)]
    for place in range(len(ends)):
        ends[place] = max(ends[place], (ends[place - 1] if place else 0) + 1)
    for place in reversed(range(len(ends))):
        ends[place] = min(ends[place], length - (len(ends) - 1 - place))
    return [range(start, end) for start, end in pairwise([0, *ends])]
