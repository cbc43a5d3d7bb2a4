"""Which devices can bring weights to another one (feeder.py), and whether that is faster than blocks on all of them."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from .assignment import HOP_SECONDS, Assignment, DeviceRoom, assign, step_seconds
from .backend import Backend
from .feeder import Feeder
from .links import Links
from .profile import ASSUMED_COMPUTE_SHARE

# Large enough for all of a link's bandwidth, and small enough for a GPU that is nearly full.
TRIAL_BYTES = 64 * 1024**2
TRIALS = 6
# One more link must bring this part of what the first does. Some share a way to the host's memory, or reach the GPU
# that computes only by that.
WORTHWHILE = 0.4
# A step must be shorter by this part: kernels run slower beside copies.
GAIN = 0.01


def find_feeders(home: Backend, helpers: Sequence[Backend], links: Links) -> tuple[list[Backend], float]:
    """Those of ``helpers`` that make copies to ``home`` faster, as tried here, and by what factor all of them do.

    The backends are for this alone, and are closed behind it.
    """
    found: list[Backend] = []
    source = torch.empty(TRIAL_BYTES, dtype=torch.uint8, pin_memory=home.device.type == "cuda")
    try:
        home.open(2)
        first = best = _bytes_per_second(home, source)
        for helper in helpers:
            if not links.is_sound(helper.device, home.device):
                continue
            feeder = Feeder(helper)
            home.feeders.append(feeder)
            home.open(2)
            if feeder not in home.feeders:
                continue  # It has no room.
            rate = _bytes_per_second(home, source)
            if rate >= best + WORTHWHILE * first:
                found.append(helper)
                best = rate
            else:
                home.feeders.remove(feeder)
                feeder.close()
    finally:
        home.close()
        home.feeders.clear()
    return found, best / first


def _bytes_per_second(home: Backend, source: torch.Tensor) -> float:
    target = home.allocate(source.nbytes)
    try:
        home.finish(home.bring([(target, source)], [home.mark()]))  # The first copy may make contexts, and map memory.
        begin = time.perf_counter()
        for _ in range(TRIALS):
            done = home.bring([(target, source)])
        home.finish(done)
        return TRIALS * source.nbytes / (time.perf_counter() - begin)
    finally:
        home.synchronize()
        home.free(target)


def feeding_is_faster(block_bytes: Sequence[int], rooms: Sequence[DeviceRoom], factor: float) -> bool:
    """Whether a step is shorter where the first device runs all blocks, and its bandwidth is by ``factor`` larger, than
    where each device runs some.

    Args:
        rooms: of all devices; the first as the others, without what is in no block.
    """
    total = sum(block_bytes)
    home = rooms[0]
    if sum(room.nbytes for room in rooms) >= total or home.nbytes < max(block_bytes):
        return False
    split = assign(block_bytes, rooms)
    given = split.bytes_of(block_bytes, len(rooms))
    compute = total * (home.seconds_per_byte or ASSUMED_COMPUTE_SHARE / home.bandwidth)
    fed = max(compute, (total - home.nbytes) / (home.bandwidth * factor))
    apart = max(compute, _without_feeding(split, given, rooms, compute)) + split.hops * HOP_SECONDS
    return fed <= apart * (1 - GAIN)


def _without_feeding(split: Assignment, given: Sequence[float], rooms: Sequence[DeviceRoom], compute: float) -> float:
    """The step of devices of which each runs some blocks, less its hops."""
    if not split.runs:
        return step_seconds(given, rooms)
    missing = [max(0.0, nbytes - room.nbytes) / room.bandwidth for nbytes, room in zip(given, rooms, strict=True)]
    return sum(max(compute * nbytes / sum(given), late) for nbytes, late in zip(given, missing, strict=True))
