"""Sums of what lies on the device tell any other bytes, and any other order of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from weightstream.streaming.model.layout import NamedTensor, Value, make_layout
from weightstream.streaming.model.sums import MOST_WORDS, Summing

# One after another, as a table without a rest, a table that is a square, and one with a rest. In words of 8 bytes.
SIZES = [64, MOST_WORDS, 9 << 14, 1 << 18, (1 << 18) + 64 * 37]
# A sum keeps this bit only if the number of its word is odd.
TOP_BIT = -(1 << 63)


def value_of(words: int) -> Value:
    weight = torch.zeros(words * 4, dtype=torch.bfloat16)
    (value,) = make_layout([NamedTensor(("weight",), weight, weight.dtype, ())]).values
    return value


def random_words(count: int) -> torch.Tensor:
    return torch.randint(-(1 << 63), (1 << 63) - 1, (count,), generator=torch.Generator().manual_seed(count))


def places(count: int) -> list[int]:
    """The first and the last, and some between them."""
    some = torch.randint(0, count, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    return sorted({0, 1, count - 2, count - 1, *some})


@pytest.mark.parametrize("count", SIZES)
def test_the_number_of_each_word_is_odd_and_its_own(count: int) -> None:
    words, sums, value = torch.zeros(count, dtype=torch.int64), Summing(), value_of(count)
    numbers = []
    for place in places(count):
        words[place] = 1
        numbers += sums(words.view(torch.uint8), value).tolist()
        words[place] = TOP_BIT
        assert sums(words.view(torch.uint8), value).tolist() == [TOP_BIT], "another bit, times an odd number"
        words[place] = 0
    assert all(number % 2 for number in numbers)
    assert len(set(numbers)) == len(places(count))


@pytest.mark.parametrize("count", SIZES)
def test_any_other_order_is_told(count: int) -> None:
    words, sums, value = random_words(count), Summing(), value_of(count)
    before = sums(words.view(torch.uint8), value)
    assert torch.equal(sums(words.clone().view(torch.uint8), value), before)
    side = 1 << count.bit_length() // 2
    table = words[: side * (count // side)].view(-1, side)
    mirrored = words.clone()
    low = min(table.shape)
    mirrored[: table.numel()].view(-1, side)[:low, :low] = table[:low, :low].T
    for changed in (words.flip(0), words.roll(1), words.roll(side), mirrored, words.view(2, -1).flip(0).reshape(-1)):
        assert not torch.equal(changed, words)
        assert not torch.equal(sums(changed.view(torch.uint8), value), before)


def test_equal_rows_may_not_change_places() -> None:
    weight = torch.zeros(1024, 1024, dtype=torch.bfloat16)
    weight[:512] = 1
    value, sums = value_of(1 << 18), Summing()
    before = sums(weight.view(torch.uint8).view(-1), value)
    for changed in (weight.flip(0), weight.roll(1, 0), weight.T.contiguous(), torch.ones_like(weight)):
        assert not torch.equal(sums(changed.view(torch.uint8).view(-1), value), before)


def test_tables_with_the_same_rows_and_columns_are_told_apart() -> None:
    value, sums = value_of(1 << 18), Summing()
    lines = torch.eye(512, dtype=torch.int64)
    squares = (torch.arange(512)[:, None] + torch.arange(512)) % 2
    for one, other in ((lines, lines.roll(2, 0)), (lines, lines.flip(0)), (squares, 1 - squares)):
        before, now = (sums(words.contiguous().view(-1).view(torch.uint8), value) for words in (one, other))
        assert not torch.equal(before, now)


def test_each_tensor_of_a_value_that_has_bytes_has_a_sum() -> None:
    tensors = {"first": torch.zeros(32), "none": torch.zeros(0), "last": torch.zeros(1 << 18)}
    layout = make_layout([NamedTensor((name,), held, held.dtype, ()) for name, held in tensors.items()])
    value, buffer, sums = (
        replace(layout.values[0], specs=layout.specs),
        torch.zeros(layout.nbytes, dtype=torch.uint8),
        Summing(),
    )
    before = sums(buffer, value)
    layout.specs[-1].view(buffer)[-1] = 1
    assert (sums(buffer, value) != before).tolist() == [False, True]
    assert sums(buffer, replace(value, specs=layout.specs[1:2])).tolist() == []
