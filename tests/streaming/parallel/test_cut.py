"""How tokens are divided."""

from __future__ import annotations

import itertools

import pytest
from weightstream.streaming.parallel.cut import cut


@pytest.mark.parametrize("shares", [(1.0,), (1, 1), (2, 1), (1, 2, 3), (0.001, 1), (1, 0.001, 0.001), (1, 1, 1, 1)])
def test_all_tokens_are_given_out_once_and_in_order(shares: tuple[float, ...]) -> None:
    for length in range(len(shares), 200):
        parts = cut(length, shares)
        assert list(itertools.chain.from_iterable(parts)) == list(range(length))
        assert len(parts) == len(shares)
        assert all(len(part) >= 1 for part in parts)


@pytest.mark.parametrize(
    ("length", "shares", "expected"),
    [
        (10, (1, 1), [5, 5]),
        (9, (1, 2), [3, 6]),
        (4608, (3, 1), [3456, 1152]),
        (3, (1, 1000), [1, 2]),
        (2, (5, 1), [1, 1]),
    ],
)
def test_by_shares(length: int, shares: tuple[float, ...], expected: list[int]) -> None:
    assert [len(part) for part in cut(length, shares)] == expected
