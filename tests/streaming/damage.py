"""What may happen to a copy on its way, and a device on which it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from models import PinningBackend
from weightstream.streaming.devices.copies import Event, Pair


def flip_a_bit(target: torch.Tensor) -> None:
    target[100] ^= 4


def swap_words(target: torch.Tensor) -> None:
    words = target.view(torch.int32)
    words[[3, 17]] = words[[17, 3]]


def move_words(target: torch.Tensor) -> None:
    target[:64].copy_(target[:64].roll(4))


def zero_the_tail(target: torch.Tensor) -> None:
    target[128:].zero_()


DAMAGE = [flip_a_bit, swap_words, move_words, zero_the_tail]


# A norm has only ones and zeros: to move them about is no damage.
SMALLEST_MATRIX = 4096


class CorruptingBackend(PinningBackend):
    """Damages copies.

    Attributes:
        damage: what it does to what has been copied; None leaves out the copy, so that the slot is stale.
        countdown: copies with matrices until the one that it damages.
        damaged: copies so far.
        always: damages every one from then on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.damage: Callable[[torch.Tensor], None] | None = flip_a_bit
        self.countdown = 10**9
        self.damaged = 0
        self.always = False

    def _copy_now(self, stream: object, pairs: Sequence[Pair], waits: Sequence[Event]) -> Event:
        largest = max(pairs, key=lambda pair: pair[0].nbytes)
        if largest[0].nbytes >= SMALLEST_MATRIX:
            self.countdown -= 1
            if self.countdown == 0 or (self.always and self.countdown < 0):
                return self._damage_now(stream, pairs, waits, largest)
        return super()._copy_now(stream, pairs, waits)

    def _damage_now(self, stream: object, pairs: Sequence[Pair], waits: Sequence[Event], chosen: Pair) -> Event:
        self.damaged += 1
        if self.damage is None:
            pairs = [pair for pair in pairs if pair is not chosen]
        event = super()._copy_now(stream, pairs, waits)
        self.finish(event)
        if self.damage is not None:
            self.damage(chosen[0])
        return event
