"""Whether models are still what their files hold, which the host asks our nodes before each prompt.

The host keeps what a node gave until its inputs change, and a file's name is the same when its contents are others. So
our loader tells the host a fingerprint of the file, and nodes behind other loaders how many of our models had theirs
changed: those run again then. A file that was only touched has the fingerprint of before.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import NamedTuple

from ..streaming import Checkpoint, CheckpointError
from .model.streamed_model import streamed_models


class _Known(NamedTuple):
    """What the files of a model held, and by what it is seen that they may hold something else."""

    fingerprint: str
    path: str
    files: tuple[str, ...]
    stamps: list[tuple[int, ...]]


_known: dict[str, _Known] = {}
_outdated: set[int] = set()


def fingerprint_of(name: str, path: str | None) -> str:
    """Another one when a file of the model ``name`` has other contents; the last one while there is none to be read."""
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
    """How many of our models had their files changed so far."""
    for model in streamed_models():
        try:
            model.streamer.check_files()
        except CheckpointError:
            _outdated.add(model.number)
    return len(_outdated)
