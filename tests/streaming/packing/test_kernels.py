"""Kernels are compiled as users have them compiled; without them torch's operations are used, and that is told."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from weightstream.streaming.devices import nvrtc
from weightstream.streaming.devices.cuda_driver import DriverError
from weightstream.streaming.devices.cuda_kernels import CudaKernels, pointer
from weightstream.streaming.devices.nvrtc import CompilerError, compile_source
from weightstream.streaming.packing import packers, unpackers
from weightstream.streaming.packing.codec import EXPONENT_BITS, GROUP, MOST_VALUES, format_of, packed_bytes
from weightstream.streaming.packing.kernels import HEADER, WARP, WARPS, KernelFormat, OnePerDevice, blocks_of
from weightstream.streaming.packing.packers import KernelExponents, TorchPacker
from weightstream.streaming.packing.unpackers import TorchUnpacker

# Turing, Ampere, Ada, Hopper, and both kinds of Blackwell.
CAPABILITIES = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
SOURCES = {unpackers.SOURCE: tuple(unpackers.KERNELS.values()), packers.SOURCE: packers.KERNELS}
# What packs takes long to compile. All GPUs have it of the same text, so the oldest and the newest show what one lacks.
COMPILED = [(each, unpackers.SOURCE) for each in CAPABILITIES]
COMPILED += [(each, packers.SOURCE) for each in (CAPABILITIES[0], CAPABILITIES[-1])]
INVALID_VALUE = 1
SECOND = torch.device("cuda", 1)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("capability", "source"), COMPILED, ids=lambda of: of.stem if isinstance(of, Path) else str(of)
)
def test_every_gpu_has_code_with_all_kernels(capability: tuple[int, int], source: Path) -> None:
    headers = {HEADER.name: HEADER.read_text("utf-8")}
    text = source.read_text("utf-8")
    assert "__CUDA_ARCH__" not in text + headers[HEADER.name]
    code = compile_source(text, source.name, capability, headers)
    assert code.startswith(b"\x7fELF")
    assert all(kernel.encode() in code for kernel in SOURCES[source])


@pytest.mark.usefixtures("compiler")
def test_the_compilers_messages_are_told() -> None:
    with pytest.raises(CompilerError, match=r"(?s)some\.cu was not compiled: .*expected an expression"):
        compile_source("__device__ int x = ;", "some.cu", (9, 0))


def test_without_a_compiler_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(CompilerError, match="NVRTC is not there"):
        nvrtc.open_library()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(nvrtc, "_candidates", lambda: iter(["no-such-library.so"]))
    with pytest.raises(CompilerError, match=r"NVRTC is not there .*no-such-library\.so"):
        nvrtc.open_library()


@pytest.mark.parametrize(
    ("make", "without"),
    [
        (lambda: OnePerDevice(packers.CudaPacker, TorchPacker), TorchPacker),
        (lambda: OnePerDevice(unpackers.CudaUnpacker, TorchUnpacker), TorchUnpacker),
    ],
    ids=["packer", "unpacker"],
)
def test_where_there_are_no_kernels_torch_does_it(
    machine: SimpleNamespace, make: Callable[[], OnePerDevice[object]], without: type
) -> None:
    def reason(device: torch.device = SECOND) -> str:
        made = make().of(device)
        assert isinstance(made, without)
        return made.reason

    machine.capability = (7, 0)
    assert reason() == "compute capability 7.0 is too old"
    machine.capability = (9, 0)
    machine.error = CompilerError("NVRTC is not there")
    assert reason() == "NVRTC is not there"
    machine.error = None
    machine.library.fails = {"cuModuleLoadData": INVALID_VALUE}
    assert reason() == "cuModuleLoadData failed with CUDA_ERROR_OF_SOME_KIND (1)"
    assert machine.library.contexts == []
    assert reason(torch.device("cpu")) == "only CUDA has kernels for packed weights"


def test_a_launch_that_fails_says_so(machine: SimpleNamespace) -> None:
    kernels = CudaKernels(machine.library, 1, b"code", ["unpack_bfloat16"])
    launch = kernels.launch_of("unpack_bfloat16", 1, 256, (pointer(1), pointer(2), KernelFormat()))
    machine.library.fails = {"cuLaunchKernel": INVALID_VALUE}
    with pytest.raises(DriverError, match="cuLaunchKernel failed"):
        launch(0)
    assert machine.library.contexts == []


def test_what_kernels_are_given_is_laid_out_as_in_their_sources() -> None:
    fields = [(name, getattr(KernelFormat, name).offset) for name, _ in KernelFormat._fields_]
    assert fields == [("chunks", 0), ("low", 4), ("planes", 8), ("starts", 32), ("escapes", 36)]
    header, pack = HEADER.read_text("utf-8"), packers.SOURCE.read_text("utf-8")
    assert "struct Format {\n    u32 chunks, low, planes[6], starts, escapes;\n};" in header
    fields = [(name, getattr(KernelExponents, name).offset) for name, _ in KernelExponents._fields_]
    assert fields == [("counts", 0), ("table", 1024), ("escaped", 1032), ("unused", 1036)]
    assert "struct Exponents {\n    u32 counts[EXPONENTS];\n    u8 table[8];\n    u32 escaped, unused;\n};" in pack
    defined = {name: int(value) for name, value in re.findall(r"^#define (\w+) (\d+)$", header + pack, re.MULTILINE)}
    assert defined == {
        "ROUNDS": GROUP // (8 * WARP),
        "LANES": WARP,
        "WARPS": WARPS,
        "TABLE": 7,
        "COUNTED_GROUPS": packers.COUNTED_GROUPS,
        "COPIES": 4,
        "EXPONENTS": packers.EXPONENTS,
    }


@pytest.mark.parametrize("dtype", EXPONENT_BITS)
def test_kernels_count_the_largest_tensor_in_32_bits(dtype: torch.dtype) -> None:
    form = format_of(MOST_VALUES, dtype)
    most = 2 * MOST_VALUES
    assert packed_bytes(form, most - form.escapes) is None
    assert most < 1 << 32
    assert blocks_of(MOST_VALUES) * WARPS * GROUP == MOST_VALUES
    assert blocks_of(MOST_VALUES) < 1 << 31
