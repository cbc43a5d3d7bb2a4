"""Ends our threads with the process: it tells them to end, and waits for a moment.

A thread that is inside of torch when the interpreter ends would abort the process. One of ``concurrent.futures`` would
keep the process alive until all its tasks are done, which may be to read a whole model.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from typing import Protocol

# How long the interpreter's end waits: long enough for a read that is under way, and no longer than a user would wait.
EXIT_SECONDS = 2.0


class Owner(Protocol):
    """An object that has daemon threads.

    Attributes:
        workers: the threads.
    """

    workers: list[threading.Thread]

    def forsake(self) -> None:
        """Have the threads end, without waiting for it."""


_owners: weakref.WeakSet[Owner] = weakref.WeakSet()


def end_with_process(owner: Owner) -> None:
    """``owner`` may have threads from now on."""
    _owners.add(owner)


@atexit.register
def _end_all() -> None:
    owners = list(_owners)
    for owner in owners:
        owner.forsake()
    deadline = time.monotonic() + EXIT_SECONDS
    for owner in owners:
        for worker in owner.workers:
            worker.join(max(0.0, deadline - time.monotonic()))
