"""Where modules point: between blocks at a resident copy, at a master copy or at what was loaded, in a block at a slot.

Such a binding lasts, so others may write to its tensors, or put others in their place; it can tell (shown.py, Note: who
has written).

[Note: what others do while a model runs]
The host's own loader puts nothing into a module between two loads. So what somebody has put there stays, and its layer
runs with that: a binding takes the place of the one before it, and of nothing else. What somebody has written to a home
is copied to the slot when a block begins, over what came ahead of time; what was written to a slot is copied home when
the block ends. Both are seen by counters, whose look costs no more than that at the module. They do not count what a
kernel writes by ``data`` on the device; that is in residents all the same, and in a slot until the block ends.
"""

from __future__ import annotations

import torch

from .contents import read_tensor
from .errors import CheckpointError
from .layout import AS_LOADED, Binding, Forms, Layout, Place, Stranger, TensorSpec, Value, bound
from .shown import Watched, apart, counted, handed_out, memory_of, plain, settled, shown, watch

# By name of each value: what modules hold of it, and the plain tensors that count what is written to it.
Tensors = dict[str, tuple[torch.Tensor, list[torch.Tensor]]]


class Counted(Binding):
    """Points the modules of a unit at tensors that count what is written to them.

    Args:
        layout: the unit's.
        tensors: by name of each value what modules hold of it, and the plain tensors that count for it.
    """

    def __init__(self, layout: Layout, tensors: Tensors) -> None:
        self._held = {name: held for name, (held, _) in tensors.items()}
        self._counters: list[torch.Tensor] = []
        self._spans: dict[str, slice] = {}
        for name, (_, counting) in tensors.items():
            first = len(self._counters)
            self._counters += [one for one in counting if not one.is_inference()]
            self._spans[name] = slice(first, len(self._counters))
        super().__init__((value, self._held[value.name]) for value in layout.values)
        self._stamps = _versions(self._counters)

    def holds(self, value: Value) -> torch.Tensor:
        """What modules hold of ``value`` while nobody has exchanged it."""
        return settled(self._held[value.name])

    @property
    def touched(self) -> bool:
        """Whether somebody has written to any of it since it was settled, or may have. Asked in each step."""
        return [one._version for one in self._counters] != self._stamps

    def written(self, value: Value) -> bool:
        """Whether somebody has written to ``value`` in a way that torch counts."""
        span = self._spans[value.name]
        return _versions(self._counters[span]) != self._stamps[span]

    def settle(self, value: Value) -> None:
        """It was compared, and is as it was."""
        span = self._spans[value.name]
        self._stamps[span] = _versions(self._counters[span])

    def parts(self, value: Value) -> list[torch.Tensor]:
        """The plain tensors that ``value`` is made of."""
        return [self.holds(value)] if value.is_plain else self._counters[self._spans[value.name]]

    def take(self, value: Value, other: Counted) -> list[Stranger]:
        """Copy ``value`` as it is where ``other`` points; what does not lie like this is used there, and is given."""
        pairs = list(zip(self.parts(value), map(plain, other.parts(value)), strict=True))
        if any((into.shape, into.dtype) != (found.shape, found.dtype) for into, found in pairs):
            strangers = [Stranger(place.holder, place.attribute, other.holds(value)) for place in value.places]
            for stranger in strangers:
                stranger.put_back()
            return strangers
        for into, found in pairs:
            into.copy_(found)
        return []


