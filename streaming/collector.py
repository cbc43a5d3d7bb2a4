"""Keeps Python's collector of reference cycles away from work that makes many objects at once.

[Note: fewer collections]
The collector runs when enough objects were made since it ran last, and now and then looks through all that there are.
That takes 0.15 to 0.4 s where a host has its packs loaded (ComfyUI, CPython 3.12), and the more often it runs, the
sooner it does that. Cutting a model, making a plan, binding what streams and keeping the state of a step make tens of
thousands of objects, most of which are gone right afterwards and need no collector for it. In a prompt of 4 steps whose
model was loaded for it, three or four such looks fell into these: 0.7 of 3.6 s.
While this lasts nobody's cycles are collected, on no thread; that is made up for afterwards. Who asks for a collection
gets it.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Pauses:
    """Counts who wants no collection now, on all threads."""

    def __init__(self) -> None:
        # What a collection frees may pause it too, on a thread that is in the middle of doing so.
        self._lock = threading.RLock()
        self._count = 0
        self._was_on = False

    def begin(self) -> None:
        with self._lock:
            if self._count == 0:
                self._was_on = gc.isenabled()
                gc.disable()
            self._count += 1

    def end(self) -> None:
        with self._lock:
            self._count -= 1
            if self._count == 0 and self._was_on:
                gc.enable()


_PAUSES = _Pauses()


@contextmanager
def uncollected() -> Iterator[None]:
    """No collection by itself while this lasts (Note: fewer collections); also decorates a function."""
    _PAUSES.begin()
    try:
        yield
    finally:
        _PAUSES.end()
