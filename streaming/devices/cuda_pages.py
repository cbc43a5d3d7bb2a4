"""Pages of a CUDA device, from the driver itself (CUDA driver API, virtual memory management).

They are used if torch is built for CUDA, with an allocator of its own, and the driver and the device have all that is
needed; otherwise torch allocates all memory. An allocator that was plugged into torch may account for every byte of a
device, so nothing is allocated beside it.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
from collections.abc import Iterator
from ctypes import POINTER, byref, c_int, c_size_t, c_ubyte, c_ulonglong, c_ushort, c_void_p
from typing import Any

import torch

from . import cuda_driver
from .cuda_driver import CudaContext, DriverError
from .lasting_memory import LastingMemory, PageCounts
from .pages import OutOfPagesError

logger = logging.getLogger(__name__)

# Constants of cuda.h.
OUT_OF_MEMORY = 2
ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED = 102
ALLOCATION_TYPE_PINNED = 1
LOCATION_TYPE_DEVICE = 1
ACCESS_READ_WRITE = 3
GRANULARITY_MINIMUM = 0

# Addresses that are reserved at once, as a multiple of the device's memory.
ADDRESSES = 4


class Location(ctypes.Structure):
    _fields_ = [("type", c_int), ("id", c_int)]


class AllocationFlags(ctypes.Structure):
    _fields_ = [
        ("compression_type", c_ubyte),
        ("gpu_direct_rdma_capable", c_ubyte),
        ("usage", c_ushort),
        ("reserved", c_ubyte * 4),
    ]


class AllocationProperties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = [
        ("type", c_int),
        ("requested_handle_types", c_int),
        ("location", Location),
        ("win32_handle_metadata", c_void_p),
        ("flags", AllocationFlags),
    ]


class Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = [("location", Location), ("flags", c_int)]


# CUdeviceptr and CUmemGenericAllocationHandle are unsigned long longs.
PROTOTYPES: dict[str, list[Any]] = {
    **cuda_driver.PROTOTYPES,
    "cuDeviceGetAttribute": [POINTER(c_int), c_int, c_int],
    "cuMemGetAllocationGranularity": [POINTER(c_size_t), POINTER(AllocationProperties), c_int],
    "cuMemAddressReserve": [POINTER(c_ulonglong), c_size_t, c_size_t, c_ulonglong, c_ulonglong],
    "cuMemAddressFree": [c_ulonglong, c_size_t],
    "cuMemCreate": [POINTER(c_ulonglong), c_size_t, POINTER(AllocationProperties), c_ulonglong],
    "cuMemRelease": [c_ulonglong],
    "cuMemMap": [c_ulonglong, c_size_t, c_size_t, c_ulonglong, c_ulonglong],
    "cuMemUnmap": [c_ulonglong, c_size_t],
    "cuMemSetAccess": [c_ulonglong, c_size_t, POINTER(Access), c_size_t],
}


def open_library() -> Any:
    """Load the driver's library, with the functions above, or raise as :func:`cuda_driver.open_library` does."""
    return cuda_driver.open_library(PROTOTYPES)


class CudaPageDriver(CudaContext):
    """A :class:`PageDriver` of one device, in the context that torch computes in.

    Args:
        library: of :func:`open_library`.
        index: of the device, as torch and the driver number those that are visible.

    Raises:
        RuntimeError: the driver has refused something, or the device cannot do this.
    """

    def __init__(self, library: Any, index: int) -> None:
        super().__init__(library, index)
        supported, page = c_int(), c_size_t()
        attribute = ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
        self._call("cuDeviceGetAttribute", byref(supported), attribute, self._device)
        if not supported.value:
            raise RuntimeError("the device has no virtual memory management")
        location = Location(LOCATION_TYPE_DEVICE, self._device.value)
        self._properties = AllocationProperties(ALLOCATION_TYPE_PINNED, 0, location)
        self._access = Access(location, ACCESS_READ_WRITE)
        self._call("cuMemGetAllocationGranularity", byref(page), byref(self._properties), GRANULARITY_MINIMUM)
        self.page_bytes = page.value
        self.retain()

    def reserve(self, nbytes: int) -> int:
        address = c_ulonglong()
        with self.current():
            self._call("cuMemAddressReserve", byref(address), nbytes, 0, 0, 0)
        return address.value

    def unreserve(self, address: int, nbytes: int) -> None:
        with self._giving_back(), self.current():
            self._call("cuMemAddressFree", address, nbytes)

    def map(self, address: int, nbytes: int) -> None:
        with self.current():
            handle = c_ulonglong()
            self._call("cuMemCreate", byref(handle), nbytes, byref(self._properties), 0)
            try:
                self._call("cuMemMap", address, nbytes, 0, handle, 0)
            finally:
                self._call("cuMemRelease", handle)  # The mapping keeps the memory, and gives it back when it goes.
            try:
                self._call("cuMemSetAccess", address, nbytes, byref(self._access), 1)
            except BaseException:
                self._call("cuMemUnmap", address, nbytes)
                raise

    def unmap(self, address: int, nbytes: int) -> None:
        with self._giving_back(), self.current():
            self._call("cuMemUnmap", address, nbytes)

    @contextlib.contextmanager
    def _giving_back(self) -> Iterator[None]:
        """Freeing needs no memory: if the driver finds none all the same, that is a fault like any other."""
        try:
            yield
        except OutOfPagesError as error:
            raise RuntimeError(str(error)) from error

    def _call(self, name: str, *arguments: Any) -> None:
        try:
            super()._call(name, *arguments)
        except DriverError as error:
            if error.code == OUT_OF_MEMORY:
                raise OutOfPagesError(f"{name} found no memory") from None
            raise


_MEMORIES: dict[int, LastingMemory | None] = {}
_OPENING = threading.Lock()


def lasting_memory(index: int) -> LastingMemory | None:
    """Return the memory in pages of this device, one for the process; None if torch must allocate all memory."""
    with _OPENING:
        if index not in _MEMORIES:
            _MEMORIES[index] = _open(index)
    memory = _MEMORIES[index]
    return memory if memory is not None and memory.works and not _is_limited(index) else None


def opened_memory(index: int) -> LastingMemory | None:
    """As :func:`lasting_memory`, but without opening it, and also if the driver has refused something."""
    return _MEMORIES.get(index)


def page_counts(index: int) -> PageCounts:
    """Return the bytes of this device that this process has in pages."""
    memory = opened_memory(index)
    return PageCounts() if memory is None else memory.counts()


def _is_limited(index: int) -> bool:
    """Whether torch was given a limit to this process's memory on this device: that must hold for weights too."""
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # Since torch 2.7.
    return fraction is not None and fraction(index) < 1


def _open(index: int) -> LastingMemory | None:
    if torch.version.cuda is None or torch.cuda.get_allocator_backend() == "pluggable":
        return None
    try:
        driver = CudaPageDriver(open_library(), index)
    except (OSError, AttributeError, RuntimeError, OutOfPagesError) as error:
        logger.info("cuda:%d has no pages for weights, torch gives their memory: %s", index, error)
        return None
    device = torch.device("cuda", index)
    return LastingMemory(
        driver,
        ADDRESSES * torch.cuda.get_device_properties(index).total_memory,
        lambda memory: torch.as_tensor(memory, device=device),
        lambda: torch.cuda.synchronize(device),
    )
