"""What is in effect, for people: log lines and text on the node."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from server import PromptServer

logger = logging.getLogger(__name__)


def announce(name: str, text: str, node_id: str | None, again: bool = False) -> None:
    """Say ``text`` in the log, and on the node where there is one and a page to show it.

    ``again`` says that the log has this text already; the page may not have it, so the node still gets it.
    """
    logger.log(logging.DEBUG if again else logging.INFO, "[WeightStream] %s: %s", name, text)
    if node_id is not None:
        show(text, node_id)


def show(text: str, node_id: str) -> None:
    """Show ``text`` on a node, where there is a page."""
    if (server := find_server()) is not None:
        server.send_progress_text(text, node_id)


def tell_pages(event: str, values: dict[str, Any]) -> None:
    """Send an event to all open pages, where there are any; plain values."""
    if (server := find_server()) is not None:
        server.send_sync(event, values)


def find_server() -> PromptServer | None:
    """The host's server; None in a script that uses the nodes without one, which need not have it installed."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
