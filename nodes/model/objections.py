"""Why models did not work on several GPUs at the same time, since ComfyUI started: nobody is advised to try again.

By the name of a file and the names of GPUs, whatever their order.
"""

from __future__ import annotations

from collections.abc import Iterable

_known: dict[tuple[str, frozenset[str]], str] = {}


def keep_objection(title: str, gpus: Iterable[str], reason: str) -> None:
    """Keep why the model did not; empty where it did."""
    key = title, frozenset(gpus)
    _known.pop(key, None)
    if reason:
        _known[key] = reason


def objection(title: str, gpus: Iterable[str]) -> str:
    """Why the model did not the last time; empty where nothing is known against it."""
    return _known.get((title, frozenset(gpus)), "")
