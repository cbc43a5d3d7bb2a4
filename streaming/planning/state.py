"""What of a streamed model is where."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from .plan import Plan


class State(Enum):
    """What of a streamed model is where.

    UNLOADED: modules use the originals; nothing on the device. Master copies made earlier are kept in host memory.
    LOADED: the rest and the resident units are on the device, the slots too. Streamed units have master copies in host
        memory, or get them before the second step, or stream from where they are.
    REDUCED: as LOADED, but some residents or master copies were given up and nothing made in their place. The next
        load, or the next step, makes the model whole.
    """

    UNLOADED = "unloaded"
    LOADED = "loaded"
    REDUCED = "reduced"


class Standing(NamedTuple):
    """How a model stands on its device at one moment: what a decision about its next plan starts from.

    Attributes:
        state: what is where.
        plan: in effect; None while unloaded.
        device_bytes: what the model has of the device, with slots that went with its master copies and will come back.
        device_budget: what the device allows it; None where it has no limit of its own.
    """

    state: State
    plan: Plan | None
    device_bytes: int
    device_budget: int | None
