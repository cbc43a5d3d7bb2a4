"""Devices on which time passes only as copies and kernels say: what a step takes is known to the last digit.

The host takes no time, as one that is always ahead of its devices. Kernels of all devices run one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from uncounted import UncountedBackend
from weightstream.streaming.devices.copies import CopyTime, Pair, count_bytes

# LEAST_TIMED_BYTES of the recorder would leave out copies of models as small as these only if there were larger ones.


@dataclass
class Clock:
    """When the compute that is queued is over, in seconds."""

    now: float = 0.0


class TimedBackend(UncountedBackend):
    """A device behind a link of so many bytes per second."""

    fine_bytes = None

    def __init__(self, clock: Clock, index: int, bandwidth: float) -> None:
        super().__init__(torch.device("cpu", index), f"timed:{index}")
        self.clock = clock
        self.bandwidth = bandwidth
        self.link_free = 0.0
        # Bytes per second from a device that passes weights on, beside its own link.
        self.passes_on_at = 0.0

    def _create_stream(self) -> object:
        return object()

    def _copy_now(self, stream: object, pairs: Sequence[Pair], waits: Sequence[float]) -> float:
        begin = max([self.link_free, *waits])
        self.link_free = begin + count_bytes(pairs) / self.bandwidth
        self._carry_out(pairs)
        if self._copy_times is not None:
            self._copy_times.append(CopyTime(count_bytes(pairs), begin, self.link_free))
        return self.link_free

    def copy_on(self, stream: object, pairs: Sequence[Pair], waits: Sequence[float]) -> float:
        self._carry_out(pairs)
        return max(waits, default=0.0) + count_bytes(pairs) / self.passes_on_at

    def _all_over(self, stream: object, events: Sequence[float]) -> float:
        return max(events)

    @staticmethod
    def _carry_out(pairs: Sequence[Pair]) -> None:
        for target, source in pairs:
            target.copy_(source)

    def mark(self) -> float:
        return self.clock.now

    def hold_back(self, seconds: float) -> None:
        self.clock.now += seconds

    def moment(self) -> float:
        return self.clock.now

    def seconds(self, begin: float, end: float) -> float:
        return end - begin

    def wait(self, event: float):
        begin = self.clock.now
        self.clock.now = max(begin, event)
        return partial(self.seconds, begin, self.clock.now)

    def finish(self, event: float) -> None:
        """It has taken place."""

    def synchronize(self) -> None:
        self.clock.now = max(self.clock.now, self.link_free)

    def register(self, buffer: torch.Tensor) -> str | None:
        return None

    def unregister(self, address: int) -> None:
        """Nothing was locked."""


class TimedLayer(nn.Module):
    """A weight of so many bytes, and kernels that take so long: those that read it, and those behind them."""

    def __init__(self, clock: Clock, number: int, nbytes: int, hold: float, work: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((nbytes // 4,), float(number)), requires_grad=False)
        self.number, self.hold, self.work = number, hold, work
        self._clock = clock

    def forward(self) -> int:
        assert self.weight[0] == self.weight[-1] == self.number
        self._clock.now += self.hold
        return self.number


class TimedBlock(nn.Module):
    def __init__(self, clock: Clock, layers: Sequence[TimedLayer]) -> None:
        super().__init__()
        for number, layer in enumerate(layers):
            self.add_module(f"layer{number}", layer)
        self._clock = clock

    def forward(self) -> int:
        for layer in self.children():
            layer()
            self._clock.now += layer.work - layer.hold
        return 0


class TimedModel(nn.Module):
    """Blocks that run one after another.

    Args:
        blocks: of each block its layers: bytes, and the seconds of :class:`TimedLayer`.
        devices: of each block; activations take ``hop`` seconds from one to another.
        outside: seconds of compute before the first block.
    """

    def __init__(
        self,
        clock: Clock,
        blocks: Sequence[Sequence[tuple[int, float, float]]],
        devices: Sequence[int],
        hop: float,
        outside: float,
    ) -> None:
        super().__init__()
        number = iter(range(10**6))
        self.blocks = nn.ModuleList(
            TimedBlock(clock, [TimedLayer(clock, next(number), *layer) for layer in layers]) for layers in blocks
        )
        self.devices, self.hop, self.outside = devices, hop, outside
        self._clock = clock

    def forward(self) -> int:
        self._clock.now += self.outside
        here = 0
        for block, device in zip(self.blocks, self.devices, strict=True):
            self._clock.now += self.hop * (device != here)
            here = device
            block()
        self._clock.now += self.hop * (here != 0)
        return 1
