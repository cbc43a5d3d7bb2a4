"""Who packs weights on a device: kernels of ours, or else torch's operations."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_ubyte, c_uint
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch

from ..devices.cuda_kernels import pointer
from .codec import EXPONENT_BITS, TABLE, format_of, measure, pack_into, packed_bytes
from .kernels import FOLDER, WARP, WARPS, OnePerDevice, blocks_of, kernel_format, load_kernels

SOURCE = FOLDER / "pack.cu"
# Constants of the kernels: groups that a warp counts, and exponents that there may be.
COUNTED_GROUPS, EXPONENTS = 8, 1 << max(EXPONENT_BITS.values())
NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
KERNELS = ("choose", *(f"{step}_{name}" for step in ("count", "escapes", "pack") for name in NAMES.values()))


class Sized(NamedTuple):
    """A tensor of which is known how large it is packed.

    Attributes:
        nbytes: then; None where packing is not worth it.
        write: queues packing, on the stream on which the tensor was sized, into uint8 memory of exactly ``nbytes`` that
            begins at a multiple of 16; every byte of it is written. The tensor may not change before.
    """

    nbytes: int | None
    write: Callable[[torch.Tensor], None]


class Packer(Protocol):
    """Packs on one device.

    Attributes:
        reason: why it is not the fastest way; empty where it is.
    """

    reason: str

    def sizes(self, tensors: Sequence[torch.Tensor]) -> list[Sized]:
        """Find out how large ``tensors`` are packed. The host waits for the current stream.

        Args:
            tensors: each of one dimension, contiguous, at a multiple of 16, one for which :func:`codec.may_pack` holds.
        """


class TorchPacker:
    """Packs by torch's operations, on any device: slowly, and in much memory; the host waits for each tensor."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def sizes(self, tensors: Sequence[torch.Tensor]) -> list[Sized]:
        measured = [measure(tensor) for tensor in tensors]
        return [
            Sized(nbytes, partial(pack_into, tensor, table))
            for tensor, (table, nbytes) in zip(tensors, measured, strict=True)
        ]


class KernelExponents(ctypes.Structure):
    """``Exponents`` in pack.cu."""

    _fields_ = [
        ("counts", c_uint * EXPONENTS),
        ("table", c_ubyte * (TABLE + 1)),
        ("escaped", c_uint),
        ("unused", c_uint),
    ]


# Memory of the device that a tensor takes from when it is sized until it is written. Beside it torch.cumsum takes less
# than a byte for each group for a moment. All that is in torch's own segments for small tensors, of 2 MiB.
SCRATCH_BYTES = ctypes.sizeof(KernelExponents)
_WORDS, _ESCAPED = SCRATCH_BYTES // 4, KernelExponents.escaped.offset // 4


class CudaPacker:
    """Packs by kernels, which NVRTC compiles. The host waits once for all tensors that are sized together.

    Everything is queued on the stream that is torch's current one. torch gives memory that is freed here to others on
    that stream alone, which is behind the kernels that use it: nobody need wait for them.

    Raises:
        CompilerError, DriverError, OSError, AttributeError: as :func:`kernels.load_kernels` does.
    """

    reason = ""

    def __init__(self, index: int) -> None:
        self._kernels = load_kernels(index, SOURCE, KERNELS)
        self._device = torch.device("cuda", index)

    def sizes(self, tensors: Sequence[torch.Tensor]) -> list[Sized]:
        if not tensors:
            return []
        found = tensors[0].new_zeros((len(tensors), _WORDS), dtype=torch.int32)
        for tensor, exponents in zip(tensors, found, strict=True):
            self._count(tensor, exponents)
        escaped = found[:, _ESCAPED].tolist()  # The host waits here.
        return [self._sized(*each) for each in zip(tensors, found, escaped, strict=True)]

    def _count(self, tensor: torch.Tensor, exponents: torch.Tensor) -> None:
        values, place = pointer(tensor.data_ptr()), pointer(exponents.data_ptr())
        form = kernel_format(format_of(tensor.numel(), tensor.dtype))
        blocks = blocks_of(tensor.numel(), COUNTED_GROUPS)
        self._launch(f"count_{NAMES[tensor.dtype]}", blocks, values, c_uint(form.chunks), place)
        self._launch("choose", 1, place)

    def _sized(self, tensor: torch.Tensor, exponents: torch.Tensor, escaped: int) -> Sized:
        nbytes = packed_bytes(format_of(tensor.numel(), tensor.dtype), escaped)
        return Sized(nbytes, partial(self._write, tensor, exponents))

    def _write(self, tensor: torch.Tensor, exponents: torch.Tensor, out: torch.Tensor) -> None:
        form = format_of(tensor.numel(), tensor.dtype)
        places = [pointer(each.data_ptr()) for each in (tensor, exponents, out)]
        name, blocks = NAMES[tensor.dtype], blocks_of(form.values)
        self._launch(f"escapes_{name}", blocks, *places, kernel_format(form))
        # Each group's place has the number of escapes of the group before it.
        out[form.starts :][: 4 * form.groups].view(torch.int32).cumsum_(0)
        self._launch(f"pack_{name}", blocks, *places, kernel_format(form))

    def _launch(self, kernel: str, blocks: int, *arguments: Any) -> None:
        launch = self._kernels.launch_of(kernel, blocks, WARPS * WARP, arguments)
        launch(torch.cuda.current_stream(self._device).cuda_stream)


_PACKERS: OnePerDevice[Packer] = OnePerDevice(CudaPacker, TorchPacker)


def packer_of(device: torch.device) -> Packer:
    """Return who packs on ``device``, one for the process."""
    return _PACKERS.of(device)
