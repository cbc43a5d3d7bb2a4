"""What is in effect, for people: log lines, text on the node, and the status route."""

from __future__ import annotations

import logging
import sys
import threading
import weakref
from typing import TYPE_CHECKING

from aiohttp import web

from . import devices

if TYPE_CHECKING:
    from server import PromptServer

    from .streamed_model import StreamedModel

logger = logging.getLogger(__name__)

STATUS_ROUTE = "/weightstream/v1/status"

_models: weakref.WeakSet[StreamedModel] = weakref.WeakSet()
# The route answers on the server's thread while the worker loads models.
_watching = threading.Lock()


def watch(model: StreamedModel) -> None:
    """Show ``model`` in the status for as long as it lives."""
    with _watching:
        _models.add(model)


def announce(name: str, text: str, node_id: str | None, again: bool = False) -> None:
    """Say ``text`` in the log, and on the node where there is one and a page to show it.

    ``again`` says that the log has this text already; the page may not have it, so the node still gets it.
    """
    logger.log(logging.DEBUG if again else logging.INFO, "[WeightStream] %s: %s", name, text)
    if node_id is not None:
        show(text, node_id)


def show(text: str, node_id: str) -> None:
    """Show ``text`` on a node, where there is a page."""
    if (server := _server()) is not None:
        server.send_progress_text(text, node_id)


def _server() -> PromptServer | None:
    """The host's server; None in a script that uses the nodes without one, which need not have it installed."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def status() -> dict[str, object]:
    """Every streamed model that lives, and the virtual devices. Plain values; sizes in bytes."""
    with _watching:
        models = sorted(_models, key=lambda model: model.name)
    return {
        "models": [{"name": model.name, **model.streamer.snapshot().as_dict()} for model in models],
        "virtual_devices": [
            {"device": memory.name, "allocated_bytes": memory.allocated, "budget_bytes": memory.budget}
            for memory in devices.virtual_devices()
        ],
    }


def add_routes() -> None:
    """Register the status route. Without a server there is nothing to do."""
    server = _server()
    if server is None:
        return

    @server.routes.get(STATUS_ROUTE)
    async def get_status(_request: web.Request) -> web.Response:
        return web.json_response(status())
