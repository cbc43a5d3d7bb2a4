"""Launches kernels that were compiled on the user's machine (nvrtc.py), by the driver."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from ctypes import POINTER, byref, c_char_p, c_uint, c_ulonglong, c_void_p
from typing import Any

from . import cuda_driver
from .cuda_driver import CudaContext

# CUmodule, CUfunction and CUstream are pointers.
PROTOTYPES: dict[str, list[Any]] = {
    **cuda_driver.PROTOTYPES,
    "cuModuleLoadData": [POINTER(c_void_p), c_char_p],
    "cuModuleGetFunction": [POINTER(c_void_p), c_void_p, c_char_p],
    "cuLaunchKernel": [c_void_p, *[c_uint] * 7, c_void_p, POINTER(c_void_p), c_void_p],
}


class CudaKernels(CudaContext):
    """The kernels of one program on one device.

    Args:
        library: of :func:`cuda_driver.open_library`, with :data:`PROTOTYPES`.
        index: of the device, as torch and the driver number those that are visible.
        code: a cubin for this device. It stays loaded as long as the process runs.
        names: of the kernels in it.

    Raises:
        DriverError: the driver has refused something.
    """

    def __init__(self, library: Any, index: int, code: bytes, names: Iterable[str]) -> None:
        super().__init__(library, index)
        self.retain()
        module = c_void_p()
        self._functions = {name: c_void_p() for name in names}
        with self.current():
            self._call("cuModuleLoadData", byref(module), code)
            for name, function in self._functions.items():
                self._call("cuModuleGetFunction", byref(function), module, name.encode())

    def launch_of(self, name: str, blocks: int, threads: int, arguments: Sequence[Any]) -> Launch:
        """Return a launch of the kernel ``name``, which may be made often.

        Args:
            blocks, threads: of the grid, and of each block; one dimension.
            arguments: values of ctypes, as the kernel declares them.
        """
        return Launch(self, self._functions[name], blocks, threads, arguments)

    def launch(self, place: Sequence[Any], stream: int, arguments: Any) -> None:
        """Launch a kernel, with as little of Python around it as may be."""
        library = self._library
        self._check("cuCtxPushCurrent_v2", library.cuCtxPushCurrent_v2(self._context))
        code = library.cuLaunchKernel(*place, stream, arguments, None)
        library.cuCtxPopCurrent_v2(byref(c_void_p()))
        self._check("cuLaunchKernel", code)


class Launch:
    """One way of launching a kernel: where, with what. Everything is prepared, as it is launched in every step."""

    def __init__(
        self, kernels: CudaKernels, function: c_void_p, blocks: int, threads: int, arguments: Sequence[Any]
    ) -> None:
        self._launch = kernels.launch
        self._kept = tuple(arguments)
        pointers = [ctypes.cast(byref(argument), c_void_p) for argument in self._kept]
        self._arguments = (c_void_p * len(pointers))(*pointers)
        self._place = function, blocks, 1, 1, threads, 1, 1, 0

    def __call__(self, stream: int) -> None:
        """Queue the kernel on a stream of the device (a CUstream, as torch's ``Stream.cuda_stream`` has it)."""
        self._launch(self._place, stream, self._arguments)


def pointer(address: int) -> c_ulonglong:
    """A pointer to memory of a device, as an argument of a kernel."""
    return c_ulonglong(address)
