"""What streams on a card with so much VRAM, and how long that takes, in plain words."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
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
# What part of a link a copy from page-locked memory is taken to reach. An H200's reaches 0.88.
LINK_SHARE = 0.8
# PCIe 4.0 with 16 lanes.
ASSUMED_LINK = 25.0
# Weights that shrink by less are not said to be packed.
WORTH_PACKING = 0.95
# A model is the file's if its sizes differ by no more than this part: ComfyUI may leave out or merge a layer.
LIKE = 0.05
# Loaded in fp8, as it is, or in float32, as ComfyUI does where nothing computes in 16 bits; that of fp8 too.
TIMES_AS_LARGE = (0.5, 1, 2, 4)
# ComfyUI's folders of models that stream.
FOLDERS = ("diffusion_models", "unet", "checkpoints")
CARDS = (8, 12, 16, 24)


@dataclass(frozen=True)
class Machine:
    """What a model would run on.

    Attributes:
        vram, reserve, ram: GiB; RAM of 0 is not known.
        link: GB/s from RAM to the card.
        compute_seconds: of a step with all weights in VRAM; None where it was never measured.
        compute_source: where that is from, in words; empty where it was measured or given.
        system: as ``os.name`` says.
        limit: GiB of VRAM for weights and staging, as a node sets it; None where none does.
        pinned_limit: GiB of this model that may be page-locked; None where nobody has set it.
        keeps_nothing: whether a node has all blocks stream.
        packs: whether weights may stream packed.
        overlaps: whether they are copied while others compute.
    """

    vram: float
    reserve: float = ASSUMED_RESERVE
    ram: float = 0.0
    link: float = ASSUMED_LINK
    compute_seconds: float | None = None
    system: str = "posix"
    compute_source: str = ""
    limit: float | None = None
    pinned_limit: float | None = None
    keeps_nothing: bool = False
    packs: bool = True
    overlaps: bool = True

    @property
    def room(self) -> float:
        """Bytes of VRAM for weights and staging, if no limit is set."""
        return max(0.0, self.vram - self.reserve) * GIB

    @property
    def budget(self) -> float:
        return self.room if self.limit is None else min(self.room, self.limit * GIB)


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
    streams = StreamingConfig.copy_streams if machine.overlaps else 0
    config = StreamingConfig(copy_streams=streams, stream_all=machine.keeps_nothing)
    return make_plan(cut.outline, profile, machine.budget, config)


def _measured(profile: Profile, seconds: float) -> Profile:
    blocks = len(profile.block_seconds)
    return replace(profile, block_seconds=(seconds / blocks,) * blocks, measured=True)


@dataclass(frozen=True)
class Estimate:
    """What a model will do on a machine: sizes in bytes.

    Attributes:
        plan: None where the VRAM has no room for any.
    """

    cut: Cut
    machine: Machine
    plan: Plan | None

    @property
    def streams(self) -> bool:
        return self.plan is not None and bool(self.plan.segments)

    @property
    def least_vram(self) -> float:
        """GiB of VRAM that it runs with, what is left to others among them; rounded up to a tenth."""
        return _rounded_up(self._least / GIB + self.machine.reserve)

    @property
    def least_limit(self) -> float | None:
        """GiB to which the limit has to be raised; None where it is not the limit that leaves too little."""
        if self.plan is not None or self.machine.limit is None or self._least > self.machine.room:
            return None
        return _rounded_up(self._least / GIB)

    @cached_property
    def _least(self) -> int:
        return minimum_bytes(self.cut.outline, assumed_profile(self.cut.outline))

    @property
    def stays(self) -> int:
        """Bytes of weights that stay in VRAM."""
        return 0 if self.plan is None else self.plan.resident_bytes + self.plan.rest_bytes

    @property
    def streamed_bytes(self) -> int:
        """What crosses the bus in each step, and is page-locked as far as that may be."""
        return self.plan.streamed_weight_bytes if self.plan is not None else 0

    @property
    def streamed_blocks(self) -> int:
        return 0 if self.plan is None else self.cut.outline.blocks - self.plan.resident_blocks

    @property
    def pinnable(self) -> float | None:
        """Bytes that may be page-locked; None where the RAM is not known."""
        machine = self.machine
        if not machine.ram:
            return None
        most = pinnable_bytes(machine.ram * GIB, machine.system)
        return most if machine.pinned_limit is None else min(most, machine.pinned_limit * GIB)

    @property
    def from_file(self) -> float:
        """Bytes that come from the file in each step, because they may not be page-locked."""
        return 0 if self.pinnable is None else max(0, self.streamed_bytes - self.pinnable)

    @property
    def from_disk(self) -> bool:
        """Whether these come at the disk's speed, because RAM does not hold the file."""
        return self.from_file > 0 and self.cut.file_bytes >= self.machine.ram * GIB

    @property
    def bus_seconds(self) -> float:
        return self.streamed_bytes / (self.machine.link * 1e9)

    @property
    def packed_bus_seconds(self) -> float | None:
        """The same with packed weights; None where there are none, or they would hardly shrink."""
        if not (self.machine.packs and self.machine.overlaps) or self.cut.packed_share >= WORTH_PACKING:
            return None
        return self.bus_seconds * self.cut.packed_share

    @cached_property
    def step_seconds(self) -> float | None:
        """Seconds of a step; None where compute was not measured."""
        forecast = self.plan.forecast if self.plan is not None else None
        if forecast is None or self.machine.compute_seconds is None:
            return None
        return forecast.seconds if self.machine.overlaps else self.machine.compute_seconds + self.bus_seconds

    @property
    def packed_step_seconds(self) -> float | None:
        """The same with packed weights; None where these make it no faster."""
        compute, packed = self.machine.compute_seconds, self.packed_bus_seconds
        forecast = self.plan.forecast if self.plan is not None else None
        if forecast is None or compute is None or packed is None or forecast.limited_by != "bus":
            return None
        return max(packed, compute)


