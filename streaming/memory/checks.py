"""Who is asked whether copies are what they should be (run/verify.py checks that, or nothing)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from .unit_copies import UnitCopies
from .weights import Weights


class OnDevice(NamedTuple):
    """A unit on the device, packed or unpacked from its packed copy.

    Attributes:
        copies: of the unit.
        memory: of its tensors, uint8 each, in the order of its layout.
    """

    copies: UnitCopies
    memory: Sequence[torch.Tensor]


class Checks(Protocol):
    """Is asked to check copies that have arrived.

    Attributes:
        trusting: whether copies that arrived while no step waited for them may be kept.
        sums_up: whether packed copies keep sums of what was packed here.
    """

    trusting: bool
    sums_up: bool

    def check_resident(self, copies: UnitCopies) -> None:
        """A resident copy has arrived."""

    def check_loaded(self, weights: Weights, master: Weights | None) -> None:
        """Weights that will be packed have arrived on the device, from ``master`` or as they were loaded."""

    def sums_of(self, memory: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """Return what a packed copy keeps of tensors on the device; None for nothing. The host waits for them."""

    def check_packed(self, what: str, units: Sequence[OnDevice]) -> None:
        """Packed copies of units of one block have arrived, and will be unpacked."""

    def check_unpacked(self, what: str, units: Sequence[OnDevice], again: Callable[[], None]) -> None:
        """Units of one block were unpacked; ``again`` does that once more, from what has arrived."""
