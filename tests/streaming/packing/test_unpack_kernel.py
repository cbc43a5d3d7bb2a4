"""The kernel that decodes: its source on the host's own processor, compiled as users have it compiled, and launched."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from driver_library import DriverLibrary
from weights_to_pack import WEIGHTS, bits, every_value, normal
from weightstream.streaming.devices import cuda_kernels, nvrtc
from weightstream.streaming.devices.cuda_driver import DriverError
from weightstream.streaming.devices.cuda_kernels import CudaKernels, pointer
from weightstream.streaming.devices.nvrtc import CompilerError, compile_source
from weightstream.streaming.packing import unpackers
from weightstream.streaming.packing.codec import FEWEST_VALUES, GROUP, format_of, pack
from weightstream.streaming.packing.unpackers import (
    KERNELS,
    SOURCE,
    CudaUnpacker,
    KernelFormat,
    TorchUnpacker,
    kernel_format,
    unpacker_of,
)

HERE = Path(__file__).resolve().parent
COMPILER = shutil.which("g++") or shutil.which("clang++")
# Turing, Ampere, Ada, Hopper, and both kinds of Blackwell.
CAPABILITIES = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
INVALID_VALUE = 1

Run = Callable[[torch.Tensor, torch.Tensor], None]


# -- what it computes --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Decodes by the kernel's source, on threads in place of a warp's lanes."""
    if COMPILER is None:
        pytest.skip("there is no C++ compiler here")
    library = tmp_path_factory.mktemp("kernel") / "emulated.so"
    options = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", f'-DUNPACK="{SOURCE}"']
    subprocess.run([COMPILER, *options, str(HERE / "emulated.cpp"), "-o", str(library)], check=True)
    emulated = ctypes.CDLL(str(library))

    def unpack(packed: torch.Tensor, out: torch.Tensor) -> None:
        function = {torch.bfloat16: emulated.run_bfloat16, torch.float16: emulated.run_float16}[out.dtype]
        form = kernel_format(format_of(out.numel(), out.dtype))
        function(ctypes.c_void_p(packed.data_ptr()), ctypes.c_void_p(out.data_ptr()), ctypes.byref(form))

    return unpack


def check(run: Run, tensor: torch.Tensor) -> None:
    packed = pack(tensor)
    assert packed is not None
    # Beyond its end nothing may be written.
    memory = torch.full((tensor.numel() + 64,), 7, dtype=tensor.dtype)
    run(packed, memory[: tensor.numel()])
    assert torch.equal(bits(memory[: tensor.numel()]), bits(tensor))
    assert (memory[tensor.numel() :] == 7).all()


@pytest.mark.parametrize("dtype", KERNELS)
@pytest.mark.parametrize("count", [FEWEST_VALUES, FEWEST_VALUES + 8, 9 * GROUP + 1000])
def test_it_decodes_what_was_packed(run: Run, count: int, dtype: torch.dtype) -> None:
    check(run, normal(count, dtype))


@pytest.mark.parametrize("dtype", KERNELS)
def test_it_decodes_every_bit_pattern(run: Run, dtype: torch.dtype) -> None:
    check(run, torch.cat([normal(1 << 19, dtype), every_value(dtype)]))


@pytest.mark.parametrize("kind", ["zeros", "minus zeros", "infinite", "all of a group escaped"])
def test_it_decodes_groups_without_and_full_of_escapes(run: Run, kind: str) -> None:
    check(run, WEIGHTS[kind](9 * GROUP + 1000).to(torch.bfloat16))


# -- how it is compiled ------------------------------------------------------------------------------------------------


@pytest.fixture
def compiler() -> None:
    try:
        nvrtc.open_library()
    except CompilerError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_gpu_has_code_with_both_kernels(capability: tuple[int, int]) -> None:
    code = compile_source(SOURCE.read_text("utf-8"), SOURCE.name, capability)
    assert code.startswith(b"\x7fELF")
    assert all(kernel.encode() in code for kernel in KERNELS.values())


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


# -- how it is launched ------------------------------------------------------------------------------------------------


