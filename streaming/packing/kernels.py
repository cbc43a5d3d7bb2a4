"""Kernels of ours that pack and unpack: how they are compiled, and who works by them or else by torch's operations."""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Callable, Iterable
from ctypes import c_uint
from pathlib import Path
from typing import Generic, TypeVar

import torch

from ..devices.cuda_driver import DriverError, open_library
from ..devices.cuda_kernels import PROTOTYPES, CudaKernels
from ..devices.nvrtc import CompilerError, compile_source
from .codec import EXPONENT_BITS, GROUP, INDEX_BITS, VALUES_PER_BYTE, Format

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
# What the sources include.
HEADER = FOLDER / "format.cuh"
# Constants of the kernels: warps of a block, each of which has a group at a time, and lanes of a warp.
WARPS, WARP = 8, 32
MOST_PLANES = max(8 - bits for bits in EXPONENT_BITS.values()) + INDEX_BITS
# The least capability for which kernels are compiled: Turing's, the oldest that CUDA 13 knows.
LEAST_CAPABILITY = (7, 5)

T = TypeVar("T")


class KernelFormat(ctypes.Structure):
    """``Format`` in format.cuh."""

    _fields_ = [
        ("chunks", c_uint),
        ("low", c_uint),
        ("planes", c_uint * MOST_PLANES),
        ("starts", c_uint),
        ("escapes", c_uint),
    ]


def kernel_format(form: Format) -> KernelFormat:
    """Return ``form`` as the kernels take it."""
    return KernelFormat(
        form.values // VALUES_PER_BYTE, form.low, (c_uint * MOST_PLANES)(*form.planes), form.starts, form.escapes
    )


def blocks_of(values: int, groups: int = 1) -> int:
    """Return how many blocks have all ``values``, if each warp has so many ``groups``."""
    return -(-values // (GROUP * groups * WARPS))


def load_kernels(index: int, source: Path, names: Iterable[str]) -> CudaKernels:
    """Compile ``source`` for the CUDA device with this index, and load the kernels with these names.

    Raises:
        CompilerError, DriverError, OSError, AttributeError: there is no compiler, or the driver has refused something.
    """
    capability = torch.cuda.get_device_capability(index)
    if capability < LEAST_CAPABILITY:
        raise CompilerError(f"compute capability {capability[0]}.{capability[1]} is too old")
    headers = {HEADER.name: HEADER.read_text("utf-8")}
    code = compile_source(source.read_text("utf-8"), source.name, capability, headers=headers)
    return CudaKernels(open_library(PROTOTYPES), index, code, names)


class OnePerDevice(Generic[T]):
    """Makes one thing for each device of the process: one with kernels, or else one that is told why it has none.

    Args:
        with_kernels: makes it for the CUDA device with an index; may raise what :func:`load_kernels` raises.
        without: makes it, with the reason.
    """

    def __init__(self, with_kernels: Callable[[int], T], without: Callable[[str], T]) -> None:
        self._with_kernels = with_kernels
        self._without = without
        self._made: dict[torch.device, T] = {}
        self._making = threading.Lock()

    def of(self, device: torch.device) -> T:
        """Return that of ``device``."""
        if (made := self._made.get(device)) is not None:
            return made  # While one is made, which takes seconds, others are there already.
        with self._making:
            if device not in self._made:
                self._made[device] = self._make(device)
            return self._made[device]

    def _make(self, device: torch.device) -> T:
        if device.type != "cuda" or torch.version.cuda is None:
            return self._without("only CUDA has kernels for packed weights")
        try:
            return self._with_kernels(device.index or 0)
        except (CompilerError, DriverError, OSError, AttributeError) as error:
            logger.info("%s has no kernels for packed weights: %s", device, error)
            return self._without(str(error))
