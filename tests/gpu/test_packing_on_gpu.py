"""Packed weights on a GPU: the kernels pack to the bytes that torch's operations on the CPU give, and give every bit
back, in the order of the stream. How fast is printed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from weights_to_pack import DTYPES, WEIGHTS, bits, every_value, normal
from weightstream.nodes.host.devices import make_backend
from weightstream.streaming.packing.codec import GROUP, pack
from weightstream.streaming.packing.packers import CudaPacker, packer_of
from weightstream.streaming.packing.unpackers import CudaUnpacker, unpacked_bytes_per_second, unpacker_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

DEVICE = torch.device("cuda", 0)
REPEATS = 200
TIMED_VALUES, TIMED_TENSORS = 3072 * 12288, 4
TIMED_RUNS = 20
SLACK = 64
# What torch says of an operation for which the host waits for the device.
SAID = "called a synchronizing CUDA operation"


def packed_on_gpu(weights: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """Each packed into memory that holds something else, beyond which nothing may be written."""
    sizes = packer_of(DEVICE).sizes(weights)
    found: list[torch.Tensor | None] = []
    for sized in sizes:
        if sized.nbytes is None:
            found.append(None)
            continue
        memory = torch.full((sized.nbytes + SLACK,), 7, dtype=torch.uint8, device=DEVICE)
        sized.write(memory[: sized.nbytes])
        assert bool((memory[sized.nbytes :] == 7).all())
        found.append(memory[: sized.nbytes])
    return found


def test_there_are_kernels() -> None:
    assert isinstance(unpacker_of(DEVICE), CudaUnpacker), unpacker_of(DEVICE).reason
    assert isinstance(packer_of(DEVICE), CudaPacker), packer_of(DEVICE).reason


@pytest.mark.beside
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [8 * GROUP, 8 * GROUP + 8, 9 * GROUP + 1000])
def test_all_kinds_of_weights_become_the_same_bytes_and_come_back(count: int, dtype: torch.dtype) -> None:
    check([make(count).to(dtype) for make in WEIGHTS.values()], least=6)


@pytest.mark.beside
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_tensor_and_every_bit_pattern_become_the_same_bytes_and_come_back(dtype: torch.dtype) -> None:
    """One of several chunks of torch's operations, which ends within a group."""
    check([torch.cat([normal((1 << 24) + 3 * GROUP + 40, dtype), every_value(dtype)]), every_value(dtype)], least=1)


def check(tensors: Sequence[torch.Tensor], least: int) -> None:
    weights = [tensor.to(DEVICE) for tensor in tensors]
    found = packed_on_gpu(weights)
    for tensor, own, packed in zip(tensors, weights, found, strict=True):
        expected = pack(tensor)
        assert (packed is None) == (expected is None)
        if packed is not None:
            assert torch.equal(packed.cpu(), expected)
            out = torch.full_like(own, 7)
            unpacker_of(DEVICE).prepare(packed, out)()
            assert torch.equal(bits(out), bits(own))
    assert sum(packed is not None for packed in found) >= least


@contextmanager
def counted_waits() -> Iterator[list[str]]:
    """What torch has said, once for each time that the host waited for the device."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
            found += [str(each.message) for each in caught if SAID in str(each.message)]


def test_the_host_waits_once_for_all_tensors() -> None:
    weights = [normal(3072 * 3072, dtype, seed).to(DEVICE) for seed, dtype in enumerate(DTYPES * 2)]
    packed_on_gpu(weights)
    with counted_waits() as waits:
        sizes = packer_of(DEVICE).sizes(weights)
    assert len(waits) == 1, waits
    outs = [torch.empty(sized.nbytes, dtype=torch.uint8, device=DEVICE) for sized in sizes]
    with counted_waits() as waits:
        for sized, out in zip(sizes, outs, strict=True):
            sized.write(out)
    assert waits == []


def test_both_run_in_the_order_of_the_stream() -> None:
    """What is packed is what was written last to the same memory; what is read next is what was decoded last."""
    first, second = (normal(3072 * 3072, torch.bfloat16, seed).to(DEVICE) for seed in (1, 2))
    place, scratch = torch.empty_like(first), torch.empty_like(first)
    packed = torch.empty(first.nbytes, dtype=torch.uint8, device=DEVICE)
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(REPEATS):
        for expected in (first, second):
            place.copy_(expected)
            (sized,) = packer_of(DEVICE).sizes([place])
            sized.write(packed[: sized.nbytes])
            place.zero_()
            unpacker_of(DEVICE).prepare(packed, scratch)()
            wrong += (bits(scratch) != bits(expected)).sum()
    assert int(wrong) == 0


def test_how_fast() -> None:
    backend = make_backend(DEVICE)
    for dtype in DTYPES:
        packing, unpacking = packed_bytes_per_second(dtype), unpacked_bytes_per_second(backend, dtype)
        print(f"{dtype}: {packing / 1e9:.0f} GB/s packed, {unpacking / 1e9:.0f} GB/s decoded")
        assert min(packing, unpacking) > 50e9, "slower than the bus"


def packed_bytes_per_second(dtype: torch.dtype) -> float:
    """Bytes of weights, of units with some of FLUX's largest tensors, measured and packed; the host's waits count."""
    weights = [normal(TIMED_VALUES, dtype, seed).to(DEVICE) for seed in range(TIMED_TENSORS)]
    outs = [torch.empty(each.nbytes, dtype=torch.uint8, device=DEVICE) for each in weights]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for run in range(TIMED_RUNS + 2):
        if run == 2:
            begin.record()
        for sized, out in zip(packer_of(DEVICE).sizes(weights), outs, strict=True):
            sized.write(out[: sized.nbytes])
    end.record()
    torch.cuda.synchronize(DEVICE)
    return TIMED_RUNS * sum(each.nbytes for each in weights) / (begin.elapsed_time(end) / 1e3)
