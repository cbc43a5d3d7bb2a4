"""How devices and the host's memory are used, sampled for those who watch.

[Note: watching costs nothing]
A sample asks the driver and torch's statistics, which wait for no stream, and makes no context on a GPU that nobody
uses (streaming/vram.py). It is taken when somebody asks, and never by itself. What lies between two samples gives
rates.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import torch

from ..streaming import Snapshot, Vram, VramReader
from . import status
from .devices import pins, virtual_devices
from .gpus import visible_gpus

if TYPE_CHECKING:
    from .streamed_model import StreamedModel

# Rates are of at least so long, and nothing is told of a time that is longer than the other.
SHORTEST_SECONDS = 0.5
LONGEST_SECONDS = 5.0


@dataclass(frozen=True)
class DeviceUsage:
    """How the memory of one device is used, in bytes; None where it is not known. The parts add up to ``total``.

    Attributes:
        device, name: as nodes name it, and what it is sold as.
        virtual: it lives in RAM.
        total, free: all; what nobody has.
        resident, staging: streamed models: weights that stay; slots through which the others pass.
        torch, cache: what else torch has given out; what it keeps for its next allocations.
        other: other processes, contexts of drivers, models with ComfyUI's dynamic VRAM.
        peak: the most that was seen in use since the last run began.
        copy_rate: bytes per second that were copied to it since the sample before.
        stalled: the part of that time for which compute waited for copies, at most 1.
    """

    device: str
    name: str
    virtual: bool
    total: int | None
    free: int | None
    resident: int
    staging: int
    torch: int | None
    cache: int | None
    other: int | None
    peak: int | None = None
    copy_rate: float | None = None
    stalled: float | None = None

    @property
    def used(self) -> int | None:
        return None if self.total is None or self.free is None else self.total - self.free


@dataclass(frozen=True)
class HostUsage:
    """Host memory in bytes: the machine's, and what this pack has page-locked of it (no limit: None)."""

    ram_total: int
    ram_available: int
    pinned: int
    pinned_limit: int | None


class Sample(NamedTuple):
    """All of it at one moment, which is in ``time``'s seconds."""

    time: float
    devices: tuple[DeviceUsage, ...]
    host: HostUsage

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"devices": [asdict(device) for device in self.devices], "host": asdict(self.host)}


class _Done(NamedTuple):
    """What a model has copied, in bytes, and waited, in seconds, since it was made."""

    copied: int
    stalled: float


class _Rates(NamedTuple):
    copy_rate: float | None = None
    stalled: float | None = None


class Sampler:
    """Takes samples, on any thread, and keeps what the next one is compared with."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._moment: float | None = None
        # Weakly: who watches must not keep models alive.
        self._done: weakref.WeakKeyDictionary[StreamedModel, _Done] = weakref.WeakKeyDictionary()
        self._rates: dict[str, _Rates] = {}
        self._runs: dict[str, int] = {}
        self._peaks: dict[str, int] = {}

    def sample(self, reader: VramReader) -> Sample:
        """How things stand now."""
        with self._lock:
            models = {model: model.streamer.snapshot() for model in status.watched()}
            self._measure(models)
            devices = [self._usage(name, device, models, reader) for name, device in visible_gpus().items()]
            return Sample(time.time(), tuple(devices), _host_usage())

    def _measure(self, models: Mapping[StreamedModel, Snapshot]) -> None:
        """Take the rates of all devices anew, unless that was just done."""
        now = time.monotonic()
        elapsed = None if self._moment is None else now - self._moment
        if elapsed is not None and elapsed < SHORTEST_SECONDS:
            return
        known = elapsed is not None and elapsed <= LONGEST_SECONDS
        self._moment = now
        totals: dict[str, _Done] = {}
        for model, snapshot in models.items():
            done = _Done(snapshot.counters.streamed_bytes, snapshot.counters.stall_seconds)
            then, total = self._done.get(model, _Done(0, 0.0)), totals.get(model.gpu, _Done(0, 0.0))
            self._done[model] = done
            totals[model.gpu] = _Done(
                total.copied + done.copied - then.copied, total.stalled + done.stalled - then.stalled
            )
        idle = dict.fromkeys(visible_gpus(), _Done(0, 0.0))
        self._rates = {
            name: _Rates(total.copied / elapsed, min(1.0, total.stalled / elapsed)) if known else _Rates()
            for name, total in (idle | totals).items()
        }

    def _usage(
        self, name: str, device: torch.device, models: Mapping[StreamedModel, Snapshot], reader: VramReader
    ) -> DeviceUsage:
        ours = [snapshot for model, snapshot in models.items() if model.gpu == name]
        usage = _memory(name, device, ours, reader)
        peak = self._peak(name, sum(snapshot.counters.runs for snapshot in ours), usage.used)
        return replace(usage, peak=peak, **self._rates.get(name, _Rates())._asdict())

    def _peak(self, device: str, runs: int, used: int | None) -> int | None:
        """The most that was in use since the last run on ``device`` began."""
        if used is None:
            return None
        if self._runs.get(device) != runs:
            self._runs[device] = runs
            self._peaks.pop(device, None)
        self._peaks[device] = max(used, self._peaks.get(device, 0))
        return self._peaks[device]


sampler = Sampler()


def _memory(name: str, device: torch.device, ours: Sequence[Snapshot], reader: VramReader) -> DeviceUsage:
    held = sum(snapshot.device_bytes for snapshot in ours)
    staging = sum(min(snapshot.staging_bytes, snapshot.device_bytes) for snapshot in ours)
    if device.type == "cpu":
        memory = virtual_devices()[device.index or 0]
        vram = Vram(memory.budget, memory.budget - memory.allocated, memory.allocated, memory.allocated)
        title = "virtual device in RAM"
    else:
        vram, title = reader.read(device.index), torch.cuda.get_device_properties(device.index).name
    # The figures are from moments that follow one another: what is negative is of something that just came or went.
    other = None if vram.free is None else max(0, vram.total - vram.free - vram.reserved)
    return DeviceUsage(
        name,
        title,
        device.type == "cpu",
        vram.total,
        vram.free,
        held - staging,
        staging,
        max(0, vram.allocated - held),
        max(0, vram.reserved - vram.allocated),
        other,
    )


def _host_usage() -> HostUsage:
    memory = psutil.virtual_memory()
    return HostUsage(memory.total, memory.available, pins.locked, pins.limit)
