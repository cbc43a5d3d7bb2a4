"""Has the kernels for packed weights compiled behind other work: that takes half a second, and longer at first."""

from __future__ import annotations

import logging
import threading

import torch

from ..threads import end_with_process
from .packers import packer_of
from .unpackers import unpacker_of

logger = logging.getLogger(__name__)


class KernelsAhead:
    """Compiles for each device once.

    Attributes:
        workers: its threads.
    """

    def __init__(self) -> None:
        self.workers: list[threading.Thread] = []
        self._begun: set[torch.device] = set()
        end_with_process(self)

    def compile(self, device: torch.device) -> None:
        """Begin, unless that was done. Who needs a kernel before it is there waits for it (kernels.py)."""
        if device in self._begun:
            return
        self._begun.add(device)
        worker = threading.Thread(target=_compile, args=[device], name="weightstream-compile", daemon=True)
        worker.start()
        self.workers.append(worker)

    def forsake(self) -> None:
        """A compiler cannot be stopped: the process waits for it a moment when it ends."""


def _compile(device: torch.device) -> None:
    try:
        packer_of(device)
        unpacker_of(device)
    except Exception as error:  # Who needs them meets it again, and says so.
        logger.debug("no kernels for packed weights on %s: %s", device, error)


KERNELS_AHEAD = KernelsAhead()
