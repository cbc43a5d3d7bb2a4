"""What a unit's buffer shall hold: the bytes of its tensors, from the file or from memory, in the layout's dtypes.

A tensor that maps a file is read from that file through its source and never through the mapping: touching the mapping
of a truncated file ends the process. Tensors that the host transformed while it loaded them are read from memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ..devices.copies import ALIGNMENT
from .layout import Layout, TensorSpec


def ranges(layout: Layout, largest: int) -> Iterator[tuple[int, int]]:
    """Cut a unit's buffer into ranges of at most ``largest`` bytes, each from an aligned offset to another."""
    step = max(ALIGNMENT, largest // ALIGNMENT * ALIGNMENT)
    for start in range(0, layout.nbytes, step):
        yield start, min(start + step, layout.nbytes)


def read_range(layout: Layout, start: int, stop: int, target: torch.Tensor, forget: bool = False) -> None:
    """Write the bytes ``start`` to ``stop`` of a unit's buffer to ``target``; what lies between tensors stays as it is.

    Args:
        target: uint8, contiguous, in host memory, of ``stop - start`` bytes.
        forget: have the system drop these bytes from its file cache, as they will not be read again soon.

    Raises:
        CheckpointError: a file cannot be read, or is not the one that was loaded.
    """
    for spec in layout.specs:
        first, last = max(start, spec.offset), min(stop, spec.offset + spec.nbytes)
        if first < last:
            part = target[first - start : last - start]
            _read_part(spec, first - spec.offset, last - spec.offset, part)
            if forget and spec.source is not None:
                scale = spec.original.dtype.itemsize / spec.dtype.itemsize
                spec.source.forget(int((first - spec.offset) * scale), int((last - first) * scale))


def read_tensor(spec: TensorSpec) -> torch.Tensor:
    """Read a tensor into memory of its own, with the shape, strides and dtype of ``spec``.

    Raises:
        CheckpointError: a file cannot be read, or is not the one that was loaded.
    """
    memory = torch.from_numpy(np.empty(spec.nbytes, np.uint8))
    if spec.nbytes:
        _read_part(spec, 0, spec.nbytes, memory)
    return memory.view(spec.dtype).as_strided(spec.shape, spec.stride)


def needs_work(layout: Layout) -> bool:
    """Whether reading takes more than moving bytes, so that the result is worth keeping."""
    return any(not _is_plain(spec) and not spec.original.is_meta for spec in layout.specs)


def _read_part(spec: TensorSpec, start: int, stop: int, target: torch.Tensor) -> None:
    """Write the bytes ``start`` to ``stop`` of a tensor in the layout's form to ``target``."""
    if spec.original.is_meta:
        target.zero_()  # The file lacks it; the host makes such a weight zero.
    elif _is_plain(spec):
        _read_original(spec, start, stop, target)
    elif spec.original.stride() == spec.stride:
        # Cast on the way, element by element.
        size, wide = spec.dtype.itemsize, spec.original.dtype.itemsize
        raw = torch.from_numpy(np.empty((stop - start) // size * wide, np.uint8))
        _read_original(spec, start // size * wide, stop // size * wide, raw)
        target.copy_(raw.view(spec.original.dtype).to(spec.dtype).view(torch.uint8))
    else:
        value = torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype).copy_(spec.original)
        np.copyto(target.numpy(), _bytes_of(value)[start:stop])


def _read_original(spec: TensorSpec, start: int, stop: int, target: torch.Tensor) -> None:
    """Write the bytes ``start`` to ``stop`` of a tensor as it was loaded to ``target``."""
    if spec.source is not None:
        spec.source.read_into(memoryview(target.numpy()), start)
    else:
        # numpy copies on the calling thread alone; torch would start a team of threads for each of our threads.
        np.copyto(target.numpy(), _bytes_of(spec.original)[start:stop])


def _is_plain(spec: TensorSpec) -> bool:
    """Whether the layout's form is the original's, byte for byte."""
    return spec.original.dtype == spec.dtype and spec.original.stride() == spec.stride


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """Return the memory of a tensor without gaps, in the order of addresses."""
    tensor = tensor.detach()
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()