class Home(Counted):
    """Points the modules of a unit at tensors that they hold between blocks."""

    def __init__(self, layout: Layout, tensors: Tensors) -> None:
        super().__init__(layout, tensors)
        self._lies = {name: _lies(held) for name, held in self._held.items()}
        self._watched = [held for held in self._held.values() if isinstance(held, Watched)]
        self._look = handed_out.count

    @property
    def touched(self) -> bool:
        if [one._version for one in self._counters] != self._stamps:
            return True
        if handed_out.count == self._look:
            return False
        if any(held.changed for held in self._watched):
            return True
        self._look = handed_out.count
        return False

    def touches(self, value: Value) -> bool:
        """Whether somebody has written to ``value`` since it was settled, or may have."""
        return self.written(value) or self.handed_out(value) or self.moved(value)

    def replaced(self, value: Value) -> list[tuple[Place, torch.Tensor | None]]:
        """Places that hold something else by now; None for one that holds nothing."""
        held = self.holds(value)
        present = [(place, place.holder.get(place.attribute)) for place in value.places]
        return [(place, tensor) for place, tensor in present if tensor is None or settled(tensor) is not held]

    def moved(self, value: Value) -> bool:
        """Whether somebody has given the tensor other memory, by its ``data``."""
        return _lies(self._held[value.name]) != self._lies[value.name]

    def point(self, value: Value, tensor: torch.Tensor) -> None:
        """Have modules hold ``tensor`` again: what somebody has put in its place was copied to it."""
        held = self._held[value.name]
        if self.moved(value):
            torch.Tensor.data.__set__(held, tensor)
        for place in value.places:
            if place.attribute in place.holder:
                place.holder[place.attribute] = held
        self.settle(value)

    def handed_out(self, value: Value) -> bool:
        """Whether somebody may have written to it in another way."""
        held = self.holds(value)
        return isinstance(held, Watched) and held.changed

    def differs(self, value: Value) -> bool:
        """Whether somebody has written to it, by what counts or by a comparison of what was handed out."""
        if self.written(value):
            return True
        if not self.handed_out(value):
            return False
        held = self.holds(value)
        return held.written or _differs(held, value.specs[0])

    def settle(self, value: Value) -> None:
        super().settle(value)
        if isinstance(held := self.holds(value), Watched):
            held.settle()


class ShownHome(Home):
    """Points the modules at what they show while no copy is bound."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout, {value.name: (shown(value), _counting(value)) for value in layout.values})

    @property
    def touched(self) -> bool:
        if super().touched:
            return True
        present = map(settled, self._held.values())
        return any(isinstance(held, Watched) and held.changed for held in present)

    def apply(self) -> None:
        self._held = {name: settled(held) for name, held in self._held.items()}
        self._writes = [(holder, attribute, settled(held)) for holder, attribute, held in self._writes]
        super().apply()

    def replace(self, before: Binding) -> list[Stranger]:
        self._writes = [(holder, attribute, settled(held)) for holder, attribute, held in self._writes]
        return super().replace(before)

    def parts(self, value: Value) -> list[torch.Tensor]:
        return super().parts(value) if value.is_plain else [spec.original for spec in value.specs]


def home_in(layout: Layout, buffer: torch.Tensor, forms: Forms = AS_LOADED, computes: bool = True) -> Home:
    """A home in ``buffer``.

    Args:
        layout: of the unit.
        buffer: what holds it, or will.
        forms: by name, of values that are made in another way than those that were loaded.
        computes: kernels are given these tensors, which must be of torch's own classes then.
    """
    return Home(layout, _tensors_in(layout, buffer, forms, computes))


def slot_binding(layout: Layout, buffer: torch.Tensor, forms: Forms = AS_LOADED) -> Counted:
    """Prepare, once, what it takes to point the modules at ``buffer`` for as long as a block runs."""
    return Counted(layout, _tensors_in(layout, buffer, forms, computes=True))


def _tensors_in(layout: Layout, buffer: torch.Tensor, forms: Forms, computes: bool) -> Tensors:
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
    return tensors


def _differs(tensor: torch.Tensor, spec: TensorSpec) -> bool:
    """Whether a tensor of host memory, handed out to somebody, is another than what was loaded."""
    plain = memory_of(tensor)
    if plain.shape != spec.shape or plain.stride() != spec.stride:
        return True
    if spec.source is None and plain.data_ptr() == spec.original.data_ptr():
        return True  # There is nothing that it could be compared with.
    try:
        expected = read_tensor(spec if plain.dtype == spec.dtype else spec.in_dtype(plain.dtype))
    except CheckpointError:
        return True  # Nobody else has it any more.
    return not torch.equal(_bytes(expected), _bytes(plain))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _counting(value: Value) -> list[torch.Tensor]:
    """Of a plain value what is shown counts by itself."""
    return [] if value.is_plain else [spec.original for spec in value.specs]


def _lies(tensor: torch.Tensor) -> object:
    """Where a plain tensor lies, and how; of another class it is the class's business."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter, Watched) or tensor.is_meta:
        return None
    plain = memory_of(tensor)
    return plain.data_ptr(), plain.shape, plain.dtype


def _versions(tensors: list[torch.Tensor]) -> list[int]:
    """How often somebody has written to each."""
    return [tensor._version for tensor in tensors]
