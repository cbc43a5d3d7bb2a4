"""Why models did not work on several GPUs at the same time, since ComfyUI started: nobody is advised to try again.

By the name of a file.
"""

from __future__ import annotations

_known: dict[str, str] = {}


def keep_objection(title: str, reason: str) -> None:
    """Keep why the model did not; empty where it did."""
    _known.pop(title, None)
    if reason:
        _known[title] = reason


def objection(title: str) -> str:
    """Why the model did not the last time; empty where nothing is known against it."""
    return _known.get(title, "")
