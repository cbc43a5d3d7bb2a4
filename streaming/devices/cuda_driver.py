"""The CUDA driver's library, and the context of a device in which torch computes."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator, Mapping
from ctypes import POINTER, byref, c_char_p, c_int, c_uint, c_void_p
from typing import Any

# Of cuda.h. CUdevice is an int, CUcontext a pointer.
PROTOTYPES: dict[str, list[Any]] = {
    "cuInit": [c_uint],
    "cuGetErrorName": [c_int, POINTER(c_char_p)],
    "cuDeviceGet": [POINTER(c_int), c_int],
    "cuDevicePrimaryCtxRetain": [POINTER(c_void_p), c_int],
    "cuCtxPushCurrent_v2": [c_void_p],
    "cuCtxPopCurrent_v2": [POINTER(c_void_p)],
}


def open_library(prototypes: Mapping[str, list[Any]]) -> Any:
    """Load the driver's library, with these functions.

    Raises:
        OSError: there is no driver.
        AttributeError: the driver is too old.
    """
    library = ctypes.WinDLL("nvcuda.dll") if sys.platform == "win32" else ctypes.CDLL("libcuda.so.1")
    for name, arguments in prototypes.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, c_int
    return library


class DriverError(RuntimeError):
    """The driver has refused something.

    Attributes:
        code: a CUresult.
    """

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


class CudaContext:
    """A device for calls to the driver.

    Args:
        library: of :func:`open_library`, with at least :data:`PROTOTYPES`.
        index: of the device, as torch and the driver number those that are visible.

    Raises:
        DriverError: the driver has refused something.
    """

    def __init__(self, library: Any, index: int) -> None:
        self._library = library
        self._call("cuInit", 0)
        self._device = c_int()
        self._call("cuDeviceGet", byref(self._device), index)
        self._context: c_void_p | None = None

    def retain(self) -> None:
        """Have the context that torch has, or will have. It is never released, as torch never releases its own."""
        context = c_void_p()
        self._call("cuDevicePrimaryCtxRetain", byref(context), self._device)
        self._context = context

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """While this lasts, the device's context is this thread's; before, it may have none, or another device's."""
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", byref(c_void_p()))

    def _call(self, name: str, *arguments: Any) -> None:
        self._check(name, getattr(self._library, name)(*arguments))

    def _check(self, name: str, code: int) -> None:
        """Raise unless the function ``name`` has returned success."""
        if code:
            text = c_char_p()
            self._library.cuGetErrorName(code, byref(text))
            name_of_code = (text.value or b"an unknown error").decode()
            raise DriverError(f"{name} failed with {name_of_code} ({code})", code)
