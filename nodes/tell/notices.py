"""What nodes were asked to do and could not do. The status reports it for as long as it holds."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from . import messages
from .names import without_folders

# If there are more notices than this, the oldest are forgotten.
MOST_NOTICES = 16
# Tells open pages of a new one, which nobody may be looking for.
NOTICE_EVENT = "weightstream.notice"

Kind = Literal["inactive", "fallback", "failed"]


@dataclass(frozen=True)
class Notice:
    """Something that a node was asked to do and could not.

    Attributes:
        node_id, name: the id of the node, and the name of what the notice is about.
        kind: ``inactive``: it does not stream; ``fallback``: it is placed in another way; ``failed``: it has ended.
        text: what could not be done, and why.
        holds: returns the object that the notice is about; None once that is gone, and the notice with it.
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
    """Have the status report what a node could not do, for as long as ``about`` lives, or until the node can do it."""
    with _keeping:
        _notices.pop((node_id, name), None)
        _notices[node_id, name] = Notice(node_id, name, kind, text, weakref.ref(about))
        for oldest in list(_notices)[:-MOST_NOTICES]:
            del _notices[oldest]
    told = {"node_id": node_id, "name": name, "kind": kind, "text": without_folders(text)}
    messages.tell_pages(NOTICE_EVENT, told)


def withdraw_notice(name: str, node_id: str | None, kind: Kind | None = None) -> None:
    """Remove the notice, if it is of this kind where one is given: the node has done what was asked."""
    with _keeping:
        notice = _notices.get((node_id, name))
        if notice is not None and kind in (None, notice.kind):
            del _notices[node_id, name]


def describe_notices() -> list[dict[str, Any]]:
    """What nodes of the last prompt could not do, as far as it still holds. Plain values."""
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
    """The ids of the nodes of the prompt that runs or has run last; None if none has run."""
    server = messages.find_server()
    if server is None or getattr(server, "last_prompt_id", None) is None:
        return None
    queue = server.prompt_queue
    with queue.mutex:
        running = next(iter(queue.currently_running.values()), None)
        last = queue.history.get(server.last_prompt_id)
    prompt = running or (last and last["prompt"])
    return set(prompt[2]) if prompt else None
