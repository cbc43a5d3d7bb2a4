"""Who is asked whether copies are what they should be (run/verify.py checks that, or nothing)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from .unit_copies import UnitCopies
from .weights import Weights


class Unpacked(NamedTuple):
    """A unit that was unpacked on the device.

    Attributes:
        copies: its packed copy is what it was unpacked from.
        memory: of its tensors, uint8 each, in the order of its layout.
    """

    copies: UnitCopies
    memory: Sequence[torch.Tensor]


class Checks(Protocol):
    """Is asked to check copies that have arrived.

    Attributes:
        trusting: whether copies that arrived while no step waited for them may be kept.
    """

    trusting: bool

    def check_resident(self, copies: UnitCopies) -> None:
        """A resident copy has arrived."""

    def check_loaded(self, weights: Weights, master: Weights | None) -> None:
        """Weights that will be packed have arrived on the device, from ``master`` or as they were loaded."""

    def sums_of(self, weights: Weights) -> torch.Tensor | None:
        """Return what :meth:`check_unpacked` needs of weights that will be packed, patches included; None for nothing.
        They are on the device, and whoever overwrites them waits for what is queued here."""

    def check_unpacked(self, what: str, units: Sequence[Unpacked], again: Callable[[], None]) -> None:
        """Units were unpacked; ``again`` does that once more, from what was copied to the device."""
