"""A buffer with the weights of a unit, and the patches that are written into it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import torch

from ..errors import UnsupportedModelError
from ..model.blocks import Unit
from ..model.forms import Form, OtherForm, PlainForm, take_apart
from ..model.lasting_binding import LastingBinding, lasting_binding_to
from ..model.layout import Binding, Value
from .transfer import Tick


class Patches(Protocol):
    """Changes to weights (LoRA and others), as the engine sees them."""

    def signature(self, name: str) -> object | None:
        """A value that equals another signature only if both make the same weight; None where nothing changes."""

    def compute(self, name: str, original: torch.Tensor) -> torch.Tensor:
        """The changed weight.

        For a plain tensor the callee may choose dtype, device and even shape. A tensor of another class stays of that
        class, and its parts keep shapes and dtypes; its context or attributes may change.
        """


@runtime_checkable
class KnownSignature(Protocol):
    """A signature by which other processes may know the same patches."""

    def identity(self) -> bytes | None:
        """Bytes that are equal in two processes only if the patches make the same of the same weight in both; None
        where that is not known. It may read all of a patch, on any thread."""


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
        written: names of patched values that other code has written to.

    Args:
        computes: whether kernels are given tensors in this buffer.
        read_only: whether nobody may write to the buffer.
        seen: memory that modules are pointed at instead then, with the same weights.
    """

    def __init__(
        self,
        unit: Unit,
        buffer: torch.Tensor,
        computes: bool = True,
        read_only: bool = False,
        seen: torch.Tensor | None = None,
    ) -> None:
        self.unit = unit
        self.read_only = read_only
        self._apart = seen
        self.buffer = buffer
        self._computes = computes
        self.written: set[str] = set()
        self._baked: dict[str, object] = {}
        self._forms: dict[str, Form] = {}
        self._lasting: LastingBinding | None = None

    @property
    def lasting(self) -> LastingBinding:
        """Points the unit's module at this buffer."""
        if self._lasting is None:
            self._lasting = lasting_binding_to(self.unit.layout, self.seen, self._forms, self._computes)
        return self._lasting

    @property
    def seen(self) -> torch.Tensor:
        """Memory that modules are pointed at between blocks."""
        return self.buffer if self._apart is None else self._apart

    @property
    def newest(self) -> torch.Tensor:
        """The memory that has what other code has written to patched values."""
        return self.seen if self.written else self.buffer

    def take_up(self, unit: Unit) -> None:
        """The unit was laid out anew, and lies in the buffer as before."""
        self.unit, self._lasting = unit, None

    def binding_to(self, buffer: torch.Tensor) -> Binding:
        """Points the unit's module at another buffer, which holds or will hold a copy of this one."""
        with torch.inference_mode(False):
            return self.unit.layout.binding(buffer, self._forms)

    @property
    def patched(self) -> bool:
        return bool(self._baked)

    @property
    def signatures(self) -> dict[str, object]:
        """Those of the patches in it, by the names of values."""
        return dict(self._baked)

    @property
    def fills_layout(self) -> bool:
        """Whether all values lie in the buffer as the layout has them: no patch has made another form of one."""
        return not self._forms

    def is_baked(self, name: str) -> bool:
        return name in self._baked

    def spoil_written(self) -> None:
        """Mark patched values that were written to as unfinished: they are not as they were patched."""
        self._baked.update((name, _UNFINISHED) for name in self.written)
        self.written.clear()

    def stale(self, patches: Patches) -> list[Value]:
        """The values that have other patches in this buffer than ``patches``."""
        values = self.unit.layout.values
        return [value for value in values if patches.signature(value.name) != self._baked.get(value.name)]

    def write_from(self, other: Weights) -> None:
        """Copy another buffer of the same unit as it is, patches included."""
        self.buffer.copy_(other.newest)
        self._baked, self.written = dict(other._baked), set(other.written)
        self._take_forms(dict(other._forms))

    def spoiled(self, patches: Patches) -> bool:
        """Whether a stale value has no original in this buffer any more, because it was patched there."""
        return any(value.name in self._baked for value in self.stale(patches))

    def bake(
        self, values: Iterable[Value], patches: Patches, tick: Tick, place: torch.Tensor | None = None
    ) -> dict[str, object]:
        """Patch ``values``, whose originals are in ``place``; returns signatures for :meth:`sign`.

        Args:
            values: of this unit.
            patches: changes.
            tick: called before each; it may raise.
            place: memory on the device that holds a copy of the values; the buffer itself by default.
        """
        assert not self.read_only, "who patches a shared copy takes one of its own first (weight_copies.py)"
        place = self.buffer if place is None else place
        signatures = {}
        for value in values:
            tick()
            # While it is written the tensor is neither the old nor the new one. This copy may outlive a failure or an
            # interrupt, and must not be taken for either then.
            self._baked[value.name] = _UNFINISHED
            signatures[value.name] = patches.signature(value.name)
            with torch.inference_mode(False):
                original = value.form.assemble(iter([spec.view(place) for spec in value.specs]))
            form = _write(value, place, patches.compute(value.name, original))
            if not value.is_plain or isinstance(form, OtherForm):
                self._take_forms({**self._forms, value.name: form})
        return signatures

    def sign(self, signatures: dict[str, object]) -> None:
        """The buffer now holds the patched values of these signatures."""
        self._baked.update(signatures)
        self.written -= signatures.keys()

    def _take_forms(self, forms: dict[str, Form]) -> None:
        """From now on the buffer's tensors make values of these forms."""
        if forms or self._forms:
            self._forms, self._lasting = forms, None


_UNFINISHED = object()


def _write(value: Value, buffer: torch.Tensor, patched: torch.Tensor) -> Form:
    """Write the parts of ``patched`` to the places of ``value``'s parts; returns the form that they make."""
    parts, form = take_apart(value.name, patched)
    if isinstance(form, PlainForm) != value.is_plain or parts.keys() != {spec.name for spec in value.specs}:
        found, expected = type(patched).__name__, type(value.original).__name__
        raise UnsupportedModelError(
            f"a patch makes a {found} of {value.name}, which is a {expected} made of other tensors; "
            "load this model with the host's own loader"
        )
    if value.is_plain and patched.shape != value.specs[0].shape:
        with torch.inference_mode(False):
            return OtherForm(torch.empty_like(patched, dtype=value.dtype, device=buffer.device).copy_(patched))
    _check_parts(value, parts)
    for spec in value.specs:
        spec.view(buffer).copy_(parts[spec.name].detach().reshape(spec.shape))
    return form


def _check_parts(value: Value, parts: dict[str, torch.Tensor]) -> None:
    """Raise where a part does not fit. A scale may be a number or an array of one: the patched form knows which."""
    for spec in value.specs:
        part = parts[spec.name]
        one_number = not value.is_plain and part.numel() == spec.shape.numel() == 1
        if part.shape != spec.shape and not one_number:
            change = f"shape of {spec.name} from {tuple(spec.shape)} to {tuple(part.shape)}"
        elif part.dtype != spec.dtype and not value.is_plain:
            change = f"dtype of {spec.name} from {spec.dtype} to {part.dtype}"
        else:
            continue
        raise UnsupportedModelError(f"a patch changes the {change}; load this model with the host's own loader")
