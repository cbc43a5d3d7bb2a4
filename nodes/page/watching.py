"""Tells pages once a second how devices are used, while they ask for it.

A page renews a lease for as long as it shows that. Without a lease there is no task and no sample.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import zlib
from typing import TYPE_CHECKING, Any

from ...streaming import VramReader, open_vram_reader
from ..model.streamed_model import streamed_models
from ..tell.notices import describe_notices
from .description import describe_causes, describe_models
from .usage import DeviceUsage, HostUsage, sampler

if TYPE_CHECKING:
    from server import PromptServer

logger = logging.getLogger(__name__)

SCHEMA = 1
EVENT = "weightstream.status"
LEASE_SECONDS = 10.0
INTERVAL_SECONDS = 1.0
# An event is small: about 2 KB with eight devices.
MOST_LOADING = 4
MOST_RUNNING = 16

# The fields of a device and of the host in an event, in order.
DEVICE_FIELDS = ("device", "total", "free", "resident", "staging", "torch", "cache", "other", "peak")
DEVICE_FIELDS += ("copy_rate", "stalled")
HOST_FIELDS = ("ram_total", "ram_available", "pinned", "pinned_limit")

# The fields of a model's entry that neither change all the time nor are in the event already.
STEADY_FIELDS = ("id", "name", "device", "node_id", "ladder", "reason", "plan", "last_run", "locking", "pinned_bytes")


def make_event(reader: VramReader) -> dict[str, Any]:
    """The state of devices, host memory and models in short form, as lists of values."""
    now = sampler.sample(reader)
    models = describe_models(streamed_models())
    causes = describe_causes(streamed_models(), now.devices)
    loading = [[model["id"], *model["loading"].values()] for model in models if model["loading"] is not None]
    running = [model["id"] for model in models if model["running"]]
    return {
        "schema": SCHEMA,
        "time": round(now.time, 1),
        "revision": _revision(models, now.devices, causes),
        "devices": [_row(device, DEVICE_FIELDS) for device in now.devices],
        "host": _row(now.host, HOST_FIELDS),
        "loading": [[_short(value) for value in row] for row in loading[:MOST_LOADING]],
        "running": list(dict.fromkeys(running))[:MOST_RUNNING],
    }


def _row(usage: DeviceUsage | HostUsage, fields: tuple[str, ...]) -> list[Any]:
    return [_short(getattr(usage, name)) for name in fields]


def _short(value: Any) -> Any:
    """Round a float: above 1 to whole bytes, else to thousandths."""
    if not isinstance(value, float):
        return value
    return round(value, 3) if value <= 1 else round(value)


def _revision(models: list[dict[str, Any]], devices: tuple[DeviceUsage, ...], causes: list[dict[str, Any]]) -> str:
    """A checksum that changes when something changes that the event leaves out.

    Of causes only the kinds count: their numbers change with each step.
    """
    told: list[Any] = [[device.device, device.name] for device in devices]
    told += [[model[name] for name in STEADY_FIELDS] for model in models]
    told += [[cause[name] for name in ("model", "device", "kind")] for cause in causes]
    told += describe_notices()
    return f"{zlib.crc32(json.dumps(told).encode()):08x}"


class Watch:
    """Sends events to the pages that have a lease. Used on the server's event loop alone."""

    def __init__(self, server: PromptServer) -> None:
        self._server = server
        self._leases: dict[str, float] = {}
        self._task: asyncio.Task[None] | None = None

    def renew(self, client_id: str) -> bool:
        """Send events to this page for the next :data:`LEASE_SECONDS`; returns False if no page has this id."""
        if client_id not in self._server.sockets:
            return False
        self._leases[client_id] = time.monotonic() + LEASE_SECONDS
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._send())
            self._task.add_done_callback(_tell_of_failure)
        return True

    @property
    def active(self) -> bool:
        """Whether events are being sent."""
        return self._task is not None and not self._task.done()

    async def _send(self) -> None:
        with open_vram_reader() as reader:
            while self._drop_ended():
                # In a thread, since a driver that is page-locking memory lets callers wait.
                event = await asyncio.to_thread(make_event, reader)
                for client_id in self._drop_ended():
                    self._server.send_sync(EVENT, event, client_id)
                await asyncio.sleep(INTERVAL_SECONDS)

    def _drop_ended(self) -> list[str]:
        """Forget leases that have ended, and pages that are gone. Returns the ids of the other pages."""
        now = time.monotonic()
        self._leases = {
            client_id: until
            for client_id, until in self._leases.items()
            if until > now and client_id in self._server.sockets
        }
        return list(self._leases)


def _tell_of_failure(task: asyncio.Task[None]) -> None:
    """Log an error that has ended the task. Pages notice that no event comes; their next renewal begins a new task."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("[WeightStream] the use of devices cannot be read: %s", error, exc_info=error)