def _rounded_up(gib: float) -> float:
    """To a tenth."""
    return math.ceil(gib * 10) / 10


def estimate(cut: Cut, machine: Machine) -> Estimate:
    """What the pack would do with a model on a machine."""
    try:
        return Estimate(cut, machine, plan_for(cut, machine))
    except BudgetError:
        return Estimate(cut, machine, None)


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
    limit = "" if machine.limit is None else f", and a limit of {machine.limit:g}"
    title = f"with {machine.vram:g} GiB of VRAM, of which {machine.reserve:g} {left} to activations and others{limit}:"
    found = estimate(cut, machine)
    if found.least_limit is not None:
        return [title, f"  the limit is too low: {found.least_limit:g} GiB are the least that it runs with"]
    if found.plan is None:
        return [title, f"  too little: {found.least_vram:g} GiB are the least that it runs with"]
    if not found.streams:
        return [title, f"  nothing streams: all of it stays in VRAM ({format_bytes(found.plan.device_bytes)})"]
    return [
        title,
        f"  each step   streams {format_bytes(found.streamed_bytes)}, from {found.streamed_blocks} of "
        f"{cut.outline.blocks} blocks; {format_bytes(found.stays)} stay in VRAM, beside "
        f"{format_bytes(found.plan.device_bytes - found.stays)} of staging",
        f"  RAM         {format_bytes(found.streamed_bytes)} page-locked" + _ram_text(found),
        *_time_lines(found),
    ]


def _ram_text(found: Estimate) -> str:
    if (most := found.pinnable) is None:
        return ""
    ram = found.machine.ram
    if not found.from_file:
        return f", of at most {format_bytes(most)} where there are {ram:g} GiB"
    disk = ", which RAM does not hold: at the disk's speed" if found.from_disk else ""
    limit = f"{format_bytes(most)} of {ram:g} GiB"
    return f", but at most {limit} may be: {format_bytes(found.from_file)} of each step come from the file{disk}"


def _time_lines(found: Estimate) -> list[str]:
    bus = f"  the bus     {_text(found.bus_seconds)} s of each step at {found.machine.link:g} GB/s"
    if found.packed_bus_seconds is not None:
        bus += f"; about {_text(found.packed_bus_seconds)} s with packed weights"
    if found.step_seconds is None or found.machine.compute_seconds is None:
        return [
            bus,
            f"  s/step      streaming costs nothing where a step computes for {_text(found.bus_seconds)} s or more; "
            "compute was not measured on this card",
        ]
    compute = f"{_text(found.machine.compute_seconds)} s of compute{found.machine.compute_source}"
    step = f"  s/step      {_text(found.step_seconds)} s predicted ({compute})"
    if found.packed_step_seconds is not None:
        step += f"; about {_text(found.packed_step_seconds)} s with packed weights"
    return [bus, step]


def _text(seconds: float) -> str:
    """Two digits, or all before the point."""
    return f"{seconds:.2g}" if seconds < 99.5 else f"{seconds:.0f}"


def measured_by(status: dict[str, Any], path: Path, model_bytes: int) -> float | None:
    """Seconds of a step's compute that a running ComfyUI has measured for a file; None if it has not.

    A status names a file from the folder of its kind on (``flux/m.safetensors``), not the folder: another file's path
    may end in the same way, so the model has to be about as large too, or, if it is unloaded, which has no size, the
    file has to be in such a folder. Whatever else a status may be, it is no error.

    Args:
        model_bytes: what the file takes in 16 bits.
    """
    models = status.get("models")
    known = [model for model in models if isinstance(model, dict)] if isinstance(models, list) else []
    ends = [(_parts_shared(path, model.get("name")), model) for model in known]
    longest = max((shared for shared, _ in ends), default=0)
    found = [model for shared, model in ends if shared == longest > 0]
    # A part of a split model says nothing of it.
    if len(found) != 1 or (nbytes := _weight_bytes(found[0])) is None:
        return None
    is_like = any(abs(nbytes - times * model_bytes) <= LIKE * nbytes for times in TIMES_AS_LARGE)
    if not (is_like if nbytes else path.absolute().parts[-longest - 1] in FOLDERS):
        return None
    return known_number(found[0].get("compute_seconds"))


def _parts_shared(path: Path, name: Any) -> int:
    """Of how many parts a name is with which a path ends; 0 if it does not end so."""
    parts = re.split(r"[/\\]", name) if isinstance(name, str) and name else []
    return len(parts) if parts and list(path.absolute().parts[-len(parts) :]) == parts else 0


def _weight_bytes(model: dict[str, Any]) -> float | None:
    """Bytes of the weights of a model of a status; None where it does not say."""
    sizes = [known_number(model.get(f"{kind}_bytes"), least=0) for kind in ("resident", "rest", "streamed_weight")]
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def known_number(value: Any, least: float = math.ulp(0.0)) -> float | None:
    """A value that was measured elsewhere, if it is a number, finite, and not less than ``least`` (above 0)."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and least <= value <= sys.float_info.max else None
