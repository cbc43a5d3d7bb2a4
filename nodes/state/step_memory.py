"""What is in the memory of tensors that a step can write to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ...streaming import format_bytes
from ...streaming.devices.backend import is_out_of_memory
from ...streaming.handoff.away import Away
from ...streaming.model.forms import PLAIN_CLASSES
from ...streaming.model.shown import is_shown

# A tensor of at most so many bytes is copied, as long as all copies of a step take no more than the second.
SMALL_BYTES = 8 << 20
COPIES_BYTES = 64 << 20
# If the model does not run on the CPU, so many bytes of large tensors in host memory are read for a step: some 20 ms.
HOST_BYTES = 128 << 20

# A fingerprint is so many sums, each over the same number of words in a row, so that values that only moved show too.
SUMS = 4096


class _View(NamedTuple):
    """A tensor, and the part of the memory that it showed."""

    tensor: torch.Tensor
    storage: torch.UntypedStorage
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _View:
        return cls(tensor, tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())

    @property
    def memory(self) -> torch.Tensor:
        """Its memory from the first to the last byte, as uint8: elements may lie apart, or overlap."""
        size = self.tensor.element_size()
        elements = 1 + sum((count - 1) * step for count, step in zip(self.shape, self.stride, strict=True))
        empty = torch.empty(0, dtype=torch.uint8, device=self.tensor.device)
        return empty.set_(self.storage, self.offset * size, (elements * size,), (1,))

    def is_elsewhere(self) -> bool:
        """Whether the tensor shows another part of memory now."""
        now = _View.of(self.tensor)
        return now[2:] != self[2:] or now.storage.data_ptr() != self.storage.data_ptr()

    def put_back(self) -> None:
        if self.is_elsewhere():
            self.tensor.set_(*self[1:])


class Memory:
    """The contents of tensors: a copy of small ones, a fingerprint of large ones.

    Args:
        devices: where the model runs. On other devices reading takes CPU time. There a large tensor that counts its
            writes is not read, and of others at most :data:`HOST_BYTES` are.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._devices = set(devices)
        self._views: list[_View] = []
        self._away: list[tuple[Away, Any]] = []
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._fingerprints: list[tuple[torch.Tensor, torch.Tensor | None, str]] = []
        self._counted: list[tuple[torch.Tensor, int, str]] = []
        self._seen: set[tuple[int, int]] = set()
        self._copied = 0
        self._read = 0

    def keep(self, tensor: torch.Tensor, name: str) -> None:
        """Keep what is in ``tensor``, to which ``name`` leads. Weights that streamed modules show are left out."""
        if isinstance(tensor, Away):  # A block on another device has made it.
            self._away.append((tensor, tensor.standing))
            tensor = tensor.on(tensor.place)
        if is_shown(tensor):
            return
        for plain in _parts(tensor):
            self._keep(plain, name)

    def count(self, tensor: torch.Tensor, name: str) -> None:
        """Note how often a weight that is not the streamer's was written to, if it counts that."""
        if not tensor.is_inference():
            self._counted.append((tensor, tensor._version, name))

    def _keep(self, tensor: torch.Tensor, name: str) -> None:
        if tensor.layout is torch.sparse_coo:
            self._copies.append((tensor, tensor.clone()))
        if tensor.layout is not torch.strided or tensor.device.type == "meta":
            return
        view = _View.of(tensor)
        self._views.append(view)
        if tensor.numel() == 0:
            return
        memory = view.memory
        place = (memory.data_ptr(), memory.nbytes)
        if place in self._seen:
            return
        self._seen.add(place)
        small = memory.nbytes <= SMALL_BYTES and self._copied + memory.nbytes <= COPIES_BYTES
        if small and (copy := _if_there_is_room(memory.clone)) is not None:
            self._copied += memory.nbytes
            self._copies.append((memory, copy))
        elif tensor.device in self._devices:
            self._fingerprints.append((memory, _if_there_is_room(lambda: fingerprint(memory)), name))
        elif not tensor.is_inference():
            self._counted.append((tensor, tensor._version, name))
        else:
            self._read += memory.nbytes
            before = fingerprint(memory) if self._read <= HOST_BYTES else None
            self._fingerprints.append((memory, before, name))

    def put_back(self) -> None:
        """Write the copies back. Allocates nothing on the device, which may be full."""
        for away, standing in self._away:
            away.standing = standing
        for view in self._views:
            view.put_back()
        for memory, copy in self._copies:
            # Memory that maps a file is not written to without need.
            if memory.device.type != "cpu" or memory.is_sparse or not torch.equal(memory, copy):
                memory.copy_(copy)

    def written(self) -> str:
        """Which of the tensors of which there are copies was written to, or shows other memory; empty where none."""
        for view in self._views:
            if view.is_elsewhere():
                return f"a tensor of {format_bytes(view.tensor.nbytes)} shows other memory"
        for memory, copy in self._copies:
            now, before = (memory.to_dense(), copy.to_dense()) if memory.is_sparse else (memory, copy)
            if not torch.equal(now, before):
                return f"a tensor of {format_bytes(before.nbytes)} was written to"
        return ""

    def changed(self) -> str:
        """What was written to and cannot be put back; empty where there is nothing. Waits for the devices."""
        for tensor, version, name in self._counted:
            if tensor._version != version:
                return f"a tensor of {format_bytes(tensor.nbytes)} that {name} leads to was written to"
        for memory, before, name in self._fingerprints:
            what = f"a tensor of {format_bytes(memory.nbytes)} that {name} leads to"
            if before is None:
                return f"{what} may have been written to, which nobody can tell"
            if not torch.equal(fingerprint(memory), before):
                return f"{what} was written to"
        return ""


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors whose memory ``tensor`` uses: itself, or those that one of another class or layout is made of."""
    if type(tensor) in PLAIN_CLASSES:
        found = [getattr(tensor, name, None) for name in _INNER.get(tensor.layout, ())]
        yield from (inner() for inner in found) if found else (tensor,)
    elif is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
    else:
        with torch._C.DisableTorchFunctionSubclass():
            yield torch.Tensor.as_subclass(tensor, torch.Tensor)


# Tensors of these layouts are made of others.
_INNER = dict.fromkeys((torch.sparse_csr, torch.sparse_bsr), ("crow_indices", "col_indices", "values"))
_INNER |= dict.fromkeys((torch.sparse_csc, torch.sparse_bsc), ("ccol_indices", "row_indices", "values"))


def _if_there_is_room(make: Any) -> torch.Tensor | None:
    try:
        return make()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None


def fingerprint(memory: torch.Tensor) -> torch.Tensor:
    """Sums of uint8 ``memory``: :data:`SUMS` of 32-bit words, and one of what is left behind them."""
    whole = memory.nbytes // (4 * SUMS) * (4 * SUMS)
    sums = memory[:whole].view(torch.int32).view(SUMS, -1).sum(1, dtype=torch.int64)
    return torch.cat((sums, memory[whole:].sum(dtype=torch.int64).view(1)))
