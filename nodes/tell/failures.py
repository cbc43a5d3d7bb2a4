"""Errors of ours that end a node: said on the node too, and a notice until the node has run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ...streaming import StreamingError
from . import messages
from .names import without_folders
from .notices import keep_notice, withdraw_notice


class _Always:
    """What a notice is about that has no model; it is withdrawn when the node has run."""


_ALWAYS = _Always()


@contextmanager
def told_on_node(name: str, node_id: str | None) -> Iterator[None]:
    """Say on a node why it fails, where one of our errors does that inside of this context.

    Args:
        name: of the node or model, for the notice.
        node_id: the node; None outside of a prompt.
    """
    try:
        yield
    except StreamingError as error:
        text = without_folders(str(error))
        if node_id is not None:
            messages.show(text, node_id)
        keep_notice("failed", name, text, node_id, _ALWAYS)
        raise
    withdraw_notice(name, node_id, "failed")