class Library(DriverLibrary):
    """Knows of launches.

    Attributes:
        launches: of each launch the kernel, its blocks and threads, the stream, and its arguments.
    """

    def __init__(self) -> None:
        super().__init__(cuda_kernels.PROTOTYPES)
        self.loaded: list[bytes] = []
        self.functions: list[str] = []
        self.launches: list[tuple[str, int, int, int, tuple[int, int, bytes]]] = []

    def do_cuModuleLoadData(self, module: Any, code: bytes) -> None:
        self.check_context()
        self.loaded.append(code)
        module._obj.value = len(self.loaded)

    def do_cuModuleGetFunction(self, function: Any, module: int, name: bytes) -> None:
        assert module == 1
        self.functions.append(name.decode())
        function._obj.value = len(self.functions)

    def do_cuLaunchKernel(self, function: int, *rest: Any) -> None:
        self.check_context()
        x, y, z, threads, *others, shared, stream, arguments, extra = rest
        assert (y, z, others, shared, extra) == (1, 1, [1, 1], 0, None)
        packed, out, form = arguments
        addresses = [ctypes.cast(one, ctypes.POINTER(ctypes.c_ulonglong))[0] for one in (packed, out)]
        given = (*addresses, ctypes.string_at(form, ctypes.sizeof(KernelFormat)))
        self.launches.append((self.functions[function - 1], x, threads, stream, given))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """torch of CUDA, with two devices, and nothing made."""
    found = SimpleNamespace(library=Library(), capability=(9, 0), error=None)

    def compile_it(source: str, name: str, capability: tuple[int, int]) -> bytes:
        if found.error is not None:
            raise found.error
        assert "unpack_bfloat16" in source
        return f"{name} for {capability}".encode()

    monkeypatch.setattr(unpackers, "_UNPACKERS", {})
    monkeypatch.setattr(unpackers, "compile_source", compile_it)
    monkeypatch.setattr(unpackers, "open_library", lambda prototypes: found.library)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: found.capability)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77 + device.index))
    return found


@pytest.mark.parametrize("dtype", KERNELS)
@pytest.mark.parametrize(("count", "blocks"), [(8 * GROUP, 1), (8 * GROUP + 8, 2), (33 * GROUP, 5)])
def test_a_launch_has_what_the_kernel_takes(
    machine: SimpleNamespace, dtype: torch.dtype, count: int, blocks: int
) -> None:
    unpacker = unpacker_of(torch.device("cuda", 1))
    assert isinstance(unpacker, CudaUnpacker)
    assert unpacker.reason == ""
    assert unpacker_of(torch.device("cuda", 1)) is unpacker
    packed, out = torch.zeros(10, dtype=torch.uint8), torch.zeros(count, dtype=dtype)
    queue = unpacker.prepare(packed, out)
    assert machine.library.launches == []
    queue()
    queue()
    form = bytes(kernel_format(format_of(count, dtype)))
    given = (packed.data_ptr(), out.data_ptr(), form)
    assert machine.library.launches == [(KERNELS[dtype], blocks, 256, 78, given)] * 2
    assert machine.library.loaded == [b"unpack.cu for (9, 0)"]
    assert machine.library.contexts == []


def test_the_kernels_format_is_laid_out_as_in_the_source() -> None:
    fields = [(name, getattr(KernelFormat, name).offset) for name, _ in KernelFormat._fields_]
    assert fields == [("chunks", 0), ("low", 4), ("planes", 8), ("starts", 32), ("escapes", 36)]
    assert "struct Format {\n    u32 chunks, low, planes[6], starts, escapes;\n};" in SOURCE.read_text("utf-8")


def test_what_has_no_kernel_is_decoded_by_torch(machine: SimpleNamespace) -> None:
    second = torch.device("cuda", 1)

    def reason() -> str:
        unpackers._UNPACKERS.clear()
        unpacker = unpacker_of(second)
        assert isinstance(unpacker, TorchUnpacker)
        return unpacker.reason

    machine.capability = (7, 0)
    assert reason() == "compute capability 7.0 is too old"
    machine.capability = (9, 0)
    machine.error = CompilerError("NVRTC is not there")
    assert reason() == "NVRTC is not there"
    machine.error = None
    machine.library.fails = {"cuModuleLoadData": INVALID_VALUE}
    assert reason() == "cuModuleLoadData failed with CUDA_ERROR_OF_SOME_KIND (1)"
    assert machine.library.contexts == []
    assert unpacker_of(torch.device("cpu")).reason == "only CUDA has a kernel that decodes"


def test_a_launch_that_fails_says_so(machine: SimpleNamespace) -> None:
    kernels = CudaKernels(machine.library, 1, b"code", KERNELS.values())
    launch = kernels.launch_of("unpack_bfloat16", 1, 256, (pointer(1), pointer(2), KernelFormat()))
    machine.library.fails = {"cuLaunchKernel": INVALID_VALUE}
    with pytest.raises(DriverError, match="cuLaunchKernel failed"):
        launch(0)
    assert machine.library.contexts == []


def test_torchs_way_decodes_too() -> None:
    tensor = normal(FEWEST_VALUES, torch.bfloat16)
    out = torch.zeros_like(tensor)
    unpacker_of(torch.device("cpu")).prepare(pack(tensor), out)()
    assert torch.equal(bits(out), bits(tensor))
