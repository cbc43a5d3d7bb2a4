"""Every bit comes back, whatever the weights are; what does not shrink is not packed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from weights_to_pack import DTYPES, WEIGHTS, bits, every_value, normal, random
from weightstream.streaming.packing import codec
from weightstream.streaming.packing.codec import FEWEST_VALUES, GROUP, format_of, may_pack, pack, unpack


def share_of(tensor: torch.Tensor) -> float | None:
    """Pack and unpack; return the share of the bytes that is left, or None where it was not packed."""
    packed = pack(tensor)
    if packed is None:
        return None
    out = torch.full_like(tensor, 7)
    unpack(packed, out)
    assert torch.equal(bits(out), bits(tensor))
    return packed.nbytes / tensor.nbytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_pattern_comes_back(dtype: torch.dtype) -> None:
    """Alone they do not shrink, having all exponents equally often; among weights they do."""
    assert share_of(every_value(dtype)) is None
    mixed = torch.cat([every_value(dtype), normal(1 << 19, dtype)])
    shuffled = mixed[torch.randperm(mixed.numel(), generator=random(1))]
    assert share_of(shuffled) is not None


@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.bfloat16, 0.695, 0.705), (torch.float16, 0.88, 0.89)])
def test_weights_take_so_much(dtype: torch.dtype, least: float, most: float) -> None:
    """16 bits become 11 (14 in float16), 8 for each escape of 2 to 3 %, and 32 for each group."""
    share = share_of(normal(1 << 18, dtype))
    assert share is not None
    assert least < share < most


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [FEWEST_VALUES, FEWEST_VALUES + 8, 9 * GROUP, 9 * GROUP + 1000])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_all_kinds_of_weights_come_back(kind: str, count: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    share = share_of(WEIGHTS[kind](count).to(dtype))
    assert share is None or share <= 0.95


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunks", [1, 3])
def test_long_tensors_are_packed_in_chunks(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunks: int) -> None:
    tensor = normal(8 * GROUP * chunks + 3 * GROUP + 40, dtype)
    at_once = pack(tensor)
    monkeypatch.setattr(codec, "CHUNK", 8 * GROUP)
    assert torch.equal(pack(tensor), at_once)
    assert share_of(tensor) is not None


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_mixture_comes_back(data: st.DataObject) -> None:
    """Runs of any bit patterns among others, so that groups have none, few or all of their values escaped."""
    dtype = data.draw(st.sampled_from(DTYPES))
    count = 8 * data.draw(st.integers(FEWEST_VALUES // 8, FEWEST_VALUES // 8 + 700))
    words = bits(normal(count, dtype, data.draw(st.integers(0, 9)))).clone()
    for _ in range(data.draw(st.integers(0, 6))):
        start = data.draw(st.integers(0, count - 1))
        length = data.draw(st.integers(1, 3000))
        patterns = data.draw(st.lists(st.integers(-(1 << 15), (1 << 15) - 1), min_size=1, max_size=8))
        part = words[start : start + length]
        part.copy_(torch.tensor(patterns, dtype=torch.int16).repeat(part.numel() // len(patterns) + 1)[: part.numel()])
    share_of(words.view(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_lie_one_behind_another(dtype: torch.dtype) -> None:
    count = 5 * GROUP + 24
    form = format_of(count, dtype)
    sizes = [count, *[count // 8] * len(form.planes), 6 * 4]
    begins = [form.low, *form.planes, form.starts, form.escapes]
    assert len(form.planes) == {torch.bfloat16: 3, torch.float16: 6}[dtype]
    assert begins[0] == codec.PART_ALIGNMENT
    for begin, size, after in zip(begins, sizes, begins[1:], strict=False):
        assert begin % codec.PART_ALIGNMENT == 0
        assert 0 <= after - (begin + size) < codec.PART_ALIGNMENT


@pytest.mark.parametrize(
    ("count", "dtype", "may"),
    [
        (FEWEST_VALUES, torch.bfloat16, True),
        (FEWEST_VALUES, torch.float16, True),
        (FEWEST_VALUES - 8, torch.bfloat16, False),
        (FEWEST_VALUES + 4, torch.bfloat16, False),
        (FEWEST_VALUES, torch.float32, False),
        (FEWEST_VALUES, torch.int16, False),
        (codec.MOST_VALUES, torch.bfloat16, True),
        (codec.MOST_VALUES + 8, torch.bfloat16, False),
    ],
)
def test_what_may_be_packed(count: int, dtype: torch.dtype, may: bool) -> None:
    assert may_pack(count, dtype) is may
