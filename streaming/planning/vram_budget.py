"""How much device memory a model may use, step by step: what the host allowed first, then what was measured. Pure.

[Note: no thrashing]
Free memory is read before each step. After each of the first two steps of a shape, the budget follows what activations
have needed. Later, weights are only evicted, never added: when the next step needs more than is left, or when another
program takes memory, in which case two readings in a row must show it. Weights come back when the host loads the model
for a prompt, or at the second of two equal steps; and then only as far as the largest shape of this prompt allows. A
shape that ran out of memory keeps the budget with which its retry ran, until more is free.

[Note: from the same begin]
Activations need the most that a step had allocated at once, and a part more because of fragmentation. torch takes their
memory from the device in pieces, on demand. That fragments it further, and how much depends on what torch kept before:
a plan that was right for one prompt ran out of memory in the next. Therefore, before the first step of each prompt, and
wherever weights have moved, torch frees its cache, and then keeps in one piece what a step of a known shape needs. What
it cannot free, because something that stays lies beside it, counts as unusable (``_stuck``: 130 to 160 MB with
cudaMallocAsync, FLUX, while slots were torch's too). What a step takes beyond the piece counts as part of its need.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple

from .profile import Profile

# Steps of a new shape that are measured.
MEASURED_STEPS = 2
# This part is added to the most that was allocated at once.
GAPS = 1 / 8
# So is this part while only one step of a shape was counted. What activations with their gaps have then taken in the
# next step is known. FLUX at 2048^2 with 1.45 GB at once has taken more than 2.1 and less than 2.3 GB (cudaMallocAsync,
# H200), and Wan at 480p with 1.16 GB more than 1.7; with 1/8 their second steps ran out of memory.
UNSEEN_GAPS = 0.6
# Memory is short when this part of the headroom is missing, or when less than this part of it is left.
SHORTAGE = 0.25
MOST_SHAPES = 32


class DeviceMemory(NamedTuple):
    """Bytes of a device at one moment.

    Attributes:
        free: no process has allocated them.
        cached: torch keeps them for its next allocations.
    """

    free: int
    cached: int


@dataclass(eq=False)
class KnownShape:
    """What is known about steps of one shape.

    Attributes:
        steps, in_a_row: whole steps so far, and since the last step of another shape.
        timed: whether ``profile`` has the times of such a step; doubts: how often they turned out to be too long.
        activation_bytes: what the activations of a step need; None before one was measured.
        counts: how often that was counted. If never, ``activation_bytes`` is what torch kept after a step.
        profile: how such a step behaves.
        ceiling: the budget of the retry after such a step ran out of memory; no budget goes beyond it.
        ceiling_available: bytes that weights and activations had together at that time.
        shortages: readings in a row that found too little free memory.
    """

    steps: int = 0
    in_a_row: int = 0
    timed: bool = False
    doubts: int = 0
    activation_bytes: int | None = None
    counts: int = 0
    profile: Profile | None = None
    ceiling: float = math.inf
    ceiling_available: int = 0
    shortages: int = 0

    @property
    def bytes_to_spare(self) -> int:
        """Memory for the activations of the next step, gaps between them included."""
        need = self.activation_bytes or 0
        return int(need / (1 + GAPS) * (1 + UNSEEN_GAPS)) if self.counts == 1 else need


class VramBudget:
    """Budgets for one model on one device.

    Args:
        headroom: bytes that stay free.
        adaptive: whether budgets may be more and less than what the host offered.

    Attributes:
        begins: whether the next step is the first of a prompt.
        current: what is known of the shape of the next step, or of the one that runs.
    """

    def __init__(self, headroom: int, adaptive: bool = True) -> None:
        self._headroom = headroom
        self._adaptive = adaptive
        self._shapes: OrderedDict[Hashable, KnownShape] = OrderedDict()
        self.current = KnownShape()
        self._in_prompt: list[KnownShape] = []
        self._ran = False
        self.begins = True
        self._stuck = self._piece = 0

    def begin_prompt(self) -> None:
        """The host has loaded or unloaded the model. What torch keeps now says nothing about activations."""
        self._in_prompt.clear()
        self._ran = False
        self.begins = True
        self.current.in_a_row = 0

    def observe(self, memory: DeviceMemory, peak: int) -> None:
        """The step that has ended had at most ``peak`` bytes of activations at once."""
        need = int(peak * (1 + GAPS))
        kept = memory.cached - self._stuck
        if 0 < self._piece < kept:
            need = self._piece = kept
        known = self.current
        if known.counts > 1:  # The first count may be too high: a first step also loads kernels and tries them.
            need = max(need, known.activation_bytes or 0)
        known.activation_bytes = need
        known.counts += 1

    def trimmed(self, kept: int) -> None:
        """torch has freed what it could of its cache, and still keeps ``kept`` bytes."""
        self.begins = False
        self._stuck, self._piece = kept, 0

    @property
    def lacks_piece(self) -> bool:
        """Whether the next step has a known need, and torch keeps no piece that is large enough for it."""
        return self._most_counted() > self._piece * (1 + GAPS / 2)

    def piece(self) -> int:
        """Return the bytes that torch shall keep in one piece from now on; 0 where it keeps enough."""
        if not self.lacks_piece:
            return 0
        self._piece = self._most_counted()
        return self._piece

    def _most_counted(self) -> int:
        return max((known.activation_bytes or 0 for known in self._in_prompt if known.counts), default=0)

    def stepped(self) -> None:
        """A whole step has run."""
        self._ran = True
        self.current.steps += 1
        self.current.in_a_row += 1

    def out_of_memory(self, budget: float, memory: DeviceMemory, device_bytes: int) -> None:
        """A step ran out of memory, and is retried with ``budget`` bytes."""
        self.current.ceiling = budget
        self.current.ceiling_available = memory.free + memory.cached + device_bytes

    def enter(self, shape: Hashable) -> KnownShape:
        """Take up what is known of ``shape``, that of the next step."""
        known = self._shapes.setdefault(shape, KnownShape())
        self._shapes.move_to_end(shape)
        if len(self._shapes) > MOST_SHAPES:
            self._shapes.popitem(last=False)
        if known is not self.current:
            known.in_a_row = known.shortages = 0
            self.current = known
        if known not in self._in_prompt:
            self._in_prompt.append(known)
        return known

    def budget(self, memory: DeviceMemory, device_bytes: int, estimate: Callable[[], int] | None) -> float | None:
        """Return the bytes for all weights and staging of the next step; None leaves them as they are.

        Args:
            memory: of the device, now.
            device_bytes: bytes of the device that the model has now.
            estimate: returns the bytes of activations of the next step, for a shape that has not run yet.
        """
        known = self.current
        if not self._adaptive:
            return None
        if known.steps == 0:
            room = self._room_for(memory, estimate() if estimate is not None else 0)
            return device_bytes + room if room < 0 else None
        if known.steps <= MEASURED_STEPS and self._ran:
            if known.counts:
                return min(device_bytes + self._room_for(memory, self._most_activations()), known.ceiling)
            known.activation_bytes = max(memory.cached, known.activation_bytes or 0)
            return min(device_bytes + memory.free - self._headroom, known.ceiling)
        if known.in_a_row <= 1 and known.activation_bytes is not None:
            if (room := self._room_for(memory, known.bytes_to_spare)) < 0:
                return min(device_bytes + room, known.ceiling)
            if known.in_a_row == 1:
                return min(device_bytes + self._room_for(memory, self._most_activations()), known.ceiling)
            return None
        return self._under_pressure(memory, device_bytes)

    def prompt_budget(self, memory: DeviceMemory, device_bytes: int, offered: float) -> float:
        """Return the bytes for the next prompt: from measurements if there are any, else what the host ``offered``."""
        known = self.current
        if memory.free + memory.cached + device_bytes > known.ceiling_available + self._headroom:
            known.ceiling = math.inf
        if known.activation_bytes is None or not self._adaptive:
            return min(offered, known.ceiling)
        return min(device_bytes + self._room_for(memory, known.bytes_to_spare), known.ceiling)

    def _most_activations(self) -> int:
        """The most that any shape of this prompt needs: shapes may come back in any order."""
        return max(known.bytes_to_spare for known in self._in_prompt)

    def _room_for(self, memory: DeviceMemory, activation_bytes: int) -> int:
        return memory.free + max(0, memory.cached - self._stuck) - activation_bytes - self._headroom

    def _under_pressure(self, memory: DeviceMemory, device_bytes: int) -> float | None:
        known = self.current
        short = memory.free < self._headroom * SHORTAGE
        known.shortages = known.shortages + 1 if short else 0
        if known.shortages < 2:
            return None
        known.shortages = 0
        return device_bytes + memory.free - self._headroom
