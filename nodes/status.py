"""What is in effect, for people: log lines, text on the node, and what the status route tells of models."""

from __future__ import annotations

import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..streaming import Snapshot

if TYPE_CHECKING:
    from server import PromptServer

    from .streamed_model import StreamedModel

logger = logging.getLogger(__name__)

# A model is running for so many seconds after it began a step: a GPU computes on when the host is done with one.
RUNNING_SECONDS = 2.0
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


_models: weakref.WeakSet[StreamedModel] = weakref.WeakSet()
_notices: dict[tuple[str | None, str], Notice] = {}
# Routes answer on other threads while the worker loads models.
_watching = threading.Lock()


def watch(model: StreamedModel) -> None:
    """Show ``model`` in the status for as long as it lives."""
    with _watching:
        _models.add(model)


def watched() -> list[StreamedModel]:
    """The streamed models that live, by name."""
    with _watching:
        return sorted(_models, key=lambda model: (model.name, model.number))


def announce(name: str, text: str, node_id: str | None, again: bool = False) -> None:
    """Say ``text`` in the log, and on the node where there is one and a page to show it.

    ``again`` says that the log has this text already; the page may not have it, so the node still gets it.
    """
    logger.log(logging.DEBUG if again else logging.INFO, "[WeightStream] %s: %s", name, text)
    if node_id is not None:
        show(text, node_id)


def keep_notice(kind: Kind, name: str, text: str, node_id: str | None, about: object) -> None:
    """Have the status tell what a node could not do, for as long as ``about`` lives, or until the node can."""
    with _watching:
        _notices.pop((node_id, name), None)
        _notices[node_id, name] = Notice(node_id, name, kind, text, weakref.ref(about))
        for oldest in list(_notices)[:-MOST_NOTICES]:
            del _notices[oldest]


def withdraw_notice(name: str, node_id: str | None) -> None:
    """The node has done what was asked."""
    with _watching:
        _notices.pop((node_id, name), None)


def show(text: str, node_id: str) -> None:
    """Show ``text`` on a node, where there is a page."""
    if (server := find_server()) is not None:
        server.send_progress_text(text, node_id)


def find_server() -> PromptServer | None:
    """The host's server; None in a script that uses the nodes without one, which need not have it installed."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


# -- for programs ------------------------------------------------------------------------------------------------------


def describe_notices() -> list[dict[str, Any]]:
    """What nodes could not do, as far as it is still so. Plain values."""
    with _watching:
        for key in [key for key, notice in _notices.items() if notice.holds() is None]:
            del _notices[key]
        return [
            {"node_id": notice.node_id, "name": notice.name, "kind": notice.kind, "text": notice.text}
            for notice in _notices.values()
        ]


def describe_models(models: Iterable[StreamedModel]) -> list[dict[str, Any]]:
    """One entry for each of them, and so for each device of a split one. Plain values, ready for JSON."""
    return [describe_model(model, model.streamer.snapshot()) for model in models]


def describe_model(model: StreamedModel, now: Snapshot) -> dict[str, Any]:
    """How a model stands on its device: plain values; sizes in bytes, rates in bytes per second."""
    ladder, reason = ladder_step(now)
    loading = model.bar.progress()
    return {
        **now.as_dict(),
        "id": str(model.number),
        "name": model.title,
        "device": model.gpu,
        "node_id": model.node_id,
        "ladder": ladder,
        "reason": reason,
        "plan": now.explain,
        "running": now.busy or (now.mode != "off" and now.idle_seconds < RUNNING_SECONDS),
        "loading": loading
        and {
            "done": loading.done_bytes,
            "total": loading.total_bytes,
            "rate": loading.done_bytes / loading.seconds if loading.seconds > 0 else None,
        },
        "last_run": _last_run(now),
    }


def ladder_step(now: Snapshot) -> tuple[str, str]:
    """How weights reach the device, and why not in a better way.

    The steps, the best first: ``resident``, ``pinned`` (page-locked memory), ``staged`` (through a small ring),
    ``synchronous`` (copied when needed); ``unloaded`` stands beside them.
    """
    if now.mode == "off":
        return "unloaded", ""
    if now.mode == "resident":
        return "resident", now.note
    if now.mode == "synchronous":
        return "synchronous", now.note or "its settings ask for it"
    if now.staged_bytes == 0:
        return "pinned", ""
    if now.building:
        return "staged", now.note or "page-locked copies are still being made"
    return "staged", now.note


def _last_run(now: Snapshot) -> dict[str, Any] | None:
    """What was counted since the host has loaded the model; None before its first step."""
    run = now.run
    if run.steps == 0:
        return None
    seconds = now.step_seconds
    return {
        "steps": run.steps,
        "bytes": run.streamed_bytes,
        "rate": run.streamed_bytes / run.steps / seconds if seconds else None,
        "stall_ms_per_block": 1000 * run.stall_seconds / run.steps / max(1, now.blocks),
        "misses": run.misses,
        "corrupted": run.corrupted,
        "step_seconds": seconds,
    }
