"""Reads of checkpoints, watched."""

from __future__ import annotations

import threading
import time

import pytest
from weightstream.streaming import CheckpointFile


class Reads:
    """Counts what is read of checkpoints, and makes reading slow.

    Attributes:
        seconds: that a read takes longer for each MB; on threads whose name begins with ``only``.
        nbytes: read since the last :meth:`reset`.
        tensors: of which something was read.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        self.only = ""
        self._counting = threading.Lock()
        self.reset()
        read_into = CheckpointFile.read_into

        def read(file: CheckpointFile, target: memoryview, offset: int) -> None:
            self._count(file, offset, target.nbytes)
            if self.seconds and threading.current_thread().name.startswith(self.only):
                time.sleep(self.seconds * target.nbytes / (1 << 20))
            read_into(file, target, offset)

        monkeypatch.setattr(CheckpointFile, "read_into", read)

    def reset(self) -> None:
        self.nbytes = 0
        self.tensors: set[str] = set()

    def take(self) -> int:
        """Bytes read since it was last asked."""
        nbytes = self.nbytes
        self.reset()
        return nbytes

    def _count(self, file: CheckpointFile, offset: int, nbytes: int) -> None:
        with self._counting:
            self.nbytes += nbytes
            end = offset + nbytes
            self.tensors |= {name for name, entry in file.entries.items() if entry.begin < end and offset < entry.end}


def join_threads() -> None:
    """Wait until nothing is read or built any more."""
    for thread in threading.enumerate():
        if thread.name.startswith(("weightstream-read", "weightstream-build")):
            thread.join(10)
            assert not thread.is_alive()
