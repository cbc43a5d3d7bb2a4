"""What streams on a card with so much VRAM, and how long that takes, in plain words."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from ..config import StreamingConfig, format_bytes
from ..errors import BudgetError
from ..planning.plan import Plan
from ..planning.profile import Profile, assumed_profile
from ..planning.search import make_plan, minimum_bytes
from .cutting import Cut

GIB = 1 << 30
# GiB of the VRAM for activations and kernels of a picture of 1024 x 1024, the driver and a desktop (docs/cards.md).
ASSUMED_RESERVE = 2.5
# What the system and ComfyUI use of the RAM, besides weights.
USED_RAM = 5 * GIB
# ComfyUI's limit of page-locked memory, as a part of the RAM (0.30), by ``os.name``.
PINNED_SHARE = {"nt": 0.4, "posix": 0.9}
# So much of the RAM stays free, or this part of it if that is less (nodes/host/devices.py).
RESERVED_RAM, RESERVED_SHARE = 2 * GIB, 0.1
# PCIe 4.0 with 16 lanes.
ASSUMED_LINK = 25.0
CARDS = (8, 12, 16, 24)


@dataclass(frozen=True)
class Machine:
    """What a model would run on.

    Attributes:
        vram, reserve, ram: GiB; RAM of 0 is not known.
        link: GB/s from RAM to the card.
        compute_seconds: of a step with all weights in VRAM; None where it was never measured.
        system: as ``os.name`` says.
    """

    vram: float
    reserve: float = ASSUMED_RESERVE
    ram: float = 0.0
    link: float = ASSUMED_LINK
    compute_seconds: float | None = None
    system: str = "posix"

    @property
    def budget(self) -> float:
        return max(0.0, self.vram - self.reserve) * GIB


def pinnable_bytes(ram: float, system: str) -> float:
    """Bytes that may be page-locked on a machine with ``ram`` bytes, whose ``os.name`` is ``system``."""
    share = PINNED_SHARE.get(system, PINNED_SHARE["posix"])
    return max(0.0, min(share * ram, ram - USED_RAM - min(RESERVED_RAM, RESERVED_SHARE * ram)))


def plan_for(cut: Cut, machine: Machine) -> Plan:
    """The plan that the pack would begin with; with measured times the one that it would come to.

    Raises:
        BudgetError: the VRAM has no room for it.
    """
    profile = replace(assumed_profile(cut.outline), bandwidth=machine.link * 1e9)
    if machine.compute_seconds is not None:
        profile = _measured(profile, machine.compute_seconds)
    return make_plan(cut.outline, profile, machine.budget, StreamingConfig())


def _measured(profile: Profile, seconds: float) -> Profile:
    blocks = len(profile.block_seconds)
    return replace(profile, block_seconds=(seconds / blocks,) * blocks, measured=True)


def describe_model(name: str, cut: Cut) -> list[str]:
    """Lines about the file."""
    lists = ", ".join(f"{count} in {name}" for name, count in cut.lists.items())
    dtypes = ", ".join(f"{dtype} {format_bytes(nbytes)}" for dtype, nbytes in cut.dtypes.items())
    outline = cut.outline
    lines = [
        f"{name}: {format_bytes(cut.file_bytes)} ({dtypes})",
        f"  {outline.blocks} blocks ({lists}) with {format_bytes(sum(outline.unit_bytes))}; "
        f"{format_bytes(outline.rest_bytes)} outside of them always stay in VRAM",
    ]
    if outline.model_bytes < 0.9 * cut.file_bytes:
        lines.append(f"  ComfyUI computes in 16 bits, so it takes {format_bytes(outline.model_bytes)}")
    return lines


def describe_plan(cut: Cut, machine: Machine) -> list[str]:
    """Lines about what happens on a machine."""
    left = "are left" if machine.reserve < machine.vram else "would have to be left"
    title = f"with {machine.vram:g} GiB of VRAM, of which {machine.reserve:g} {left} to activations and others:"
    try:
        plan = plan_for(cut, machine)
    except BudgetError:
        least = minimum_bytes(cut.outline, assumed_profile(cut.outline)) / GIB + machine.reserve
        return [title, f"  too little: {math.ceil(least * 10) / 10:g} GiB are the least that it runs with"]
    if not plan.segments:
        return [title, f"  nothing streams: all of it stays in VRAM ({format_bytes(plan.device_bytes)})"]
    blocks = cut.outline.blocks
    return [
        title,
        f"  each step   streams {format_bytes(plan.streamed_bytes)}, from {blocks - plan.resident_blocks} of {blocks} "
        f"blocks; {format_bytes(plan.device_bytes)} are in VRAM",
        f"  RAM         {format_bytes(plan.streamed_weight_bytes)} page-locked" + _ram_text(cut, plan, machine),
        *_time_lines(cut, plan, machine),
    ]


def _ram_text(cut: Cut, plan: Plan, machine: Machine) -> str:
    if not machine.ram:
        return ""
    most = pinnable_bytes(machine.ram * GIB, machine.system)
    if plan.streamed_weight_bytes <= most:
        return f", of at most {format_bytes(most)} where there are {machine.ram:g} GiB"
    left = format_bytes(plan.streamed_weight_bytes - most)
    disk = "" if cut.file_bytes < machine.ram * GIB else ", which RAM does not hold: at the disk's speed"
    limit = f"{format_bytes(most)} of {machine.ram:g} GiB"
    return f", but at most {limit} may be: {left} of each step come from the file{disk}"


def _time_lines(cut: Cut, plan: Plan, machine: Machine) -> list[str]:
    seconds = plan.streamed_bytes / (machine.link * 1e9)
    packed = seconds * cut.packed_share
    packs = cut.packed_share < 0.95
    bus = f"  the bus     {_text(seconds)} s of each step at {machine.link:g} GB/s"
    bus += f"; about {_text(packed)} s with packed weights" if packs else ""
    if (forecast := plan.forecast) is None:
        return [
            bus,
            "  s/step      not known: that is the bus's part alone; compute was not measured on this card",
        ]
    step = f"  s/step      {_text(forecast.seconds)} s predicted ({_text(forecast.compute_seconds)} s of compute)"
    if packs and forecast.limited_by == "bus":
        step += f"; about {_text(max(packed, forecast.compute_seconds))} s with packed weights"
    return [bus, step]


def _text(seconds: float) -> str:
    """Two digits, or all before the point."""
    return f"{seconds:.2g}" if seconds < 99.5 else f"{seconds:.0f}"


def measured_by(status: dict[str, Any], name: str) -> float | None:
    """Seconds of a step's compute that a running ComfyUI has measured for a file; None if it has not."""
    found = [model.get("compute_seconds") for model in status["models"] if model["name"] == name]
    known = [seconds for seconds in found if seconds is not None]
    return known[0] if len(found) == len(known) == 1 else None
