"""How devices, host memory and models stand: in full for the route, and in short for events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from ...streaming import VramReader, open_vram_reader
from ..host import hosts
from ..host.contracts import broken_contracts
from ..host.gpus import visible_gpus, why_no_gpus
from ..host.version import VERSION
from ..model.streamed_model import streamed_models
from ..tell.notices import describe_notices
from .description import describe_causes, describe_models
from .environment import describe_environment
from .usage import sampler

Status = Mapping[str, Any]
# Opens whatever is needed to read the status again and again.
StatusSource = Callable[[], AbstractAsyncContextManager[Callable[[], Awaitable[Status]]]]

SCHEMA = 1
# An event is small: about 2 KB with eight devices.
MOST_LOADING = 4
MOST_RUNNING = 16

# The fields of a device and of the host in an event, in order.
DEVICE_FIELDS = ("device", "total", "free", "resident", "staging", "torch", "cache", "other", "peak")
DEVICE_FIELDS += ("copy_rate", "stalled")
HOST_FIELDS = ("ram_total", "ram_available", "pinned", "pinned_limit")
# Of a worker of a fleet those that change with each prompt, and those that change with its models.
WORKER_FIELDS = ("name", "state", "reason", "since", "done", "changes")
STEADY_WORKER_FIELDS = ("name", "host", "loaded")

# The fields of a model's entry that neither change all the time nor are in the event already.
STEADY_FIELDS = ("id", "name", "device", "node_id", "ladder", "reason", "plan", "last_run", "locking", "pinned_bytes")
STEADY_FIELDS += ("parallel",)


def full_status(reader: VramReader | None = None) -> dict[str, Any]:
    """Devices, host memory, models and notices of this process: plain values, sizes in bytes."""
    with contextlib.ExitStack() as stack:
        reader = reader or stack.enter_context(open_vram_reader())
        now, environment = sampler.sample(reader), describe_environment(reader)
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "time": now.time,
        **now.as_dict(),
        "comfyui": {"version": hosts.VERSION, "broken": list(broken_contracts())},
        "environment": environment,
        "why_no_devices": None if visible_gpus() else why_no_gpus(),
        "models": describe_models(streamed_models()),
        "causes": describe_causes(streamed_models(), now.devices),
        "notices": describe_notices(),
    }


@contextlib.asynccontextmanager
async def own_status() -> AsyncIterator[Callable[[], Awaitable[Status]]]:
    """The status of this process, read in a thread: a driver that is page-locking memory lets callers wait."""
    with open_vram_reader() as reader:
        yield lambda: asyncio.to_thread(full_status, reader)


def shorten(status: Status) -> dict[str, Any]:
    """The event for a status: devices, host memory and models in short form, as lists of values."""
    models = status["models"]
    loading = [[model["id"], *model["loading"].values()] for model in models if model["loading"] is not None]
    running = [model["id"] for model in models if model["running"]]
    return {
        "schema": status["schema"],
        "time": round(status["time"], 1),
        "revision": _revision(status),
        "devices": [_row(device, DEVICE_FIELDS) for device in status["devices"]],
        "host": _row(status["host"], HOST_FIELDS),
        "loading": [[_short(value) for value in row] for row in loading[:MOST_LOADING]],
        "running": list(dict.fromkeys(running))[:MOST_RUNNING],
        **({"fleet": _shorten_fleet(status["fleet"])} if "fleet" in status else {}),
    }


def _shorten_fleet(fleet: Mapping[str, Any]) -> dict[str, Any]:
    return {**fleet, "workers": [_row(worker, WORKER_FIELDS) for worker in fleet["workers"]]}


def _row(usage: Mapping[str, Any], fields: Sequence[str]) -> list[Any]:
    return [_short(usage[name]) for name in fields]


def _short(value: Any) -> Any:
    """Round a float: above 1 to whole bytes, else to thousandths."""
    if not isinstance(value, float):
        return value
    return round(value, 3) if value <= 1 else round(value)


def _revision(status: Status) -> str:
    """A checksum that changes when something changes that the event leaves out.

    Of causes only the kinds count: their numbers change with each step.
    """
    told: list[Any] = [[device["device"], device["name"]] for device in status["devices"]]
    told += [[model[name] for name in STEADY_FIELDS] for model in status["models"]]
    told += [[cause[name] for name in ("model", "device", "kind")] for cause in status["causes"]]
    told += status["notices"]
    workers = status["fleet"]["workers"] if "fleet" in status else ()
    told += [[worker[name] for name in STEADY_WORKER_FIELDS] for worker in workers]
    return f"{zlib.crc32(json.dumps(told).encode()):08x}"
