"""Who decodes packed weights on a device: a kernel of ours, or else torch's operations."""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Callable
from ctypes import c_uint
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from ..devices.backend import Backend
from ..devices.cuda_driver import DriverError, open_library
from ..devices.cuda_kernels import PROTOTYPES, CudaKernels, pointer
from ..devices.nvrtc import CompilerError, compile_source
from .codec import EXPONENT_BITS, INDEX_BITS, LANES, Format, format_of, pack, unpack

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("unpack.cu")
# Constants of the kernels: values that a warp decodes, and warps of a block.
WARP_VALUES, WARPS, WARP = 2048, 8, 32
KERNELS = {torch.bfloat16: "unpack_bfloat16", torch.float16: "unpack_float16"}
MOST_PLANES = max(8 - bits for bits in EXPONENT_BITS.values()) + INDEX_BITS
# The least capability for which kernels are compiled: Turing's, the oldest that CUDA 13 knows.
LEAST_CAPABILITY = (7, 5)
# Values whose decoding is timed: as many as a large layer has, or a few where the device is the host's processor.
TIMED_VALUES = 1 << 24
TIMED_VALUES_IN_RAM = 1 << 15
TIMED_RUNS = 4


class Unpacker(Protocol):
    """Decodes on one device.

    Attributes:
        reason: why it is not the fastest way; empty where it is.
    """

    reason: str

    def prepare(self, packed: torch.Tensor, out: torch.Tensor) -> Callable[[], None]:
        """Return a function that queues decoding on the current stream.

        Args:
            packed: uint8, one dimension, at least as long as what will lie there: only its address counts now.
            out: one dimension, contiguous, of the dtype and number of values that were packed.
        """


class KernelFormat(ctypes.Structure):
    """``Format`` in unpack.cu."""

    _fields_ = [
        ("chunks", c_uint),
        ("low", c_uint),
        ("planes", c_uint * MOST_PLANES),
        ("starts", c_uint),
        ("escapes", c_uint),
    ]


def kernel_format(form: Format) -> KernelFormat:
    """Return ``form`` as the kernels take it."""
    return KernelFormat(form.values // LANES, form.low, (c_uint * MOST_PLANES)(*form.planes), form.starts, form.escapes)


class TorchUnpacker:
    """Decodes by torch's operations, on any device: slowly, and in much memory."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def prepare(self, packed: torch.Tensor, out: torch.Tensor) -> Callable[[], None]:
        return partial(unpack, packed, out)


class CudaUnpacker:
    """Decodes by a kernel, which NVRTC compiles.

    Raises:
        CompilerError, DriverError, OSError, AttributeError: there is no compiler, or the driver has refused something.
    """

    reason = ""

    def __init__(self, index: int) -> None:
        capability = torch.cuda.get_device_capability(index)
        if capability < LEAST_CAPABILITY:
            raise CompilerError(f"compute capability {capability[0]}.{capability[1]} is too old")
        code = compile_source(SOURCE.read_text("utf-8"), SOURCE.name, capability)
        self._kernels = CudaKernels(open_library(PROTOTYPES), index, code, KERNELS.values())
        self._device = torch.device("cuda", index)

    def prepare(self, packed: torch.Tensor, out: torch.Tensor) -> Callable[[], None]:
        form = format_of(out.numel(), out.dtype)
        blocks = -(-form.values // (WARP_VALUES * WARPS))
        arguments = (pointer(packed.data_ptr()), pointer(out.data_ptr()), kernel_format(form))
        launch = self._kernels.launch_of(KERNELS[out.dtype], blocks, WARPS * WARP, arguments)
        return lambda: launch(torch.cuda.current_stream(self._device).cuda_stream)


_UNPACKERS: dict[torch.device, Unpacker] = {}
_MAKING = threading.Lock()


def unpacker_of(device: torch.device) -> Unpacker:
    """Return who decodes on ``device``, one for the process."""
    with _MAKING:
        if device not in _UNPACKERS:
            _UNPACKERS[device] = _make(device)
        return _UNPACKERS[device]


def _make(device: torch.device) -> Unpacker:
    if device.type != "cuda" or torch.version.cuda is None:
        return TorchUnpacker("only CUDA has a kernel that decodes")
    try:
        return CudaUnpacker(torch.device(device).index or 0)
    except (CompilerError, DriverError, OSError, AttributeError) as error:
        logger.info("%s has no kernel that decodes packed weights: %s", device, error)
        return TorchUnpacker(str(error))


def unpacked_bytes_per_second(backend: Backend, dtype: torch.dtype = torch.bfloat16) -> float:
    """Measure how fast weights of ``dtype`` are decoded on a device that is idle: bytes of weights a second."""
    device = backend.device
    count = TIMED_VALUES_IN_RAM if backend.is_virtual else TIMED_VALUES
    weights = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    packed = pack(weights)
    assert packed is not None
    run = unpacker_of(device).prepare(packed, weights)
    run()
    begin = backend.moment()
    for _ in range(TIMED_RUNS):
        run()
    end = backend.moment()
    backend.synchronize()
    seconds = backend.seconds(begin, end)
    assert seconds is not None
    return TIMED_RUNS * weights.nbytes / max(seconds, 1e-9)
