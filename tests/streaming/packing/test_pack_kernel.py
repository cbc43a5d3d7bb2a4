"""The kernels that pack, on the host's own processor: the same bytes as by torch; how they are launched, and waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from weights_to_pack import DTYPES, WEIGHTS, bits, every_value, normal, random
from weightstream.streaming.packing.codec import FEWEST_VALUES, GROUP, format_of, pack
from weightstream.streaming.packing.kernels import kernel_format
from weightstream.streaming.packing.packers import SCRATCH_BYTES, CudaPacker, TorchPacker, packer_of
from weightstream.streaming.packing.unpackers import unpacker_of

SECOND = torch.device("cuda", 1)
PACKERS = {"kernels": lambda: packer_of(SECOND), "torch": lambda: packer_of(torch.device("cpu"))}


def packed_by(packer: Any, *tensors: torch.Tensor) -> list[torch.Tensor | None]:
    """Each packed into memory that holds something else, beyond which nothing may be written."""
    found: list[torch.Tensor | None] = []
    for tensor, sized in zip(tensors, packer.sizes(tensors), strict=True):
        if sized.nbytes is None:
            found.append(None)
            continue
        memory = torch.full((sized.nbytes + tensor.nbytes,), 7, dtype=torch.uint8)
        sized.write(memory[: sized.nbytes])
        assert (memory[sized.nbytes :] == 7).all()
        found.append(memory[: sized.nbytes])
    return found


def same(found: Sequence[torch.Tensor | None], *tensors: torch.Tensor) -> bool:
    expected = [pack(tensor) for tensor in tensors]
    return all(
        one is None if other is None else one is not None and torch.equal(one, other)
        for one, other in zip(found, expected, strict=True)
    )


# -- what they compute -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("packer", PACKERS.values(), ids=PACKERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [FEWEST_VALUES, FEWEST_VALUES + 8, 9 * GROUP + 1000])
def test_all_kinds_of_weights_become_the_same_bytes(packer: Callable[[], Any], count: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = [make(count).to(dtype) for make in WEIGHTS.values()]
    found = packed_by(packer(), *tensors)
    assert same(found, *tensors)
    assert sum(one is not None for one in found) >= 6


@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_pattern_comes_back(dtype: torch.dtype) -> None:
    """Alone they do not shrink, among weights they do. Several blocks count them."""
    mixed = torch.cat([normal(6 << 16, dtype), every_value(dtype)[torch.randperm(1 << 16, generator=random(1))]])
    found = packed_by(packer_of(SECOND), every_value(dtype), mixed)
    assert same(found, every_value(dtype), mixed)
    assert found[0] is None
    out = torch.full_like(mixed, 7)
    unpacker_of(SECOND).prepare(found[1], out)()
    assert torch.equal(bits(out), bits(mixed))


@pytest.mark.usefixtures("emulation")
def test_of_exponents_that_are_equally_common_the_smaller_ones_are_in_the_table() -> None:
    words = (torch.arange(FEWEST_VALUES, dtype=torch.int32) % 8 + 100) << 7
    tensor = words.to(torch.int16).view(torch.bfloat16)
    (found,) = packed_by(packer_of(SECOND), tensor)
    assert found[:8].tolist() == [*range(100, 107), 0]
    assert same([found], tensor)


# -- how they are launched ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "counting", "blocks"), [(8 * GROUP, 1, 1), (64 * GROUP, 1, 8), (65 * GROUP, 2, 9)])
def test_launches_have_what_the_kernels_take(
    machine: SimpleNamespace, dtype: torch.dtype, count: int, counting: int, blocks: int
) -> None:
    packer = packer_of(SECOND)
    assert isinstance(packer, CudaPacker)
    assert packer.reason == ""
    assert packer_of(torch.device("cuda", 1)) is packer
    values, form, name = torch.zeros(count, dtype=dtype), format_of(count, dtype), str(dtype).removeprefix("torch.")
    (sized,) = packer.sizes([values])
    assert sized.nbytes == form.escapes, "nobody has counted an escape"
    first, second = machine.library.launches
    place = first.arguments[2]
    given = (pointer(values), (count // 8).to_bytes(4, "little"), place)
    assert first == (f"count_{name}", counting, 256, 78, given)
    assert second == ("choose", 1, 256, 78, (place,))
    out = torch.zeros(sized.nbytes, dtype=torch.uint8)
    sized.write(out)
    given = (pointer(values), place, pointer(out), bytes(kernel_format(form)))
    assert machine.library.launches[2:] == [(f"{step}_{name}", blocks, 256, 78, given) for step in ("escapes", "pack")]
    assert machine.library.loaded == [b"pack.cu for (9, 0)"]
    assert machine.library.contexts == []


def pointer(tensor: torch.Tensor) -> bytes:
    return tensor.data_ptr().to_bytes(8, "little")


def test_each_tensor_has_scratch_memory_of_its_own(machine: SimpleNamespace) -> None:
    packer_of(SECOND).sizes([torch.zeros(FEWEST_VALUES, dtype=dtype) for dtype in DTYPES])
    first, second = (int.from_bytes(each.arguments[2], "little") for each in machine.library.launches[::2])
    assert second - first == SCRATCH_BYTES == 1040


class Waits(TorchFunctionMode):
    """Counts operations for which the host waits for a device."""

    NAMES = frozenset({"tolist", "item", "cpu", "numpy", "to", "__bool__", "__int__", "__index__", "nonzero", "equal"})

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in self.NAMES:
            self.found.append(function.__name__)
        return function(*args, **kwargs or {})


@pytest.mark.usefixtures("emulation")
def test_the_host_waits_once_for_all_tensors() -> None:
    tensors = [normal(FEWEST_VALUES, dtype) for dtype in DTYPES * 3]
    packer = packer_of(SECOND)
    with Waits() as waits:
        found = packed_by_quietly(packer, tensors)
    assert waits.found == ["tolist"]
    assert same(found, *tensors)
    assert packer.sizes([]) == []


def packed_by_quietly(packer: Any, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    sizes = packer.sizes(tensors)
    outs = [torch.empty(sized.nbytes, dtype=torch.uint8) for sized in sizes]
    for sized, out in zip(sizes, outs, strict=True):
        sized.write(out)
    return outs


def test_torchs_way_says_why_it_is_taken() -> None:
    packer = packer_of(torch.device("cpu"))
    assert isinstance(packer, TorchPacker)
    assert packer.reason == "only CUDA has kernels for packed weights"
