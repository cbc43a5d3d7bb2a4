"""The copies of one unit: original, master copy in host memory, resident copy on the device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch

from .arena import Arena, HostBuffer
from .backend import Backend
from .blocks import Unit
from .errors import UnsupportedModelError
from .layout import Binding, TensorSpec


class Patches(Protocol):
    """Changes to weights (LoRA and others), as the engine sees them."""

    def signature(self, name: str) -> object | None:
        """Something that equals another signature only if both give the same weight; None where nothing changes."""

    def compute(self, name: str, original: torch.Tensor) -> torch.Tensor:
        """The changed weight, in the original's shape; the dtype and device are up to the callee."""


class NoPatches:
    """Weights as they were loaded."""

    def signature(self, name: str) -> object | None:
        return None

    def compute(self, name: str, original: torch.Tensor) -> torch.Tensor:
        return original


class Weights:
    """A buffer with a unit's weights, and which patches are in them.

    Attributes:
        buffer: uint8 memory on the host or on the device.
        binding: points the unit's module at this buffer.
    """

    def __init__(self, unit: Unit, buffer: torch.Tensor) -> None:
        self.unit = unit
        self.buffer = buffer
        with torch.inference_mode(False):
            self.binding: Binding = unit.layout.binding(buffer)
        self._baked: dict[str, object] = {}

    def bind_to(self, buffer: torch.Tensor) -> Binding:
        """Points the unit's module at another buffer, which holds or will hold a copy of this one."""
        return self.unit.layout.binding(buffer)

    @property
    def patched(self) -> bool:
        return bool(self._baked)

    def stale(self, patches: Patches) -> list[TensorSpec]:
        """Tensors whose patches differ from the ones in this buffer."""
        return [spec for spec in self.unit.layout.specs if patches.signature(spec.name) != self._baked.get(spec.name)]

    def write_originals(self) -> None:
        """Fill the buffer with the weights as loaded, cast to the dtypes of the layout."""
        for spec in self.unit.layout.specs:
            _write(spec, self.buffer, spec.original)
        self._baked = {}

    def write_from(self, other: Weights) -> None:
        """Copy another buffer of the same unit as it is, patches included."""
        self.buffer.copy_(other.buffer)
        self._baked = dict(other._baked)

    def bake(self, specs: Iterable[TensorSpec], patches: Patches) -> None:
        """Write ``specs`` anew: patched, or the original where nothing changes them any more."""
        for spec in specs:
            # While it is written the tensor is neither the old nor the new one: should that fail or be interrupted,
            # nobody may take it for either. This copy may outlive the failure.
            self._baked[spec.name] = _UNFINISHED
            signature = patches.signature(spec.name)
            if signature is None:
                _write(spec, self.buffer, spec.original)
                del self._baked[spec.name]
                continue
            original = spec.original if spec.original.dtype == spec.dtype else spec.original.to(spec.dtype)
            _write(spec, self.buffer, patches.compute(spec.name, original))
            self._baked[spec.name] = signature


_UNFINISHED = object()


def _write(spec: TensorSpec, buffer: torch.Tensor, value: torch.Tensor) -> None:
    target = spec.view(buffer)
    if value.is_meta:
        target.zero_()  # The file lacks it; the host makes such a weight zero.
    elif value.shape != target.shape:
        raise UnsupportedModelError(
            f"a patch changes the shape of {spec.name} from {tuple(target.shape)} to {tuple(value.shape)}; "
            "load this model with the host's own loader"
        )
    elif _same_bytes(target, value):
        # numpy copies on the calling thread alone; torch would start a team of threads for each of our threads.
        np.copyto(_as_bytes(target), _as_bytes(value))
    else:
        target.copy_(value.detach())


def _same_bytes(target: torch.Tensor, value: torch.Tensor) -> bool:
    """Both in host memory, and equal byte for byte once copied."""
    on_host = target.device.type == value.device.type == "cpu"
    return on_host and target.dtype == value.dtype and target.is_contiguous() and value.is_contiguous()


def _as_bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


class UnitCopies:
    """Every copy of one unit that exists now.

    The original is a view of the mapped file (or memory that the host filled), so letting go of any other copy
    loses nothing but work.
    """

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self.original_binding = unit.layout.original_binding()
        self.master: Weights | None = None
        self.resident: Weights | None = None
        self._master_memory: HostBuffer | None = None

    def make_master(self, arena: Arena) -> None:
        """Build the master copy from the resident one if there is one, which may be patched, else from the original."""
        if self.master is not None:
            return
        memory = arena.allocate(self.unit.nbytes)
        try:
            master = Weights(self.unit, memory.memory)
            if self.resident is not None and self.resident.patched:
                master.write_from(self.resident)
            else:
                master.write_originals()
            arena.lock(memory)
        except BaseException:
            arena.release(memory)
            raise
        self.master, self._master_memory = master, memory

    def make_resident(self, backend: Backend) -> None:
        """Build the resident copy from the master copy if there is one, else from the original."""
        if self.resident is not None:
            return
        buffer = backend.allocate(self.unit.nbytes)
        try:
            resident = Weights(self.unit, buffer)
            if self.master is not None:
                resident.write_from(self.master)
            else:
                resident.write_originals()
        except BaseException:
            backend.free(buffer)
            raise
        self.resident = resident

    def drop_master(self, arena: Arena) -> None:
        memory, self.master, self._master_memory = self._master_memory, None, None
        self.bind()
        if memory is not None:
            arena.release(memory)

    def drop_resident(self, backend: Backend) -> None:
        resident, self.resident = self.resident, None
        self.bind()  # A module that still pointed at the buffer would keep its memory.
        if resident is not None:
            backend.free(resident.buffer)

    def bind(self) -> None:
        """Point the modules at the resident copy, else at the master copy, else at the original."""
        weights = self.resident or self.master
        (weights.binding if weights is not None else self.original_binding).apply()
