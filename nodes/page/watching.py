"""Tells pages once a second how devices are used, while they ask for it.

A page renews a lease for as long as it shows that. Without a lease there is no task and no sample.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from .status import StatusSource, shorten

if TYPE_CHECKING:
    from server import PromptServer

logger = logging.getLogger(__name__)

EVENT = "weightstream.status"
LEASE_SECONDS = 10.0
INTERVAL_SECONDS = 1.0


class Watch:
    """Sends events to the pages that have a lease. Used on the server's event loop alone."""

    def __init__(self, server: PromptServer, source: StatusSource) -> None:
        self._server = server
        self._source = source
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
        async with self._source() as read:
            while self._drop_ended():
                event = shorten(await read())
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
