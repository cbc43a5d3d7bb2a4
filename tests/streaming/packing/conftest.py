"""Kernels for packed weights without a GPU: a driver that notes launches, and runs them on the host's own processor."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from driver_library import DriverLibrary
from weightstream.streaming.devices import cuda_kernels, nvrtc
from weightstream.streaming.devices.nvrtc import CompilerError
from weightstream.streaming.packing import kernels, packers, unpackers
from weightstream.streaming.packing.kernels import OnePerDevice

HERE = Path(__file__).resolve().parent
COMPILER = shutil.which("g++") or shutil.which("clang++")
POINTER, FORMAT = 8, ctypes.sizeof(kernels.KernelFormat)
# Bytes of the arguments of each kernel, by the first word of its name.
ARGUMENTS = {
    "unpack": (POINTER, POINTER, FORMAT),
    "count": (POINTER, 4, POINTER),
    "choose": (POINTER,),
    "escapes": (POINTER, POINTER, POINTER, FORMAT),
    "pack": (POINTER, POINTER, POINTER, FORMAT),
}


class Launched(NamedTuple):
    """A launch, with the bytes of its arguments."""

    kernel: str
    blocks: int
    threads: int
    stream: int
    arguments: tuple[bytes, ...]


class Library(DriverLibrary):
    """Knows of launches.

    Attributes:
        emulated: carries them out; None where nothing does.
    """

    def __init__(self) -> None:
        super().__init__(cuda_kernels.PROTOTYPES)
        self.loaded: list[bytes] = []
        self.functions: list[str] = []
        self.launches: list[Launched] = []
        self.emulated: ctypes.CDLL | None = None

    def do_cuModuleLoadData(self, module: Any, code: bytes) -> None:
        self.check_context()
        self.loaded.append(code)
        module._obj.value = len(self.loaded)

    def do_cuModuleGetFunction(self, function: Any, module: int, name: bytes) -> None:
        assert module == len(self.loaded)
        self.functions.append(name.decode())
        function._obj.value = len(self.functions)

    def do_cuLaunchKernel(self, function: int, *rest: Any) -> None:
        self.check_context()
        x, y, z, threads, *others, shared, stream, arguments, extra = rest
        assert (y, z, others, shared, extra) == (1, 1, [1, 1], 0, None)
        name = self.functions[function - 1]
        sizes = ARGUMENTS[name.partition("_")[0]]
        given = tuple(ctypes.string_at(each, size) for each, size in zip(arguments, sizes, strict=True))
        self.launches.append(Launched(name, x, threads, stream, given))
        if self.emulated is not None:
            self.emulated.launch(name.encode(), x, threads, arguments)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """torch of CUDA, with two devices, and nothing made."""
    found = SimpleNamespace(library=Library(), capability=(9, 0), error=None)

    def compile_it(source: str, name: str, capability: tuple[int, int], headers: dict[str, str]) -> bytes:
        if found.error is not None:
            raise found.error
        assert '#include "format.cuh"' in source
        assert "struct Format" in headers["format.cuh"]
        return f"{name} for {capability}".encode()

    monkeypatch.setattr(unpackers, "_UNPACKERS", OnePerDevice(unpackers.CudaUnpacker, unpackers.TorchUnpacker))
    monkeypatch.setattr(packers, "_PACKERS", OnePerDevice(packers.CudaPacker, packers.TorchPacker))
    monkeypatch.setattr(kernels, "compile_source", compile_it)
    monkeypatch.setattr(kernels, "open_library", lambda prototypes: found.library)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: found.capability)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77 + device.index))
    return found


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels' sources on the host's processor, with threads in place of a warp's lanes."""
    if COMPILER is None:
        pytest.skip("there is no C++ compiler here")
    library = tmp_path_factory.mktemp("kernels") / "emulated.so"
    options = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread"]
    sources = [f'-DPACK="{packers.SOURCE}"', f'-DUNPACK="{unpackers.SOURCE}"', str(HERE / "emulated.cpp")]
    subprocess.run([COMPILER, *options, *sources, "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture
def emulation(machine: SimpleNamespace, emulated: ctypes.CDLL) -> SimpleNamespace:
    """That machine, whose second device computes."""
    machine.library.emulated = emulated
    return machine


@pytest.fixture
def compiler() -> None:
    try:
        nvrtc.open_library()
    except CompilerError as error:
        pytest.skip(str(error))
