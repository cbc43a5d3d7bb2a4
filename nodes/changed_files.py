"""Whether the files of models have changed since they were loaded, which the host asks our nodes before each prompt.

The host keeps a node's output until its inputs change, and a file keeps its name when its contents change. So the host
gets a fingerprint of the file from our loader, and from nodes behind other loaders the number of our models whose files
have changed: when that value changes the node runs again. A file that was only touched keeps its fingerprint.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import NamedTuple

from ..streaming import Checkpoint, CheckpointError
from .model.streamed_model import streamed_models


class _Known(NamedTuple):
    """What the files of a model held, and the stamps by which we see that they may hold something else now."""

    fingerprint: str
    path: str
    files: tuple[str, ...]
    stamps: list[tuple[int, ...]]


_known: dict[str, _Known] = {}
_outdated: set[int] = set()


def fingerprint_of(name: str, path: str | None) -> str:
    """Return a fingerprint of the files of the model ``name``; the last one, or "", while the files cannot be read."""
    known = _known.get(name)
    with suppress(CheckpointError, OSError):
        if path is not None and (known is None or known.path != path or known.stamps != _stamps(known.files)):
            known = _known[name] = _read(path)
    return known.fingerprint if known is not None else ""


def _read(path: str) -> _Known:
    checkpoint = Checkpoint.open(path)
    try:
        files = tuple(file.path for file in checkpoint.files)
        fingerprint = " ".join(file.fingerprint.hex() for file in checkpoint.files)
        return _Known(fingerprint, path, files, _stamps(files))
    finally:
        checkpoint.close()


def _stamps(files: tuple[str, ...]) -> list[tuple[int, ...]]:
    stats = map(os.stat, files)
    return [(found.st_ino, found.st_size, found.st_mtime_ns) for found in stats]


def count_outdated() -> int:
    """Return how many of our models have had their files changed so far."""
    for model in streamed_models():
        try:
            model.streamer.check_files()
        except CheckpointError:
            _outdated.add(model.number)
    return len(_outdated)
