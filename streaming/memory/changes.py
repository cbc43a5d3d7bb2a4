"""Finds what other code has written to, exchanged or deleted in a model since it was laid out.

Only what modules hold now is looked at, once for each load and each unload, never in a step. What is written to a
weight that carries patches is no change: it goes with the patches, as it does in the host, which restores its backup.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, field

import torch
from torch import nn

from ..errors import CheckpointError
from ..model.contents import read_tensor
from ..model.layout import Place, TensorSpec, Value
from ..model.shown import Watched, memory_of, settled
from ..model.sums import Summing
from .unit_copies import UnitCopies


@dataclass(frozen=True)
class Change:
    """One place of a model holds something else than was laid out.

    Attributes:
        value: what was laid out there.
        place: where.
        present: what is there now; None where nothing is.
        kept: ``present`` in host memory.
        in_copy: whether the copy that modules point at has the change too.
        gone: whether the module has no such name any more; it may be another kind of attribute by now.
    """

    value: Value
    place: Place
    present: torch.Tensor | None = field(repr=False)
    kept: torch.Tensor | None = field(repr=False)
    in_copy: bool = False
    gone: bool = False

    @property
    def key(self) -> tuple[int, str]:
        return id(self.place.holder), self.place.attribute

    def show(self) -> None:
        """Have the module hold ``kept``."""
        self._put(self.kept)

    def put_back(self) -> None:
        """Have the module hold what it held when the change was found."""
        if not self.in_copy:
            self._put(self.present)

    def _put(self, tensor: torch.Tensor | None) -> None:
        if self.gone:
            self.place.holder.pop(self.place.attribute, None)
        else:
            self.place.holder[self.place.attribute] = tensor


# Values whose resident copy was written to: the id of the ``UnitCopies`` that has it, and the name of the value.
Overwritten = Set[tuple[int, str]]


def find_overwritten(copies: Iterable[UnitCopies]) -> Overwritten:
    """Find the values whose resident copy holds something else than it did; waits once for the device."""
    sums = Summing()
    found = [(id(each), *one) for each in copies for one in each.sums_again(sums)]
    if not found:
        return set()
    differ = torch.cat([before for _, _, before, _ in found]) != torch.cat([now for _, _, _, now in found])
    summed = [(each, name) for each, name, before, _ in found for _ in range(before.numel())]
    return {one for one, differs in zip(summed, differ.tolist(), strict=True) if differs}


def find_changes(
    copies: UnitCopies, exchanged: Set[str] = frozenset(), overwritten: Overwritten | None = None
) -> Iterator[Change]:
    """Find the changes of one unit, while its block does not run and no copy of it is under way.

    Args:
        copies: of the unit.
        exchanged: full names of tensors that the host has replaced for as long as a MODEL is loaded. A
            replacement is a change also where the copy carries patches, which are for what is there now.
        overwritten: of all units, from :func:`find_overwritten`; None to look at this one.
    """
    overwritten = find_overwritten([copies]) if overwritten is None else overwritten
    bound, weights = copies.bound, copies.bound_weights
    copies.note_writes()
    for value in copies.unit.layout.values:
        patched = weights is not None and weights.is_baked(value.name)
        replaced = bound.replaced(value)
        if bound.moved(value):
            replaced += [(place, bound.holds(value)) for place in value.places]
        if patched and exchanged.isdisjoint(value.names):
            replaced = [pair for pair in replaced if not _absorbed(copies, value, pair[1])]
        for place, present in replaced:
            gone = place.attribute not in place.holder
            yield Change(value, place, present, _kept(present), gone=gone)
        if replaced or patched:
            continue
        if _is_written(copies, value, (id(copies), value.name) in overwritten):
            kept = bound.holds(value)
            in_copy = weights is not None and not weights.read_only
            yield from (Change(value, place, kept, _kept(kept, copy=in_copy), in_copy) for place in value.places)
        elif weights is not None and _was_written_before(value):
            kept = settled(value.showing.tensor)
            yield from (Change(value, place, kept, _kept(kept)) for place in value.places)


def _absorbed(copies: UnitCopies, value: Value, present: torch.Tensor | None) -> bool:
    """Copy a tensor that was put in the place of a patched one into the copy, where it fits; returns whether it did.
    The host too would keep that tensor until the patches go."""
    spec = value.specs[0]
    if not value.is_plain or not _is_plain(present):
        return False
    if (present.shape, present.dtype) != (spec.shape, spec.dtype):
        return False
    with torch.inference_mode(False), torch.no_grad():
        view = spec.view(copies.bound_weights.seen)
        view.copy_(memory_of(present))
        copies.bound.point(value, view.data)
    copies.bound_weights.written.add(value.name)
    return True


def _is_written(copies: UnitCopies, value: Value, overwritten: bool) -> bool:
    """Whether what modules point at is not what was loaded."""
    bound = copies.bound
    if bound.written(value):
        return True
    if copies.bound_weights is not None and overwritten:
        return True
    if not bound.handed_out(value):
        return False
    held = bound.holds(value)
    if (isinstance(held, Watched) and held.written) or _differs(held, value.specs[0]):
        return True
    bound.settle(value)
    return False


def _was_written_before(value: Value) -> bool:
    """Whether what modules show of it while no copy is bound was written to, by code that had kept that tensor."""
    tensor = settled(value.showing.tensor) if value.showing.tensor is not None else None
    return isinstance(tensor, Watched) and tensor.changed and (tensor.written or _differs(tensor, value.specs[0]))


def _differs(tensor: torch.Tensor, spec: TensorSpec) -> bool:
    """Whether a tensor in host memory that was handed out differs from what was loaded."""
    plain = memory_of(tensor)
    if plain.shape != spec.shape or plain.stride() != spec.stride:
        return True
    if spec.source is None and plain.data_ptr() == spec.original.data_ptr():
        return True  # There is nothing that it could be compared with.
    try:
        expected = read_tensor(spec if plain.dtype == spec.dtype else spec.in_dtype(plain.dtype))
    except CheckpointError:
        return True  # The file cannot be read: only this tensor has the weight.
    return not torch.equal(_bytes(expected), _bytes(plain))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _is_plain(tensor: torch.Tensor | None) -> bool:
    """Whether it is of torch's own classes, or watched."""
    return type(tensor) in (torch.Tensor, nn.Parameter) or isinstance(tensor, Watched)


