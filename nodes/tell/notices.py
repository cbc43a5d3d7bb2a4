"""What nodes were asked to do and could not, for as long as it is so: the status tells it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from . import status
from .names import without_folders

# Of more nodes that could not do what was asked the oldest are forgotten.
MOST_NOTICES = 16

Kind = Literal["inactive", "fallback"]


@dataclass(frozen=True)
class Notice:
    """Something that a node was asked to do and could not.

    Attributes:
        node_id, name: of the node, and of what it is about.
        kind: ``inactive``: it does not stream; ``fallback``: it is placed in another way.
        text: what, and why.
        holds: whether it is still so.
    """

    node_id: str | None
    name: str
    kind: Kind
    text: str
    holds: Callable[[], Any]


_notices: dict[tuple[str | None, str], Notice] = {}
# Routes answer on other threads while the worker runs nodes.
_keeping = threading.Lock()


def keep_notice(kind: Kind, name: str, text: str, node_id: str | None, about: object) -> None:
    """Have the status tell what a node could not do, for as long as ``about`` lives, or until the node can."""
    with _keeping:
        _notices.pop((node_id, name), None)
        _notices[node_id, name] = Notice(node_id, name, kind, text, weakref.ref(about))
        for oldest in list(_notices)[:-MOST_NOTICES]:
            del _notices[oldest]


def withdraw_notice(name: str, node_id: str | None) -> None:
    """The node has done what was asked."""
    with _keeping:
        _notices.pop((node_id, name), None)


def describe_notices() -> list[dict[str, Any]]:
    """What nodes of the last prompt could not do, as far as it is still so. Plain values."""
    nodes = _nodes_of_last_prompt()
    with _keeping:
        for key in [key for key, notice in _notices.items() if notice.holds() is None]:
            del _notices[key]
        return [
            {
                "node_id": notice.node_id,
                "name": notice.name,
                "kind": notice.kind,
                "text": without_folders(notice.text),
            }
            for notice in _notices.values()
            if nodes is None or notice.node_id is None or notice.node_id in nodes
        ]


def _nodes_of_last_prompt() -> set[str] | None:
    """The ids of the nodes of the prompt that runs or has run last; None where nobody has run one."""
    server = status.find_server()
    if server is None or getattr(server, "last_prompt_id", None) is None:
        return None
    queue = server.prompt_queue
    with queue.mutex:
        running = next(iter(queue.currently_running.values()), None)
        last = queue.history.get(server.last_prompt_id)
    prompt = running or (last and last["prompt"])
    return set(prompt[2]) if prompt else None
