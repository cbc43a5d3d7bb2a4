"""The status of all workers as one, for the panel and for ``python -m streaming status``."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from ...fleet.dispatcher import ANSWER_SECONDS, Dispatcher
from ...fleet.errors import FleetError
from ...fleet.jobs import Seat
from ..page.status import Status, full_status

logger = logging.getLogger(__name__)

STATUS_PATH = "/weightstream/v1/status"
# Between a worker's name and what it calls a model or a device itself.
OF_WORKER = "."


class FleetStatus:
    """Asks the workers, and says it in one.

    Devices are called as their worker; models have its name before their number, which is how a route finds whom a
    request is for.
    """

    def __init__(
        self, dispatcher: Callable[[], Dispatcher | None], waiting: Callable[[], int], why: Callable[[], str]
    ) -> None:
        self._dispatcher = dispatcher
        self._waiting = waiting
        self._why = why

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[Callable[[], Awaitable[Status]]]:
        yield self.read

    async def read(self) -> dict[str, Any]:
        # Of this process: versions and RAM. It has no devices and no models.
        own = await asyncio.to_thread(full_status)
        dispatcher = self._dispatcher()
        seats = dispatcher.seats if dispatcher is not None else []
        found = await asyncio.gather(*(self._ask(seat) for seat in seats))
        parts = [_of_worker(seat.worker.name, status) for seat, status in zip(seats, found, strict=True) if status]
        merged = {
            name: [each for part in parts for each in part[name]] for name in ("devices", "models", "causes", "notices")
        }
        why_none = self._why() or ("no worker is up" if not parts else None)
        return {
            **own,
            **merged,
            "host": {**own["host"], **_pinned(seats, found)},
            "why_no_devices": None if merged["devices"] else why_none,
            "fleet": {
                "waiting": self._waiting(),
                "reruns": dispatcher.reruns if dispatcher is not None else 0,
                "workers": [_describe(seat) for seat in seats],
            },
        }

    async def _ask(self, seat: Seat) -> dict[str, Any] | None:
        if not seat.up:
            return None
        try:
            asked = seat.worker.request("GET", STATUS_PATH, {}, b"")
            code, _, body = await asyncio.wait_for(asked, ANSWER_SECONDS)
            return json.loads(body) if code == 200 else None
        except (FleetError, asyncio.TimeoutError) as error:
            logger.debug("[WeightStream] %s has no status: %r", seat.worker.name, error)
            return None


def _pinned(seats: Sequence[Seat], found: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    """The bytes that workers have page-locked, and how much of it they share.

    What is shared on a host counts once: as much as one of its workers has of it.
    """
    own, shared = 0, dict[str, int]()
    hosts = [(str(seat.info.get("host")), each["host"]) for seat, each in zip(seats, found, strict=True) if each]
    for name, host in hosts:
        of_others = host.get("shared_bytes", 0)
        own += host["pinned"] - of_others
        shared[name] = max(shared.get(name, 0), of_others)
    told: dict[str, Any] = {"pinned": own + sum(shared.values())}
    if any("shared_bytes" in host for _, host in hosts):
        told["shared_bytes"] = sum(shared.values())
        told["why_unshared"] = next((host["why_unshared"] for _, host in hosts if host.get("why_unshared")), "")
    return told


def whose(model: object) -> tuple[str, str]:
    """The worker that a model of the merged status is on, and its number there."""
    worker, _, number = str(model).rpartition(OF_WORKER)
    return worker, number


def _of_worker(name: str, status: Mapping[str, Any]) -> dict[str, Any]:
    """A worker's status with its names made those of the fleet."""
    several = len(status["devices"]) > 1

    def device(own: str) -> str:
        return f"{name}{OF_WORKER}{own}" if several else name

    def model(number: str) -> str:
        return f"{name}{OF_WORKER}{number}"

    return {
        **status,
        "devices": [{**each, "device": device(each["device"])} for each in status["devices"]],
        "models": [{**each, "id": model(each["id"]), "device": device(each["device"])} for each in status["models"]],
        "causes": [
            {**each, "model": model(each["model"]), "device": device(each["device"])} for each in status["causes"]
        ],
    }


def _describe(seat: Seat) -> dict[str, Any]:
    """A worker: where it is, and what it does."""
    running = seat.job is not None
    return {
        "name": seat.worker.name,
        "host": seat.info.get("host"),
        "pid": seat.info.get("pid") if seat.up else None,
        "state": seat.state,
        "reason": seat.reason.splitlines()[0] if seat.reason else "",
        "prompt_id": seat.job.id if seat.job is not None else None,
        "since": round(time.time() - (time.monotonic() - seat.since), 1) if running else None,
        "done": seat.done,
        "changes": seat.changes,
        "loaded": sorted(file.name for file in seat.loaded) if seat.up else [],
    }
