"""Frozen settings of the engine, and what users write: byte counts and switches."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from .errors import ConfigError

# Control characters, the ends of lines and paragraphs of Unicode, and what changes the direction of what follows.
CONTROLS = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069]")

# How many of the largest segments the ring holds usually, for small models too, and at most, for a step that needs much
# at once.
USUAL_SLOTS = 4
MOST_SLOTS = 8

# Asks for devices in RAM, where there is no GPU.
VIRTUAL_VARIABLE = "WEIGHTSTREAM_VIRTUAL"

UNITS = {"": 1, "B": 1, "KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30}


class PackingMode(Enum):
    """When weights that stream are packed (docs/packing.md)."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


@dataclass(frozen=True)
class StreamingConfig:
    """How one model is streamed.

    Attributes:
        copy_streams: streams that copy segments to the device, used in turn. 0 copies each on the compute
            stream when it is needed (synchronous: for debugging, and where asynchronous copies are switched off).
        slots: how many of the largest segments the staging memory holds; 0 chooses as many as ``staging_bytes`` has
            room for, or more where that makes a step faster, and 1 when copies are synchronous.
        staging_bytes: bytes that slots usually take together, once the order in which the parts of a block run is
            known.
        segment_bytes: parts of a block that run one after another are copied together up to this size. Copies of 16 MB
            and more reach the bus's full bandwidth.
        pin_memory: page-lock the host copies. Without it a copy is staged by the driver and blocks the caller.
        pinned_limit: bytes of this model that may be page-locked; None sets no limit of its own.
        stream_all: keep nothing on the device except what lies outside of blocks.
        vram_limit: bytes that weights and staging may take on the device; None takes what is offered.
        headroom_bytes: device memory that stays free beside the weights and a step's measured activations.
        adaptive: follow the memory that steps were measured to leave, instead of what was offered for the first.
        fill_threads: threads that fill host memory while a load or a step waits for it; 0 takes the number of cores, at
            most 16.
        read_threads, chunk_bytes, chunks: threads that read ahead, and the page-locked ring that they read into.
        build_threads: threads that build master copies behind other work, before a model is loaded.
        packing: whether weights are packed where that makes a step faster (``AUTO``), wherever they stream, or never.
        verify: compare every copy on the device with its source before it is used (verify.py; for debugging).
    """

    copy_streams: int = 2
    slots: int = 0
    staging_bytes: int = 400_000_000
    segment_bytes: int = 32 * 1024**2
    pin_memory: bool = True
    pinned_limit: int | None = None
    stream_all: bool = False
    vram_limit: int | None = None
    headroom_bytes: int = 200_000_000
    adaptive: bool = True
    fill_threads: int = 0
    read_threads: int = 8
    chunk_bytes: int = 8 * 1024**2
    chunks: int = 16
    build_threads: int = 4
    packing: PackingMode = PackingMode.AUTO
    verify: bool = False

    def __post_init__(self) -> None:
        for name in ("copy_streams", "slots", "staging_bytes", "segment_bytes", "headroom_bytes", "fill_threads"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("read_threads", "chunk_bytes", "chunks", "build_threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("vram_limit", "pinned_limit"):
            if (limit := getattr(self, name)) is not None and limit < 0:
                raise ConfigError(f"{name} must be None or 0 bytes and more, got {limit}")
        if not isinstance(self.packing, PackingMode):
            raise ConfigError(f"packing must be a PackingMode, got {self.packing!r}")

    @property
    def synchronous(self) -> bool:
        return self.copy_streams == 0

    def slot_counts(self, slot_bytes: int) -> tuple[int, ...]:
        """Numbers of the largest segments, of ``slot_bytes``, that the ring may hold, the preferred one first.

        Two keep the bus busy, one fills while the other is read; a few more make up for blocks that need much at once.
        """
        if self.synchronous:
            return (1,)
        usual = self.slots or max(2, min(USUAL_SLOTS, self.staging_bytes // max(1, slot_bytes)))
        most = self.slots or MOST_SLOTS
        return (*range(usual, most + 1), *range(usual - 1, 0, -1))

    @property
    def threads(self) -> int:
        # Filling memory is bound by memory: all the cores of a large machine would only get in each other's way.
        return self.fill_threads or min(16, os.cpu_count() or 1)


def parse_switch(name: str, text: str) -> bool:
    """Whether the variable ``name`` with this value switches something on: ``1``; ``0`` and nothing switch it off.

    Raises:
        ConfigError: it has another value.
    """
    if text.strip() not in ("", "0", "1"):
        raise ConfigError(f"{name}={text!r}: expected 1 to switch it on, or 0")
    return text.strip() == "1"


@dataclass(frozen=True)
class VirtualDevices:
    """``count`` devices of ``budget`` bytes each that live in ordinary RAM (``WEIGHTSTREAM_VIRTUAL``)."""

    count: int
    budget: int


def parse_virtual_devices(text: str) -> VirtualDevices:
    """Read ``COUNTxBYTES`` such as ``2x24MB``.

    Raises:
        ConfigError: the text has another form, or a count or size of zero.
    """
    match = re.fullmatch(r"\s*(\d+)\s*[xX]\s*(\d+(?:\.\d+)?)\s*([KMG]?B)?\s*", text, re.IGNORECASE)
    count = int(match[1]) if match else 0
    budget = int(float(match[2]) * UNITS[(match[3] or "").upper()]) if match else 0
    if count < 1 or budget < 1:
        raise ConfigError(f"{VIRTUAL_VARIABLE}={text!r}: expected COUNTxBYTES with both above 0, such as 2x24MB")
    return VirtualDevices(count, budget)


def count_of(count: int, noun: str) -> str:
    """``1 block``, ``57 blocks``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def listed(names: Sequence[str]) -> str:
    """In words: ``gpu:0, gpu:1 and gpu:2``."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def plain(text: str) -> str:
    """Return a text with control characters written out: in a terminal it sets nothing, and stays one line."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def format_bytes(count: float) -> str:
    """``count`` bytes for people: ``22.2 GiB``, ``648 MiB``, ``512 B``: the units in which users set limits."""
    return _in_units(count, (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)))


def format_rate(bytes_per_second: float) -> str:
    """A rate for people: ``55.2 GB/s``, in the decimal units in which buses and drives are rated."""
    return _in_units(bytes_per_second, (("GB", 10**9), ("MB", 10**6), ("KB", 10**3))) + "/s"


def _in_units(count: float, units: tuple[tuple[str, int], ...]) -> str:
    for unit, size in units:
        if count >= size * 0.9995:  # 1023.9 MiB would be shown as 1024 MiB.
            value = count / size
            return f"{value:.1f} {unit}" if value < 99.95 else f"{value:.0f} {unit}"
    return f"{count:.0f} B"
