"""The sums by which copies are compared: exact, the same for any batches, and other ones for other bytes."""

from __future__ import annotations

import random

import pytest
import torch
from weightstream.streaming.run import checksums as checksums_file
from weightstream.streaming.run.checksums import PIECE_WORDS, checksums

PIECE_BYTES = 4 * PIECE_WORDS


def random_words(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32)


def sums(words: torch.Tensor) -> torch.Tensor:
    return checksums(words.contiguous().view(torch.uint8))


def by_hand(memory: torch.Tensor) -> list[list[int]]:
    """The sums in Python's integers, which never overflow."""
    data = bytes(memory.tolist())
    rows = []
    for start in range(0, len(data), PIECE_BYTES):
        piece = data[start : start + PIECE_BYTES]
        words = [int.from_bytes(piece[at : at + 4], "little", signed=True) for at in range(0, len(piece) // 4 * 4, 4)]
        if rest := len(piece) % 4:
            words.append(int.from_bytes(piece[-rest:], "little"))
        rows.append([sum(words), sum(place * word for place, word in enumerate(words, 1))])
    return rows


@pytest.mark.parametrize("nbytes", [0, 1, 3, 4, 6, 1000, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 2])
def test_the_sums_are_those_of_exact_arithmetic(nbytes: int) -> None:
    memory = torch.randint(0, 256, (nbytes,), generator=torch.Generator().manual_seed(nbytes), dtype=torch.uint8)
    assert checksums(memory).tolist() == by_hand(memory)


@pytest.mark.parametrize("word", [-(2**31), 2**31 - 1, -1])
def test_the_largest_words_do_not_overflow(word: int) -> None:
    places = PIECE_WORDS * (PIECE_WORDS + 1) // 2
    assert sums(torch.full((PIECE_WORDS,), word, dtype=torch.int32)).tolist() == [[word * PIECE_WORDS, word * places]]


def test_batches_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    words = random_words(5 * PIECE_WORDS + 7)
    expected = sums(words)
    assert len(expected) == 6
    for pieces in (1, 2, 3, 100):
        monkeypatch.setattr(checksums_file, "BATCH_BYTES", pieces * PIECE_BYTES)
        assert torch.equal(sums(words), expected)


def test_each_flipped_bit_is_found() -> None:
    words = random_words(300)
    expected = sums(words)
    for place in (0, 1, 150, 299):
        for bit in range(32):
            changed = words.clone()
            changed[place] ^= (1 << bit) if bit < 31 else -(2**31)
            assert not torch.equal(sums(changed), expected), (place, bit)


def test_two_words_that_changed_places_are_found() -> None:
    chance = random.Random(1)
    words = random_words(PIECE_WORDS)
    words[10], words[20] = -(2**31), 0  # Their difference is a power of two, and so may be that of their places.
    expected = sums(words)
    pairs = [(10, 20), (0, 1), (0, PIECE_WORDS - 1), *(chance.sample(range(PIECE_WORDS), 2) for _ in range(50))]
    pairs += [(0, 1 << power) for power in range(16)]
    for one, other in pairs:
        changed = words.clone()
        changed[one], changed[other] = words[other], words[one]
        assert not torch.equal(sums(changed), expected), (one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("values", ["random", "few", "growing"])
def test_moved_zeroed_and_exchanged_parts_are_found(dtype: torch.dtype, values: str) -> None:
    count = 3 * PIECE_WORDS
    made = {
        "random": torch.randn(count, generator=torch.Generator().manual_seed(3)),
        "few": torch.tensor([0.5, -0.5, 1.0]).repeat(count // 3),
        "growing": torch.linspace(-1, 1, count),
    }
    memory = made[values].to(dtype).view(torch.uint8)
    expected = checksums(memory)
    half = memory.nbytes // 2 // 64 * 64
    damaged = {
        "moved by a value": memory.roll(dtype.itemsize),
        "moved by a word": memory.roll(4),
        "zero tail": torch.cat([memory[:-64], torch.zeros(64, dtype=torch.uint8)]),
        "zero half": torch.cat([memory[:half], torch.zeros_like(memory[half:])]),
        "halves exchanged": torch.cat([memory[half:], memory[:half]]),
        "backwards": memory.flip(0),
    }
    for damage, other in damaged.items():
        assert torch.equal(other, memory) or not torch.equal(checksums(other), expected), damage
