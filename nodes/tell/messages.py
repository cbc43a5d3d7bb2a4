"""What is in effect, for people: log lines and text on the node."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...streaming import Line

if TYPE_CHECKING:
    from server import PromptServer

logger = logging.getLogger(__name__)

# What is in effect for a node's model, as values.
LINE_EVENT = "weightstream.line"


def announce(name: str, text: str, node_id: str | None) -> None:
    """Say ``text`` in the log, and on the node where there is one and a page to show it."""
    log(name, text)
    if node_id is not None:
        show(text, node_id)


def log(name: str, text: str, again: bool = False) -> None:
    """Say ``text`` in the log. ``again``: the log has it already."""
    logger.log(logging.DEBUG if again else logging.INFO, "[WeightStream] %s: %s", name, text)


def show_line(line: Line, details: Sequence[str], node_id: str) -> None:
    """Show on a node what is in effect: as text in any page, and as values that ours makes its own sentence of."""
    show(str(line), node_id)
    if (server := find_server()) is not None:
        values = {"node": node_id, **line.as_dict(), "text": str(line), "details": list(details)}
        server.send_sync(LINE_EVENT, values, server.client_id or None)


def show(text: str, node_id: str) -> None:
    """Show ``text`` on a node, where there is a page.

    The page whose prompt runs alone has it: in another one's workflow a node of the same number may be any. A prompt
    that no page has sent may be of any page's workflow.
    """
    if (server := find_server()) is not None:
        server.send_progress_text(text, node_id, server.client_id or None)


def tell_pages(event: str, values: dict[str, Any]) -> None:
    """Send an event to all open pages, where there are any; plain values."""
    if (server := find_server()) is not None:
        server.send_sync(event, values)


def find_server() -> PromptServer | None:
    """The host's server; None in a script that uses the nodes without one, which need not have it installed."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
