"""How tensors get from one device to another: directly, where that was seen to work, else through page-locked RAM.

Drivers may say that one GPU can write to another and then lose what is written (virtual machines with an IOMMU in the
way do), so each pair of devices is tried once before it is used.
"""

from __future__ import annotations

import logging
import os
import threading

import torch

from ..config import parse_switch

logger = logging.getLogger(__name__)

# "0" forbids direct copies from one GPU to another.
PEER_VARIABLE = "WEIGHTSTREAM_PEER"
# Enough for several packets of any size, little enough to take no time.
TRIAL_BYTES = 16 * 1024**2


class Links:
    """Copies between devices. There is one for the process, so that each pair of devices is tried once."""

    def __init__(self) -> None:
        self._sound: dict[tuple[torch.device, torch.device], bool] = {}
        self._lock = threading.Lock()

    def move(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return a copy on ``device``, queued on both devices' current streams; the host waits for nothing.

        It has the strides of the original, gaps and repetitions included: kernels may be chosen by them.
        """
        once = tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]
        source = once
        if tensor.device.type == device.type == "cuda" and not self.is_sound(tensor.device, device):
            # torch keeps the page-locked memory until both copies are done.
            source = torch.empty_like(once, device="cpu", pin_memory=True).copy_(once, non_blocking=True)
            _have_wait(device, tensor.device)
        if _overlaps(once):
            target = torch.empty_like(once, device=device, memory_format=torch.contiguous_format)
        else:
            target = torch.empty_strided(once.size(), once.stride(), dtype=once.dtype, device=device)
        return target.copy_(source, non_blocking=True).expand(tensor.size())

    def is_unsound(self, source: torch.device, target: torch.device) -> bool:
        """Whether it was tried, and does not arrive or is forbidden. Nothing is tried here."""
        with self._lock:
            return self._sound.get((source, target)) is False

    def is_sound(self, source: torch.device, target: torch.device) -> bool:
        """Whether what is copied directly from one GPU to another arrives; waits for both the first time.

        Raises:
            ConfigError: :data:`PEER_VARIABLE` is neither 0 nor 1.
        """
        pair = (source, target)
        with self._lock:
            if pair not in self._sound:
                self._sound[pair] = _is_allowed() and _try(source, target)
            return self._sound[pair]


def _is_allowed() -> bool:
    value = os.environ.get(PEER_VARIABLE, "")
    allowed = not value or parse_switch(PEER_VARIABLE, value)
    if not allowed:
        logger.info("activations go through page-locked RAM: %s is 0", PEER_VARIABLE)
    return allowed


def _try(source: torch.device, target: torch.device) -> bool:
    # A generator of its own: nodes draw from the global one, and their images must not depend on what is tried here.
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.inference_mode(False):
        sent = torch.randint(0, 256, (TRIAL_BYTES,), dtype=torch.uint8, generator=generator, device="cpu")
        arrived = sent.to(source).to(target).cpu()
    if sound := torch.equal(sent, arrived):
        return True
    logger.warning("what is copied from %s to %s does not arrive; it goes through page-locked RAM", source, target)
    return sound


def _have_wait(waiting: torch.device, waited_for: torch.device) -> None:
    """Have what is queued on one device from now on start after all that is queued on the other."""
    torch.cuda.current_stream(waiting).wait_event(torch.cuda.current_stream(waited_for).record_event())


def _overlaps(tensor: torch.Tensor) -> bool:
    """Whether two of its elements may share memory."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.size(), strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False
