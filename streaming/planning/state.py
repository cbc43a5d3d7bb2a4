"""The states of a streamed model, and what a decision about its next plan starts from."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from .plan import Plan


class State(Enum):
    """What a streamed model has on the device and in host memory.

    UNLOADED: modules use the originals; nothing is on the device. Master copies made earlier are kept in host memory.
    LOADED: the rest, the resident units and the slots are on the device. Streamed units have master copies in host
        memory, or get them before the second step, or stream from where they are.
    REDUCED: as LOADED, but some residents or master copies were evicted and not replaced. The next load, or the next
        step, makes the model whole.
    """

    UNLOADED = "unloaded"
    LOADED = "loaded"
    REDUCED = "reduced"


class Standing(NamedTuple):
    """A model on its device at one moment: what a decision about its next plan starts from.

    Attributes:
        state: see :class:`State`.
        plan: in effect; None while unloaded.
        device_bytes: of the device, for the model; slots count that were freed with master copies and will come back.
        device_budget: bytes that the device allows; None where it sets no limit of its own.
    """

    state: State
    plan: Plan | None
    device_bytes: int
    device_budget: int | None
