"""Where modules point between blocks: at a resident copy, at a master copy, or at what was loaded.

Such a binding lasts, so other code may write to its tensors, or replace them; it can tell (shown.py, Note: who has
written).
"""

from __future__ import annotations

import torch

from .layout import AS_LOADED, Binding, Forms, Layout, Place, Value, bound
from .shown import Watched, apart, counted, memory_of, settled, shown, watch


class LastingBinding(Binding):
    """Points the modules of a unit at tensors that they hold between blocks.

    Args:
        layout: the unit's.
        tensors: by name of each value, what modules hold of it, and the plain tensors that count writes to it.
    """

    def __init__(self, layout: Layout, tensors: dict[str, tuple[torch.Tensor, list[torch.Tensor]]]) -> None:
        self._held = {name: held for name, (held, _) in tensors.items()}
        self._counted = {name: [(one, _version(one)) for one in counting] for name, (_, counting) in tensors.items()}
        self._lies = {name: _lies(held) for name, held in self._held.items()}
        super().__init__((value, self._held[value.name]) for value in layout.values)

    def holds(self, value: Value) -> torch.Tensor:
        """Return what modules hold of ``value`` unless other code has replaced it."""
        return settled(self._held[value.name])

    def replaced(self, value: Value) -> list[tuple[Place, torch.Tensor | None]]:
        """Return the places that hold something else by now, and what they hold; None if that is nothing."""
        held = self.holds(value)
        present = [(place, place.holder.get(place.attribute)) for place in value.places]
        return [(place, tensor) for place, tensor in present if tensor is None or settled(tensor) is not held]

    def moved(self, value: Value) -> bool:
        """Whether other code has given the tensor other memory, by its ``data``."""
        return _lies(self._held[value.name]) != self._lies[value.name]

    def point(self, value: Value, tensor: torch.Tensor) -> None:
        """Have modules hold the value's tensor again, in the memory of ``tensor``: its replacement was copied there."""
        held = self._held[value.name]
        if self.moved(value):
            torch.Tensor.data.__set__(held, tensor)
        for place in value.places:
            if place.attribute in place.holder:
                place.holder[place.attribute] = held
        self.settle(value)

    def written(self, value: Value) -> bool:
        """Whether ``value`` was written to in a way that torch counts."""
        return any(_version(one) != version for one, version in self._counted[value.name])

    def handed_out(self, value: Value) -> bool:
        """Whether ``value`` may have been written to, counted by torch or not."""
        held = self.holds(value)
        return isinstance(held, Watched) and held.changed

    def settle(self, value: Value) -> None:
        """Count ``value`` as unchanged: it was compared, and is as it was."""
        self._counted[value.name] = [(one, _version(one)) for one, _ in self._counted[value.name]]
        if isinstance(held := self.holds(value), Watched):
            held.settle()


class ShownBinding(LastingBinding):
    """Points the modules at what they show while no copy is bound."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout, {value.name: (shown(value), _counting(value)) for value in layout.values})

    def apply(self) -> None:
        for holder, attribute, held in self._writes:
            holder[attribute] = settled(held)


def lasting_binding_to(
    layout: Layout, buffer: torch.Tensor, forms: Forms = AS_LOADED, computes: bool = True
) -> LastingBinding:
    """Return a binding to ``buffer`` that lasts.

    Args:
        layout: of the unit.
        buffer: holds the unit's tensors, or will hold them.
        forms: by name, for values that are made in another way than those that were loaded.
        computes: whether kernels get these tensors, which must be of torch's own classes then.
    """
    tensors = {}
    with torch.inference_mode(False):
        parts = iter([counted(view) for view in layout.views(buffer)])
        for value in layout.values:
            own = [next(parts) for _ in value.specs]
            made = forms.get(value.name, value.form).assemble(iter(own))
            if value.is_plain and not computes:
                held = watch(apart(made), value.specs[0], value.is_parameter)
                tensors[value.name] = held, [held.counter]
            else:
                held = bound(value, made)
                tensors[value.name] = held, [held] if value.is_plain else own
        return LastingBinding(layout, tensors)


def _counting(value: Value) -> list[torch.Tensor]:
    """Return the tensors that count writes beside what is shown; none for a plain value, which counts by itself."""
    return [] if value.is_plain else [spec.original for spec in value.specs]


def _lies(tensor: torch.Tensor) -> object:
    """Return where a plain tensor lies, and how; None for tensors of other classes, which decide that themselves."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter, Watched) or tensor.is_meta:
        return None
    plain = memory_of(tensor)
    return plain.data_ptr(), plain.shape, plain.dtype


def _version(tensor: torch.Tensor) -> int:
    """Return torch's count of writes to it; 0 for inference tensors, which have none."""
    return 0 if tensor.is_inference() else tensor._version
