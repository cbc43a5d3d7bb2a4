"""How the tensors of a unit lie in one contiguous buffer, and how modules are pointed at them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

# Every tensor starts on a 512-byte boundary, as torch's CUDA allocator gives it: matrix libraries choose their
# kernels by alignment, and another kernel may round differently.
ALIGNMENT = 512


@dataclass(frozen=True)
class Place:
    """Where a module keeps a tensor: ``holder[attribute]``, the module's own dictionary of parameters or buffers.

    The dictionary is kept instead of the module, so that what refers to a layout does not keep the module alive.
    """

    holder: dict[str, torch.Tensor | None] = field(repr=False)
    attribute: str
    is_parameter: bool


class Source(Protocol):
    """Where a tensor's bytes can be read from again: a part of a file."""

    def read_into(self, target: memoryview, start: int = 0) -> None:
        """Read ``len(target)`` bytes from byte ``start`` of the tensor on."""

    def check(self) -> None:
        """Raise unless the bytes are still those that were there when the model was loaded."""

    def forget(self, start: int, nbytes: int) -> None:
        """Nobody will read these bytes again soon: the system need not keep them in memory."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a unit.

    Attributes:
        name: full name, from the model's root; of a tied tensor the first.
        aliases: the other names of a tied tensor.
        places: every place that holds this tensor (several when it is tied).
        original: the tensor as it was loaded: the truth, never written to.
        shape, stride, dtype: as bound; ``dtype`` may differ from the original's (cast on the way).
        offset, nbytes: bytes from the buffer's start, and bytes used.
        source: the file's part that ``original`` maps; None for one that exists in memory alone.
    """

    name: str
    aliases: tuple[str, ...]
    places: tuple[Place, ...]
    original: torch.Tensor = field(repr=False)
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    nbytes: int
    source: Source | None = field(default=None, repr=False)

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """This tensor's part of ``buffer`` (uint8, one dimension), typed and shaped."""
        flat = buffer[self.offset : self.offset + self.nbytes].view(self.dtype)
        return flat.as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class Layout:
    """The tensors of one unit, packed into ``nbytes`` bytes."""

    specs: tuple[TensorSpec, ...]
    nbytes: int

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        return [spec.view(buffer) for spec in self.specs]

    def binding(self, buffer: torch.Tensor) -> Binding:
        """Prepare, once, what it takes to point the modules at ``buffer``."""
        return Binding(self, self.views(buffer))

    def original_binding(self) -> Binding:
        return Binding(self, [spec.original for spec in self.specs])


class Binding:
    """A list of assignments that makes modules use one set of tensors.

    Prepared once for each pair of unit and buffer: binding is then a few dictionary writes for each tensor, and
    a parameter object is never made on the hot path.
    """

    def __init__(self, layout: Layout, tensors: Sequence[torch.Tensor]) -> None:
        self._writes: list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]] = []
        for spec, tensor in zip(layout.specs, tensors, strict=True):
            value = tensor
            for place in spec.places:
                if place.is_parameter and not isinstance(value, torch.nn.Parameter):
                    value = torch.nn.Parameter(value, requires_grad=False)
                self._writes.append((place.holder, place.attribute, value))

    def apply(self) -> None:
        for holder, attribute, value in self._writes:
            holder[attribute] = value


@dataclass(frozen=True)
class NamedTensor:
    """A tensor that a model holds: its full names, value, target dtype, places, and source."""

    names: tuple[str, ...]
    tensor: torch.Tensor
    dtype: torch.dtype
    places: tuple[Place, ...]
    source: Source | None = None


def make_layout(tensors: Iterable[NamedTensor]) -> Layout:
    """Pack ``tensors`` one after another, each aligned to ``ALIGNMENT`` bytes."""
    specs: list[TensorSpec] = []
    offset = 0
    for item in tensors:
        nbytes = item.tensor.numel() * item.dtype.itemsize
        stride = _dense_stride(item.tensor)
        shape = item.tensor.shape
        name, *aliases = item.names
        specs.append(
            TensorSpec(
                name, tuple(aliases), item.places, item.tensor, shape, stride, item.dtype, offset, nbytes, item.source
            )
        )
        offset += -(-nbytes // ALIGNMENT) * ALIGNMENT
    return Layout(tuple(specs), offset)


def _dense_stride(tensor: torch.Tensor) -> tuple[int, ...]:
    """The tensor's own strides where it fills its memory (channels_last stays so), else the contiguous ones."""
    return torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format).stride()
