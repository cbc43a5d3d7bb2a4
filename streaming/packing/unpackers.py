"""Who decodes packed weights on a device: a kernel of ours, or else torch's operations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch

from ..devices.backend import Backend
from ..devices.cuda_kernels import pointer
from .codec import format_of, unpack
from .kernels import FOLDER, WARP, WARPS, OnePerDevice, blocks_of, kernel_format, load_kernels
from .packers import packer_of

SOURCE = FOLDER / "unpack.cu"
KERNELS = {torch.bfloat16: "unpack_bfloat16", torch.float16: "unpack_float16"}
# Values whose decoding is timed, in each of some tensors in turn: so many that launching takes less time than decoding,
# and together more than a GPU's cache holds; or a few where the device is the host's processor.
TIMED_VALUES, TIMED_TENSORS = 1 << 24, 3
TIMED_VALUES_IN_RAM = 1 << 15
TIMED_ROUNDS = 3


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


class TorchUnpacker:
    """Decodes by torch's operations, on any device: slowly, and in much memory."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def prepare(self, packed: torch.Tensor, out: torch.Tensor) -> Callable[[], None]:
        return partial(unpack, packed, out)


class CudaUnpacker:
    """Decodes by a kernel, which NVRTC compiles.

    Raises:
        CompilerError, DriverError, OSError, AttributeError: as :func:`kernels.load_kernels` does.
    """

    reason = ""

    def __init__(self, index: int) -> None:
        self._kernels = load_kernels(index, SOURCE, KERNELS.values())
        self._device = torch.device("cuda", index)

    def prepare(self, packed: torch.Tensor, out: torch.Tensor) -> Callable[[], None]:
        form = format_of(out.numel(), out.dtype)
        arguments = (pointer(packed.data_ptr()), pointer(out.data_ptr()), kernel_format(form))
        launch = self._kernels.launch_of(KERNELS[out.dtype], blocks_of(form.values), WARPS * WARP, arguments)
        return lambda: launch(torch.cuda.current_stream(self._device).cuda_stream)


_UNPACKERS: OnePerDevice[Unpacker] = OnePerDevice(CudaUnpacker, TorchUnpacker)


def unpacker_of(device: torch.device) -> Unpacker:
    """Return who decodes on ``device``, one for the process."""
    return _UNPACKERS.of(device)


def unpacked_bytes_per_second(backend: Backend, dtype: torch.dtype) -> float:
    """Measure how fast weights of ``dtype`` are decoded on a device that is idle: bytes of weights a second.

    It takes 105 MB on the device for a moment.
    """
    device = backend.device
    count = TIMED_VALUES_IN_RAM if backend.is_virtual else TIMED_VALUES
    weights = torch.randn(count, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)
    (sized,) = packer_of(device).sizes([weights])
    assert sized.nbytes is not None
    packed = [torch.empty(sized.nbytes, dtype=torch.uint8, device=device) for _ in range(TIMED_TENSORS)]
    for one in packed:
        sized.write(one)
    runs = [unpacker_of(device).prepare(one, weights) for one in packed]
    for run in runs:
        run()
    begin = backend.moment()
    for run in runs * TIMED_ROUNDS:
        run()
    end = backend.moment()
    backend.synchronize()
    seconds = backend.seconds(begin, end)
    assert seconds is not None
    return TIMED_ROUNDS * TIMED_TENSORS * weights.nbytes / max(seconds, 1e-9)
