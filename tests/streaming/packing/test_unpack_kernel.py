"""The kernel that decodes, on the host's own processor, and how it is launched."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from weights_to_pack import WEIGHTS, bits, every_value, normal
from weightstream.streaming.packing.codec import FEWEST_VALUES, GROUP, format_of, pack
from weightstream.streaming.packing.kernels import kernel_format
from weightstream.streaming.packing.unpackers import KERNELS, CudaUnpacker, unpacker_of

SECOND = torch.device("cuda", 1)


def check(tensor: torch.Tensor) -> None:
    packed = pack(tensor)
    assert packed is not None
    # Beyond its end nothing may be written.
    memory = torch.full((tensor.numel() + 64,), 7, dtype=tensor.dtype)
    unpacker_of(SECOND).prepare(packed, memory[: tensor.numel()])()
    assert torch.equal(bits(memory[: tensor.numel()]), bits(tensor))
    assert (memory[tensor.numel() :] == 7).all()


@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("dtype", KERNELS)
@pytest.mark.parametrize("count", [FEWEST_VALUES, FEWEST_VALUES + 8, 9 * GROUP + 1000])
def test_it_decodes_what_was_packed(count: int, dtype: torch.dtype) -> None:
    check(normal(count, dtype))


@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("dtype", KERNELS)
def test_it_decodes_every_bit_pattern(dtype: torch.dtype) -> None:
    check(torch.cat([normal(6 << 16, dtype), every_value(dtype)]))


@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("kind", ["zeros", "minus zeros", "infinite", "all of a group escaped"])
def test_it_decodes_groups_without_and_full_of_escapes(kind: str) -> None:
    check(WEIGHTS[kind](9 * GROUP + 1000).to(torch.bfloat16))


@pytest.mark.parametrize("dtype", KERNELS)
@pytest.mark.parametrize(("count", "blocks"), [(8 * GROUP, 1), (8 * GROUP + 8, 2), (33 * GROUP, 5)])
def test_a_launch_has_what_the_kernel_takes(
    machine: SimpleNamespace, dtype: torch.dtype, count: int, blocks: int
) -> None:
    unpacker = unpacker_of(SECOND)
    assert isinstance(unpacker, CudaUnpacker)
    assert unpacker.reason == ""
    assert unpacker_of(torch.device("cuda", 1)) is unpacker
    packed, out = torch.zeros(10, dtype=torch.uint8), torch.zeros(count, dtype=dtype)
    queue = unpacker.prepare(packed, out)
    assert machine.library.launches == []
    queue()
    queue()
    places = [each.data_ptr().to_bytes(8, "little") for each in (packed, out)]
    given = (*places, bytes(kernel_format(format_of(count, dtype))))
    assert machine.library.launches == [(KERNELS[dtype], blocks, 256, 78, given)] * 2
    assert machine.library.loaded == [b"unpack.cu for (9, 0)"]
    assert machine.library.contexts == []


def test_torchs_way_decodes_too() -> None:
    tensor = normal(FEWEST_VALUES, torch.bfloat16)
    out = torch.zeros_like(tensor)
    unpacker_of(torch.device("cpu")).prepare(pack(tensor), out)()
    assert torch.equal(bits(out), bits(tensor))
