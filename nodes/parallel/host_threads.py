"""The threads that the host has for the GPUs of a step, none of which works on when the step has ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management as mm
import torch

# The host's option that has its threads.
POOL = "multigpu_thread_pool"


class Pool:
    """The host's threads, and how much they still owe."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._owed: Counter[torch.device] = Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def submit(self, device: torch.device, *arguments: Any, **named: Any) -> None:
        self._pool.submit(device, *arguments, **named)
        self._owed[device] += 1

    def get_result(self, device: torch.device) -> Any:
        found = self._pool.get_result(device)
        self._owed[device] -= 1
        return found

    def settle(self) -> None:
        """Wait until all threads have done what they were given."""
        for device in list(self._owed):
            while self._owed[device] > 0:
                self.get_result(device)


@contextmanager
def settled(options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Options for a step, at whose end no thread works on: when one GPU fails the host does not wait for the others,
    and an interrupt reaches one of them alone."""
    if options.get(POOL) is None:
        yield options
        return
    pool = Pool(options[POOL])
    try:
        yield {**options, POOL: pool}
    except mm.InterruptProcessingException:
        mm.interrupt_current_processing(True)
        try:
            pool.settle()
        finally:
            mm.interrupt_current_processing(False)
        raise
    finally:
        pool.settle()
