"""What ``expert_mode_allocations`` of DisTorch2 says: how the bytes of a model are divided among devices."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import Enum

CPU, DEFAULT = "cpu", "default"
GIB_OF_UNIT = {"g": 1.0, "m": 1 / 1024, "k": 1 / 1024**2, "": 1 / 1024**3}


class Measure(Enum):
    """What the numbers of an allocation mean."""

    BYTES = "bytes"  # cuda:0,4gb;cpu,*
    RATIO = "ratio"  # cuda:0,25%;cpu,75%
    MEMORY = "memory"  # cuda:0,0.5;cpu,0.5: parts of each device's own memory


@dataclass(frozen=True)
class Allocation:
    """An allocation as it was read.

    Attributes:
        measure: of the amounts.
        gpus: for each GPU named its amount: GiB of bytes, or a plain number; None for what is left over.
    """

    measure: Measure
    gpus: dict[str, float | None]


def read_allocation(text: str) -> Allocation | None:
    """Return what an allocation says; None if it cannot be read, or names a device that is no GPU here."""
    parts = [part.partition(",")[::2] for part in text.partition("#")[0].split(";") if part.strip()]
    amounts = [(device_name(device), amount.strip().lower()) for device, amount in parts]
    measure = _measure([amount for _, amount in amounts])
    gpus: dict[str, float | None] = {}
    for device, amount in amounts:
        number = _number(amount, measure)
        if device is None or number is None:
            return None
        if device not in (CPU, DEFAULT):
            gpus[device] = None if "*" in amount else number
    return Allocation(measure, gpus) if amounts else None


def device_name(text: str) -> str | None:
    """Return the name here of a device as torch writes it; None where there is none."""
    text = text.strip().lower()
    if text in (CPU, DEFAULT):
        return text
    match = re.fullmatch(r"cuda(?::([0-9]{1,2}))?", text)
    return f"gpu:{int(match[1] or 0)}" if match else None


def _measure(amounts: list[str]) -> Measure:
    if any("*" in amount or amount.endswith(("g", "m", "k", "b")) for amount in amounts):
        return Measure.BYTES
    return Measure.RATIO if any("%" in amount for amount in amounts) else Measure.MEMORY


def _number(text: str, measure: Measure) -> float | None:
    """The amount, in GiB if it is one of bytes; None if it is no number."""
    if measure is Measure.BYTES and text == "*":
        return 0.0
    units = r"\s*([gmk]?)b?\*?" if measure is Measure.BYTES else r"\s*()%?"
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)" + units, text)
    if match is None:
        return None
    number = float(match[1])
    return None if math.isinf(number) else number * (GIB_OF_UNIT[match[2]] if measure is Measure.BYTES else 1.0)
