"""What was found out about kinds of steps, kept for the process."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable

# More kinds of steps than anybody uses in a process, of which some are verified at each sigma.
MOST_KINDS = 2048


class Verdicts:
    """What was found out about kinds of steps, for any thread: an empty string, or why they run on one GPU."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: OrderedDict[Hashable, str] = OrderedDict()

    def of(self, kind: Hashable) -> str | None:
        with self._lock:
            if kind in self._found:
                self._found.move_to_end(kind)
            return self._found.get(kind)

    def keep(self, kind: Hashable, reason: str) -> None:
        with self._lock:
            self._found[kind] = reason
            while len(self._found) > MOST_KINDS:
                self._found.popitem(last=False)

    def clear(self) -> None:
        with self._lock:
            self._found.clear()


verdicts = Verdicts()
