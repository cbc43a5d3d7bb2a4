"""Compares what has arrived on the device with what was sent. A debugging aid, off by default; speed does not matter.

Both sides are compared by their sums (checksums.py, Note: the sums), so only these are copied back from the device.
What lies between the tensors of a unit is left out: it is neither read nor written.

[Note: what is packed is checked twice]
In its slot a packed unit is compared with the packed copy that it was copied from, as others are with their master
copies. That says nothing of the packed copy itself, nor of who packs and unpacks. So sums are taken on the device, when
weights were compared with their source and patches are in them: before they are packed, and of what was made of them.
The packed copy keeps both.
 1. What has arrived is compared with the sums of what was made. If it differs, the packed copy was damaged in host
    memory, or on its way there. It is not unpacked: a decoder trusts what it reads, and may leave its memory.
 2. What modules will use is compared with the sums of the weights. If it differs, what lies in the slot is compared
    once more (it may have been overwritten meanwhile), and unpacked again. If that differs too, weights are packed or
    unpacked wrongly.
Such a packed copy must not be used; the next load makes it anew.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ..errors import CorruptionError
from ..memory.checks import OnDevice
from ..memory.unit_copies import UnitCopies
from ..memory.weights import Weights
from ..model.blocks import BlockSet, Unit
from ..model.contents import read_range
from ..model.layout import Layout
from .checksums import checksums_of, differences
from .lane import Lane
from .open_segment import OpenSegment
from .places import DevicePlace, unpacked_in
from .telemetry import Counters

logger = logging.getLogger(__name__)


class _Part(NamedTuple):
    """One tensor on the device, and the memory that it was copied from. Both uint8."""

    name: str
    copy: torch.Tensor
    source: torch.Tensor


class Verifier:
    """Is asked to check copies that have arrived. This one checks nothing, and steps run as if there were none.

    Attributes:
        finding: what was found, for people; empty while nothing was.
    """

    finding = ""
    # Copies that arrived while no step waited for them may be kept.
    trusting = True
    sums_up = False

    def make_lane(self, *args: Any) -> Lane:
        return Lane(*args)

    def check_resident(self, copies: UnitCopies) -> None:
        """A resident copy has arrived."""

    def check_loaded(self, weights: Weights, master: Weights | None) -> None:
        """Weights that will be packed have arrived on the device, from ``master`` or as they were loaded."""

    def sums_of(self, memory: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """Return what a packed copy keeps of tensors on the device."""
        return None

    def check_packed(self, what: str, units: Sequence[OnDevice]) -> None:
        """Packed copies have arrived."""

    def check_unpacked(self, what: str, units: Sequence[OnDevice], again: Callable[[], None]) -> None:
        """Units were unpacked."""


class ChecksumVerifier(Verifier):
    """Compares each segment with its source before it is used, and each resident copy when it has arrived.

    The source is the master copy; where there is none, the file or memory that the weights were loaded from, which is
    read anew. What differs is copied again while everything waits, and from then on all copies are synchronous. What
    was packed is checked once more when it is unpacked (Note: what is packed is checked twice).

    Args:
        blocks: names them.
        counters: where to count.
        step_down: a method, which is referred to weakly. It has copies made synchronously from now on, and returns when
            nothing is on its way.
    """

    trusting = False
    sums_up = True

    def __init__(self, blocks: BlockSet, counters: Counters, step_down: Callable[[], None]) -> None:
        self._block_names = [block.name for block in blocks.blocks]
        self._counters = counters
        self._step_down = weakref.WeakMethod(step_down)

    def make_lane(self, *args: Any) -> Lane:
        return _VerifiedLane(self, *args)

    def check_resident(self, copies: UnitCopies) -> None:
        assert copies.resident is not None
        self.check("resident", [DevicePlace(copies.resident.buffer, copies)])

    def check(self, what: str, places: Sequence[DevicePlace]) -> None:
        """Compare units of one block, and mend what differs from its source.

        Args:
            what: a name for them, for people.
            places: where on the device they are; compute waits for the copies already.

        Raises:
            CorruptionError: a copy differs still after it was copied again.
        """
        self._check(what, [place.copies.unit for place in places], [part for place in places for part in _parts(place)])

    def check_loaded(self, weights: Weights, master: Weights | None) -> None:
        self._check("to be packed", [weights.unit], list(_parts_of(weights.unit.layout, weights.buffer, master)))

    def _check(self, what: str, units: Sequence[Unit], parts: Sequence[_Part]) -> None:
        if not (damage := _compare(parts)):
            return
        self._report(what, units, damage)
        for part in parts:
            part.copy.copy_(part.source)
        if damage := _compare(parts):
            raise CorruptionError(
                f"a copy of {self._name(units)} differs from its source, and again when it was copied anew "
                f"({what}: {'; '.join(damage)}). The device, its bus or its driver damages data"
            )

    def sums_of(self, memory: Sequence[torch.Tensor]) -> torch.Tensor:
        return checksums_of(memory)

    def check_packed(self, what: str, units: Sequence[OnDevice]) -> None:
        """Compare units that have arrived as they were sent with what was packed.

        Raises:
            CorruptionError: they differ.
        """
        if wrong := _unlike(units, "packed_sums"):
            self._counters.corrupted += 1
            name, damage = self._name_spoiled(wrong), "; ".join(wrong.values())
            raise CorruptionError(
                f"a packed copy of {name} in RAM was damaged ({what}: {damage}). The next prompt packs it anew; if "
                "this comes again, check the RAM"
            )

    def check_unpacked(self, what: str, units: Sequence[OnDevice], again: Callable[[], None]) -> None:
        """Compare units with the weights that were packed, and have them unpacked again if they differ.

        Raises:
            CorruptionError: they differ still.
        """
        if not (wrong := _unlike(units, "sums")):
            return
        self._report(what, [copies.unit for copies, _ in units], list(wrong.values()))
        again()
        if wrong := _unlike(units, "sums"):
            name, damage = self._name_spoiled(wrong), "; ".join(wrong.values())
            raise CorruptionError(
                f"weights of {name} are not what was packed, and again when they were unpacked anew ({what}: {damage})."
                " The device packs or unpacks wrongly. The next prompt packs them anew; if this comes again, switch "
                "packing off"
            )

    def _name_spoiled(self, wrong: Collection[UnitCopies]) -> str:
        """Have packed copies made anew by the next load; returns their name, for people."""
        for copies in wrong:
            copies.spoil_packed()
        return self._name([copies.unit for copies in wrong])

    def _report(self, what: str, units: Sequence[Unit], damage: Sequence[str]) -> None:
        """Count and tell what was found; from now on copies are synchronous, and none is on its way."""
        self._counters.corrupted += 1
        name = self._name(units)
        self.finding = f"copies are synchronous since one of {name} was corrupted"
        names = ", ".join(unit.name for unit in units)
        logger.error("a copy of %s was corrupted (%s: %s): %s", name, what, names, "; ".join(damage))
        if (step_down := self._step_down()) is not None:
            step_down()

    def _name(self, units: Sequence[Unit]) -> str:
        block = units[0].block
        return self._block_names[block] if block >= 0 else "what is outside of blocks"


class _VerifiedLane(Lane):
    """A lane that has each segment checked before it is used."""

    def __init__(self, verifier: ChecksumVerifier, *args: Any) -> None:
        super().__init__(*args)
        self._verifier = verifier

    def _arrived(self, number: int, buffer: torch.Tensor) -> None:
        what, places = f"segment {number}", self._places_in(number, buffer)
        with self._backend.record.paused():  # Not every step takes sums.
            self._verifier.check(what, places)
            self._verifier.check_packed(what, [_as_packed(place) for place in places if place.packed])

    def _unpack(self, number: int, opened: OpenSegment) -> None:
        super()._unpack(number, opened)
        places = unpacked_in(opened.unpacked, self._places_in(number, opened.buffer))
        units = [_unpacked(place, target) for place, target in places]

        def again() -> None:
            self._arrived(number, opened.buffer)
            opened.unpack()

        with self._backend.record.paused():
            self._verifier.check_unpacked(f"segment {number}, unpacked", units, again)


def _as_packed(place: DevicePlace) -> OnDevice:
    return OnDevice(place.copies, place.copies.packed.layout.parts_in(place.memory))


def _unpacked(place: DevicePlace, target: torch.Tensor) -> OnDevice:
    """What modules use of a unit that was unpacked from ``place`` to ``target``."""
    return OnDevice(place.copies, place.copies.packed.layout.bytes_in(place.memory, target))


def _parts(place: DevicePlace) -> Iterator[_Part]:
    """The tensors of a unit on the device, beside what they should be."""
    packed = place.copies.packed
    if not place.packed:
        yield from _parts_of(place.copies.unit.layout, place.memory, place.copies.master)
        return
    names = [part.spec.name for part in packed.layout.parts]
    yield from map(_Part, names, packed.layout.parts_in(place.memory), packed.layout.parts_in(packed.buffer))


def _parts_of(layout: Layout, memory: torch.Tensor, master: Weights | None) -> Iterator[_Part]:
    """The tensors of a unit in ``memory`` on the device, beside those of its master copy, or as they were loaded."""
    if master is not None:
        source = master.buffer
    else:
        source = torch.empty(layout.nbytes, dtype=torch.uint8)
        read_range(layout, 0, layout.nbytes, source)
    names = [spec.name for spec in layout.specs]
    yield from map(_Part, names, layout.bytes_in(memory), layout.bytes_in(source))


def _compare(parts: Sequence[_Part]) -> list[str]:
    """Describe the parts that differ from their source, and from which byte on."""
    expected = checksums_of(part.source for part in parts)
    return differences([part.name for part in parts], [part.copy for part in parts], expected)


def _unlike(units: Sequence[OnDevice], sums: str) -> dict[UnitCopies, str]:
    """Return those units of which these ``sums`` are not what their packed copy has, each with what differs."""
    found = {}
    for copies, memory in units:
        names = [spec.name for spec in copies.unit.layout.specs]
        if damage := differences(names, memory, getattr(copies.packed, sums)):
            found[copies] = "; ".join(damage)
    return found
