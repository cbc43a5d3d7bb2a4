"""The driver's memory pool of one CUDA device, in which torch allocates where its allocator is cudaMallocAsync.

torch gives back the memory that it keeps on all devices at once, waiting for all of them. Where several devices run
steps at the same time, that takes from the others what they keep for theirs, in one piece, and they run out of memory
although enough is free, in small pieces (vram_budget.py, Note: from the same begin).
"""

from __future__ import annotations

import functools
import logging
from ctypes import POINTER, byref, c_int, c_size_t, c_void_p
from typing import Any

import torch

from . import cuda_driver
from .cuda_driver import CudaContext, DriverError

logger = logging.getLogger(__name__)

ALLOCATOR = "cudaMallocAsync"

# CUmemoryPool is a pointer.
PROTOTYPES: dict[str, list[Any]] = {
    **cuda_driver.PROTOTYPES,
    "cuDeviceGetDefaultMemPool": [POINTER(c_void_p), c_int],
    "cuMemPoolTrimTo": [c_void_p, c_size_t],
}


class CudaPool(CudaContext):
    """The pool of one device (CUDA driver API, stream ordered memory allocator).

    Args:
        library: of :func:`.cuda_driver.open_library`, with :data:`PROTOTYPES`.
        index: of the device, as torch and the driver number those that are visible.

    Raises:
        DriverError: the driver has refused something.
    """

    def __init__(self, library: Any, index: int) -> None:
        super().__init__(library, index)
        self._pool = c_void_p()
        self._call("cuDeviceGetDefaultMemPool", byref(self._pool), self._device)
        self.retain()

    def trim(self) -> None:
        """Give back to the device what nobody has allocated. All kernels of the device must be over."""
        with self.current():
            self._call("cuMemPoolTrimTo", self._pool, 0)


def pool_of(index: int) -> CudaPool | None:
    """The pool of a device; None where torch allocates in another way, or the driver has none."""
    if torch.cuda.get_allocator_backend() != ALLOCATOR:
        return None
    return _open(index)


@functools.cache
def _open(index: int) -> CudaPool | None:
    try:
        return CudaPool(cuda_driver.open_library(PROTOTYPES), index)
    except (OSError, AttributeError, DriverError) as error:
        logger.info("torch frees its memory on all GPUs at once: no pool for gpu:%d (%s)", index, error)
        return None
