"""Every plan of a small model on a fake GPU, whose accesses are all checked (fake_cuda.py)."""

from __future__ import annotations

import itertools

from fake_cuda import FakeCuda
from models import hand_plan, units_of
from race import NumberedModel
from weightstream.streaming import Streamer


def run_every_plan(cuda: FakeCuda, model: NumberedModel, streamer: Streamer, slots: int) -> None:
    """Each choice of four blocks streams through ``slots``, in several orders; the host waits for nothing."""
    everything = list(range(4))
    for streamed in range(1, 2**4, 2):
        chosen = [index for index in everything if streamed >> index & 1]
        streamer.load(hand_plan(streamer, units_of(streamer, chosen), slots))
        streamer.finish_building()
        cuda.host_waits = 0
        for order, parts in itertools.product((everything, everything[::-1], [0, 0]), ("012", "210", "0011")):
            assert model(order, parts) == order
        assert cuda.host_waits == 0, "the device is late, and nobody waits for it"
