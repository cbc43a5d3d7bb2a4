"""How devices and the host's memory are used, sampled for pages and reports.

[Note: watching costs nothing]
A sample reads figures of the driver and of torch, which waits for no stream, and makes no context on a GPU that is not
in use (machine/vram.py). Samples are taken on request only. Rates follow from the difference of two samples.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import psutil
import torch

from ...streaming import Link, Snapshot, Vram, VramReader
from ...streaming.machine.gpus import NO_LINK
from ..host.devices import local_share, pins, virtual_devices
from ..host.gpus import visible_gpus
from ..model.streamed_model import streamed_models

# A rate spans at least the first time. After a gap between samples that is longer than the second, rates begin anew.
SHORTEST_SECONDS = 0.5
LONGEST_SECONDS = 5.0
# A minute of samples, or more: two steps seldom take longer.
MOST_SAMPLES = 120


@dataclass(frozen=True)
class DeviceUsage:
    """How the memory of one device is used, in bytes; None where it is not known. The parts add up to ``total``.

    Attributes:
        device, name: the name that nodes use, and the product name.
        virtual: whether it lives in RAM.
        total, free: all bytes, and those that are free.
        resident, staging: of streamed models: weights that stay; slots through which the others stream.
        torch, cache: what else torch has allocated; what it keeps for later allocations, with what weights leave unused
            of their pages.
        other: other processes, contexts of drivers, models with ComfyUI's dynamic VRAM.
        peak: the most that samples have seen in use since the last run began. Samples are taken on request only, but
            torch keeps the memory of activations, so that a sample after the run sees that too.
        copy_rate: bytes per second that were copied to it lately.
        stalled: the part of that time for which compute waited for copies, at most 1.
        link, card: its link as it was last while a model ran, and the best that the card can do.
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
    link: Link = NO_LINK
    card: Link = NO_LINK

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**asdict(self), "link": self.link._asdict(), "card": self.card._asdict()}

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
    """All usage at one moment; ``time`` is in seconds, as ``time.time()`` returns it."""

    time: float
    devices: tuple[DeviceUsage, ...]
    host: HostUsage

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"devices": [device.as_dict() for device in self.devices], "host": {**asdict(self.host), **_sharing()}}


class _Done(NamedTuple):
    """What a model has copied to a device, in bytes, and waited for, in seconds, since it was made."""

    copied: int = 0
    stalled: float = 0.0


class _Rates(NamedTuple):
    copy_rate: float | None = None
    stalled: float | None = None


# A model on a device: its number, and the device's name. Not the model itself, which sampling must not keep alive.
_Key = tuple[int, str]


class Sampler:
    """Takes samples, on any thread, and keeps what later ones are compared with."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._history: deque[tuple[float, dict[_Key, _Done]]] = deque(maxlen=MOST_SAMPLES)
        self._runs: dict[_Key, int] = {}
        self._peaks: dict[str, int] = {}
        self._links: dict[str, tuple[Link, Link]] = {}

    def sample(self, reader: VramReader) -> Sample:
        """How things stand now."""
        with self._lock:
            models = {(model.number, model.gpu): model.streamer.snapshot() for model in streamed_models()}
            now = time.monotonic()
            self._remember(now, models)
            devices = [self._usage(name, device, models, now, reader) for name, device in visible_gpus().items()]
            self._runs = {key: snapshot.counters.runs for key, snapshot in models.items()}
            return Sample(time.time(), tuple(devices), _host_usage())

    def _remember(self, now: float, models: Mapping[_Key, Snapshot]) -> None:
        last = self._history[-1][0] if self._history else -math.inf
        if now - last > LONGEST_SECONDS:
            self._history.clear()
        if now - last >= SHORTEST_SECONDS:
            counted = {key: snapshot.counters for key, snapshot in models.items()}
            done = {key: _Done(counters.streamed_bytes, counters.stall_seconds) for key, counters in counted.items()}
            self._history.append((now, done))

    def _rates(self, device: str, models: Mapping[_Key, Snapshot], now: float) -> _Rates:
        """Rates over the last second, or two steps if they take longer: copies are counted when they are queued."""
        ours = {key: snapshot for key, snapshot in models.items() if key[1] == device}
        steps = [snapshot.step_seconds or 0.0 for snapshot in ours.values() if snapshot.busy]
        since = now - max([1.0, *(2 * seconds for seconds in steps)])
        before = next((sample for sample in reversed(self._history) if sample[0] <= since), None)
        if before is None and self._history and now - self._history[0][0] >= SHORTEST_SECONDS:
            before = self._history[0]
        if before is None:
            return _Rates()
        moment, done = before
        then = {key: done.get(key, _Done()) for key in ours}
        copied = sum(snapshot.counters.streamed_bytes - then[key].copied for key, snapshot in ours.items())
        stalled = sum(snapshot.counters.stall_seconds - then[key].stalled for key, snapshot in ours.items())
        return _Rates(copied / (now - moment), min(1.0, stalled / (now - moment)))

    def _usage(
        self,
        name: str,
        device: torch.device,
        models: Mapping[_Key, Snapshot],
        now: float,
        reader: VramReader,
    ) -> DeviceUsage:
        ours = {key: snapshot for key, snapshot in models.items() if key[1] == name}
        usage = _memory(name, device, list(ours.values()), reader)
        begun = any(snapshot.counters.runs > self._runs.get(key, 0) for key, snapshot in ours.items())
        if device.type != "cpu" and any(snapshot.busy for snapshot in ours.values()):
            self._links[name] = reader.links(device.index)
        link, card = self._links.get(name, (NO_LINK, NO_LINK))
        rates = self._rates(name, models, now)._asdict()
        return replace(usage, peak=self._peak(usage, begun), link=link, card=card, **rates)

    def _peak(self, usage: DeviceUsage, begun: bool) -> int | None:
        """The most that was seen in use of a device since a run on it has ``begun``."""
        if usage.used is None:
            return None
        if begun:
            self._peaks.pop(usage.device, None)
        self._peaks[usage.device] = max(usage.used, self._peaks.get(usage.device, 0))
        return self._peaks[usage.device]


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
    # The figures are read one after another, so a difference is negative if memory was allocated or freed meanwhile.
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


def _sharing() -> dict[str, Any]:
    """How many of the page-locked bytes other processes of this machine may have too, and why others are this one's
    own. Where no broker was named only models of this process share, of which there is nothing to tell but why not."""
    if not pins.share.address:
        return {"why_unshared": local_share.reason} if local_share.reason else {}
    return {"shared_bytes": pins.shared, "why_unshared": pins.share.reason}


def _host_usage() -> HostUsage:
    memory = psutil.virtual_memory()
    return HostUsage(memory.total, memory.available, pins.locked, pins.limit)