def _kept(tensor: torch.Tensor | None, copy: bool = False) -> torch.Tensor | None:
    """``tensor`` in host memory, without a tie to what was laid out."""
    if tensor is None:
        return None
    tensor = settled(tensor)
    if _is_plain(tensor):
        is_parameter, copy = isinstance(tensor, nn.Parameter), copy or _is_lent(tensor)
        with torch.inference_mode(False):
            tensor = memory_of(tensor)
            tensor = tensor.clone() if tensor.is_inference() else tensor.to("cpu", copy=copy)
            return nn.Parameter(tensor.cpu(), requires_grad=False) if is_parameter else tensor.cpu()
    return tensor if tensor.device.type in ("cpu", "meta") else tensor.to("cpu")


def _is_lent(tensor: torch.Tensor) -> bool:
    """Whether it lies in the memory of one of our copies, which is used again when that copy goes."""
    if isinstance(tensor, Watched):
        return tensor.spec is None or memory_of(tensor).data_ptr() != tensor.spec.original.data_ptr()
    return tensor.untyped_storage().nbytes() > tensor.nbytes


class Changes(tuple[Change, ...]):
    """All changes of a model."""

    def show(self) -> None:
        """Have the modules hold them, in host memory."""
        for change in self:
            change.show()

    def put_back(self) -> None:
        """Have the modules hold what they held when the changes were found."""
        for change in self:
            change.put_back()

    def of(self, values: Iterable[Value]) -> list[Change]:
        """The changes of these values."""
        wanted = {id(value) for value in values}
        return [change for change in self if id(change.value) in wanted]
