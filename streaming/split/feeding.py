"""Which devices can bring weights to another one (feeder.py), and whether that is faster than blocks on all of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..devices.backend import Backend, is_out_of_memory
from ..planning.profile import ASSUMED_COMPUTE_SHARE
from .assignment import HOP_SECONDS, Assignment, DeviceRoom, assign, step_seconds
from .feeder import Feeder
from .links import Links

# Large enough for all of a link's bandwidth, and small enough for a GPU that is nearly full.
TRIAL_BYTES = 64 * 1024**2
TRIALS = 4
# The best of so many rounds counts. An idle GPU runs its link slowly, so copies first run untimed for so long.
ROUNDS = 3
WARM_UP_SECONDS = 0.1
# Another link must add this part of what the first carries. Some links share a way to the host's memory, or reach the
# computing GPU only by that way.
LINK_GAIN = 0.4
# A step must be shorter by this part: kernels run slower beside copies.
GAIN = 0.01
# Before the model is measured: if it computes for less than assumed, for only this part of the time in which it is
# copied, a step may be longer by no more than this.
LEAST_COMPUTE_SHARE, LOSS = 0.2, 0.05


class Feeding(NamedTuple):
    """Which devices make copies to another one, the home, faster.

    Attributes:
        helpers: backends of these devices.
        bytes_per_second: over the home's link alone.
        factor: how many times as fast copies are over all links together.
        for_ever: no device lacked memory, so another trial would find the same.
    """

    helpers: list[Backend]
    bytes_per_second: float
    factor: float
    for_ever: bool


def find_feeders(home: Backend, helpers: Sequence[Backend], links: Links) -> Feeding:
    """Try which of ``helpers`` make copies to ``home`` faster.

    The backends must serve nothing else, and are closed afterwards.
    """
    found: list[Backend] = []
    try:
        source = torch.empty(TRIAL_BYTES, dtype=torch.uint8, pin_memory=home.device.type == "cuda")
        home.open(2)
        first = best = _bytes_per_second(home, source)
        full = False
        for helper in helpers:
            try:
                is_sound = links.is_sound(helper.device, home.device)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                is_sound, full = False, True
            if not is_sound:
                continue
            feeder = Feeder(helper)
            home.feeders.append(feeder)
            home.open(2)
            rate = _bytes_per_second(home, source) if feeder.is_open else 0.0
            full |= not feeder.is_open
            if rate >= best + LINK_GAIN * first:
                found.append(helper)
                best = rate
            else:
                home.feeders.remove(feeder)
                feeder.close()
                home.open(2)
        home.close_feeders()
        first = max(first, _bytes_per_second(home, source))
        if best < first * (1 + LINK_GAIN * len(found)):
            found, best = [], first
        return Feeding(found, first, best / first, not full)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return Feeding([], 0.0, 1.0, for_ever=False)
    finally:
        home.close()
        home.feeders.clear()


def _bytes_per_second(home: Backend, source: torch.Tensor) -> float:
    target = home.allocate(source.nbytes)
    try:
        after, begin = [home.mark()], time.perf_counter()
        while time.perf_counter() < begin + WARM_UP_SECONDS:
            home.finish(home.bring([(target, source)], after))
        return max(_round(home, target, source) for _ in range(ROUNDS))
    finally:
        home.synchronize()
        home.free(target)


def _round(home: Backend, target: torch.Tensor, source: torch.Tensor) -> float:
    begin = time.perf_counter()
    for _ in range(TRIALS):
        done = home.bring([(target, source)])
    home.finish(done)
    return TRIALS * source.nbytes / (time.perf_counter() - begin)


def feeding_is_faster(block_bytes: Sequence[int], rooms: Sequence[DeviceRoom], factor: float) -> bool:
    """Whether a step is shorter where the first device runs all blocks, and its bandwidth is by ``factor`` larger, than
    where each device runs some.

    Args:
        rooms: of all devices, for blocks alone: on the first, too, without what lies outside of blocks.
    """
    total = sum(block_bytes)
    home = rooms[0]
    if sum(room.nbytes for room in rooms) >= total or home.nbytes < max(block_bytes):
        return False
    if (known := home.seconds_per_byte) > 0:
        return _gain(block_bytes, rooms, factor, total * known) >= GAIN
    usual, least = (total * share / home.bandwidth for share in (ASSUMED_COMPUTE_SHARE, LEAST_COMPUTE_SHARE))
    return _gain(block_bytes, rooms, factor, usual) >= GAIN and _gain(block_bytes, rooms, factor, least) >= -LOSS


def _gain(block_bytes: Sequence[int], rooms: Sequence[DeviceRoom], factor: float, compute: float) -> float:
    """Return by what part a step with ``compute`` seconds of compute is shorter with feeding."""
    split = assign(block_bytes, rooms)
    given = split.bytes_of(block_bytes, len(rooms))
    fed = max(compute, (sum(block_bytes) - rooms[0].nbytes) / (rooms[0].bandwidth * factor))
    apart = max(compute, _without_feeding(split, given, rooms, compute)) + split.hops * HOP_SECONDS
    return 1 - fed / apart


def _without_feeding(split: Assignment, given: Sequence[float], rooms: Sequence[DeviceRoom], compute: float) -> float:
    """Return the seconds of a step in which each device runs some blocks, without its hops."""
    if not split.runs:
        return step_seconds(given, rooms)
    missing = [max(0.0, nbytes - room.nbytes) / room.bandwidth for nbytes, room in zip(given, rooms, strict=True)]
    return sum(max(compute * nbytes / sum(given), late) for nbytes, late in zip(given, missing, strict=True))
