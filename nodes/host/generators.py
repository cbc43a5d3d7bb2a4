"""The global random generators of the process.

Nodes draw from them, so an image may depend on how much was drawn before. What we do in addition to the host, such as
building a model a second time, must leave them as they were: some models draw while they are built.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


class GeneratorStates:
    """The present states of the generators of Python, numpy and torch, on the CPU and on GPUs in use."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy = np.random.get_state()
        self._cpu = torch.get_rng_state()
        self._gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def drawn(self) -> bool:
        """Whether somebody has drawn from one of them since."""
        now = GeneratorStates()
        numpy = all(map(np.array_equal, self._numpy, now._numpy))
        gpus = len(self._gpus) == len(now._gpus) and all(map(torch.equal, self._gpus, now._gpus))
        return not (self._python == now._python and numpy and gpus and torch.equal(self._cpu, now._cpu))

    def restore(self) -> None:
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        if self._gpus:
            torch.cuda.set_rng_state_all(self._gpus)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Restore the states of the generators afterwards, whatever was drawn meanwhile."""
    states = GeneratorStates()
    try:
        yield
    finally:
        states.restore()
