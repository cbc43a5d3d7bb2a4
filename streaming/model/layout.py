"""How the tensors of a unit lie in one contiguous buffer, and how modules are pointed at them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Protocol

import torch

from ..devices.copies import aligned
from .forms import Form, PlainForm, take_apart


@dataclass(frozen=True)
class Place:
    """Where a module keeps a tensor: ``holder[attribute]``, the module's own dictionary of parameters or buffers.

    The dictionary is kept instead of the module, so that what refers to a layout does not keep the module alive.
    """

    holder: dict[str, torch.Tensor | None] = field(repr=False)
    attribute: str
    is_parameter: bool


class SourceFile(Protocol):
    """A file that holds tensors.

    Attributes:
        touches: how often its modification time was changed, and perhaps contents with it.
    """

    touches: int

    def check_unchanged(self) -> None:
        """Raise unless the contents are still those that were there when the model was loaded."""


class Source(Protocol):
    """Where a tensor's bytes can be read from again: a part of a file."""

    @property
    def file(self) -> SourceFile:
        """The file."""

    def identity(self) -> bytes:
        """Equal for two sources only if they are the same bytes of the same file, which has not changed."""

    def read_into(self, target: memoryview, start: int = 0) -> None:
        """Read ``len(target)`` bytes from byte ``start`` of the tensor on."""

    def forget(self, start: int, nbytes: int) -> None:
        """Have the system drop these bytes from its file cache: they will not be read again soon."""


# Returns the source of a tensor that maps a file; None for a tensor that exists in memory alone.
Locate = Callable[[torch.Tensor], Source | None]


def nowhere(tensor: torch.Tensor) -> None:
    """Return no source: no file is mapped."""


@dataclass(frozen=True)
class TensorSpec:
    """One plain tensor in a unit's buffer.

    Attributes:
        name: full name, from the model's root; below that of the value that it is a part of.
        original: the tensor as it was loaded: the truth, never written to.
        shape, stride, dtype: as bound; ``dtype`` may differ from the original's (cast on the way).
        offset, nbytes: bytes from the buffer's start, and bytes used.
        source: the file's part that ``original`` maps; None for one that exists in memory alone.
    """

    name: str
    original: torch.Tensor = field(repr=False)
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    nbytes: int
    source: Source | None = field(default=None, repr=False)

    def in_dtype(self, dtype: torch.dtype) -> TensorSpec:
        """Return the spec of the same tensor, cast to another dtype on the way."""
        return replace(self, dtype=dtype, nbytes=self.shape.numel() * dtype.itemsize)

    def view(self, buffer: torch.Tensor, offset: int | None = None) -> torch.Tensor:
        """Return this tensor's part of ``buffer`` (uint8, one dimension), typed and shaped; at another ``offset``."""
        begin = self.offset if offset is None else offset
        flat = buffer[begin : begin + self.nbytes].view(self.dtype)
        return flat.as_strided(self.shape, self.stride)


@dataclass
class Showing:
    """What modules hold of a value while no copy of it is bound; None before it is first needed (shown.py)."""

    tensor: torch.Tensor | None = None


