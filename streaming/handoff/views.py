"""Remembers a view of memory without keeping the memory alive."""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef


class View:
    """Which part of its memory a tensor is, without keeping either alive."""

    def __init__(self, tensor: torch.Tensor, memory: StorageWeakRef | None = None) -> None:
        self._memory = StorageWeakRef(tensor.untyped_storage()) if memory is None else memory
        self._kind = {"dtype": tensor.dtype, "device": tensor.device}
        self._place = (tensor.storage_offset(), tensor.size(), tensor.stride())
        reach = sum(stride * (size - 1) for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
        self._begin = tensor.storage_offset()
        self._end = self._begin + (reach + 1 if tensor.numel() else 0)
        self._is_dense = tensor.numel() == self._end - self._begin

    def covers(self, other: View) -> bool:
        """Whether ``other`` lies wholly in this view, which has no gaps, with the same dtype and device."""
        same = self._kind == other._kind and self._is_dense
        return same and self._begin <= other._begin and other._end <= self._end

    def within(self, other: View, copy: torch.Tensor) -> tuple[torch.UntypedStorage, int, torch.Size, tuple[int, ...]]:
        """Where this view is in ``copy``, a copy of ``other``, which covers it: what ``Tensor.set_`` takes."""
        offset, size, stride = self._place
        return copy.untyped_storage(), copy.storage_offset() + offset - other._begin, size, stride

    def again(self) -> torch.Tensor | None:
        """Return a tensor like that one, on the same memory; None if that memory is not in use any more."""
        if self._memory.expired():
            return None
        storage = torch.UntypedStorage._new_with_weak_ptr(self._memory.cdata)
        return torch.empty(0, **self._kind).set_(storage, *self._place)
