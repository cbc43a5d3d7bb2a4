"""Packed weights on a GPU: the kernel gives every bit back, in the order of the stream, and how fast is printed."""

from __future__ import annotations

import pytest
import torch
from weights_to_pack import DTYPES, WEIGHTS, bits, every_value, normal
from weightstream.nodes.host.devices import make_backend
from weightstream.streaming.packing.codec import GROUP, pack
from weightstream.streaming.packing.unpackers import CudaUnpacker, unpacked_bytes_per_second, unpacker_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

DEVICE = torch.device("cuda", 0)
REPEATS = 200


def unpacked(tensor: torch.Tensor) -> torch.Tensor | None:
    packed = pack(tensor)
    if packed is None:
        return None
    out = torch.full_like(tensor, 7)
    unpacker_of(DEVICE).prepare(packed, out)()
    return out


def test_there_is_a_kernel() -> None:
    assert isinstance(unpacker_of(DEVICE), CudaUnpacker), unpacker_of(DEVICE).reason


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_comes_back(dtype: torch.dtype) -> None:
    tensors = [make(9 * GROUP + 1000) for make in WEIGHTS.values()]
    tensors.append(torch.cat([normal(1 << 22, dtype), every_value(dtype)]))
    found = 0
    for tensor in tensors:
        weights = tensor.to(dtype).to(DEVICE)
        out = unpacked(weights)
        found += out is not None
        assert out is None or torch.equal(bits(out), bits(weights))
    assert found >= 6


def test_it_runs_in_the_order_of_the_stream() -> None:
    """What is read next is what was decoded last, in the same memory."""
    first, second = (normal(3072 * 3072, torch.bfloat16, seed).to(DEVICE) for seed in (1, 2))
    packed = [pack(first), pack(second)]
    scratch = torch.empty_like(first)
    runs = [unpacker_of(DEVICE).prepare(one, scratch) for one in packed]
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(REPEATS):
        for run, expected in zip(runs, (first, second), strict=True):
            run()
            wrong += (bits(scratch) != bits(expected)).sum()
    assert int(wrong) == 0


def test_how_fast() -> None:
    backend = make_backend(DEVICE)
    for dtype in DTYPES:
        speed = unpacked_bytes_per_second(backend, dtype)
        print(f"{dtype}: {speed / 1e9:.0f} GB/s decoded")
        assert speed > 50e9, "slower than the bus"