@dataclass(frozen=True)
class Value:
    """What modules hold: a parameter or a buffer, made of the plain tensors ``specs`` (forms.py, Note: three forms).

    Attributes:
        name: full name, from the model's root; of a tied one the first.
        aliases: the other names of a tied one.
        places: every place that holds it (several when it is tied).
        original: as it was loaded.
        specs: the plain tensors of it in the buffer; if it is one itself, that one.
        form: how they make it.
        shown_dtype: the dtype in which modules hold it while no copy is bound.
        showing: what they hold then.
    """

    name: str
    aliases: tuple[str, ...]
    places: tuple[Place, ...]
    original: torch.Tensor = field(repr=False)
    specs: tuple[TensorSpec, ...]
    form: Form = field(repr=False)
    shown_dtype: torch.dtype
    showing: Showing = field(repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    @property
    def is_parameter(self) -> bool:
        return any(place.is_parameter for place in self.places)

    @property
    def is_plain(self) -> bool:
        return isinstance(self.form, PlainForm)

    @property
    def dtype(self) -> torch.dtype:
        """As modules see it. Only a plain tensor is ever cast."""
        return self.specs[0].dtype if self.is_plain else self.original.dtype


# Forms of values by name, where their parts make something else than what was loaded.
Forms = Mapping[str, Form]
AS_LOADED: Forms = MappingProxyType({})


@dataclass(frozen=True)
class Layout:
    """The values of one unit, their tensors packed into ``nbytes`` bytes."""

    values: tuple[Value, ...]
    nbytes: int

    @cached_property
    def specs(self) -> tuple[TensorSpec, ...]:
        """Every plain tensor, in the order of the buffer."""
        return tuple(spec for value in self.values for spec in value.specs)

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        return [spec.view(buffer) for spec in self.specs]

    def bytes_in(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """Return the memory of each plain tensor in ``buffer``."""
        return [buffer[spec.offset : spec.offset + spec.nbytes] for spec in self.specs]

    def binding(self, buffer: torch.Tensor, forms: Forms = AS_LOADED) -> Binding:
        """Return a binding, made once, that points the modules at ``buffer`` for as long as a block runs."""
        return self.binding_of(self.views(buffer), forms)

    def binding_of(self, views: Iterable[torch.Tensor], forms: Forms = AS_LOADED) -> Binding:
        """As :meth:`binding`, to plain tensors wherever they lie, in the order of :attr:`specs`."""
        parts = iter(views)
        tensors = [(value, forms.get(value.name, value.form).assemble(parts)) for value in self.values]
        return Binding((value, bound(value, tensor)) for value, tensor in tensors)

    def original_binding(self) -> Binding:
        """Return a binding that points the modules at what was loaded, in the dtypes of the file."""
        return Binding((value, bound(value, value.original)) for value in self.values)


class Binding:
    """A list of assignments that makes modules use one set of tensors.

    Prepared once for each pair of unit and buffer: binding is then a few dictionary writes for each tensor, and
    a parameter object is never made on the hot path.
    """

    def __init__(self, tensors: Iterable[tuple[Value, torch.Tensor]]) -> None:
        self._writes = [(place.holder, place.attribute, tensor) for value, tensor in tensors for place in value.places]
        self._columns = tuple(zip(*self._writes, strict=True)) or ((), (), ())

    def apply(self) -> None:
        for holder, attribute, tensor in self._writes:
            holder[attribute] = tensor

    def is_in_place(self) -> bool:
        """Whether modules still hold these tensors, and no others in their place."""
        holders, attributes, tensors = self._columns
        return all(map(operator.is_, map(dict.get, holders, attributes), tensors))


def bound(value: Value, tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` as modules hold it."""
    if not value.is_plain and isinstance(value.original, torch.nn.Parameter):
        # What torch.nn.Parameter does to it. The constructor also detaches it, which may copy what it wraps.
        tensor._is_param = True
    if value.is_parameter and type(tensor) is torch.Tensor:
        return torch.nn.Parameter(tensor, requires_grad=False)
    return tensor


@dataclass(frozen=True)
class NamedTensor:
    """A tensor that a model holds.

    Attributes:
        names: its full names.
        dtype: in which it runs; a tensor of a class of its own decides that itself.
        places: that hold it.
        locate: returns the source of a plain tensor that maps a file.
        shown_dtype: in which modules hold it while no copy is bound; None is ``dtype``.
        showing: what they hold then.
    """

    names: tuple[str, ...]
    tensor: torch.Tensor
    dtype: torch.dtype
    places: tuple[Place, ...]
    locate: Locate = nowhere
    shown_dtype: torch.dtype | None = None
    showing: torch.Tensor | None = None

    @cached_property
    def _apart(self) -> tuple[dict[str, torch.Tensor], Form]:
        return take_apart(self.names[0], self.tensor)

    @property
    def form(self) -> Form:
        return self._apart[1]

    @property
    def parts(self) -> list[tuple[str, torch.Tensor, torch.dtype]]:
        """Its plain tensors: full name, value, and the dtype in which it is bound."""
        is_plain = isinstance(self.form, PlainForm)
        return [(name, part, self.dtype if is_plain else part.dtype) for name, part in self._apart[0].items()]

    @property
    def nbytes(self) -> int:
        return sum(part.numel() * dtype.itemsize for _, part, dtype in self.parts)


def make_layout(tensors: Iterable[NamedTensor]) -> Layout:
    """Pack ``tensors`` one after another, each plain tensor aligned (``copies.ALIGNMENT``)."""
    values: list[Value] = []
    offset = 0
    for item in tensors:
        specs: list[TensorSpec] = []
        for name, part, dtype in item.parts:
            nbytes = part.numel() * dtype.itemsize
            stride = _dense_stride(part)
            specs.append(TensorSpec(name, part, part.shape, stride, dtype, offset, nbytes, item.locate(part)))
            offset += aligned(nbytes)
        name, *aliases = item.names
        held = item.shown_dtype or item.dtype, Showing(item.showing)
        values.append(Value(name, tuple(aliases), item.places, item.tensor, tuple(specs), item.form, *held))
    return Layout(tuple(values), offset)


def _dense_stride(tensor: torch.Tensor) -> tuple[int, ...]:
    """The tensor's own strides where it fills its memory (channels_last stays so), else the contiguous ones."""
    return torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format).stride()
