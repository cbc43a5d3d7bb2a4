"""A block runs on a device, or a function at home for a block elsewhere: what it is given there, and what it leaves.

[Note: given when looked at]
Options and other dictionaries hold tensors for many users: the caches of all layers, say, of which a block uses its
own. So in the place of a tensor in a dictionary the block gets a stand-in on its device (:class:`Away`, the other way
round), and the tensor goes there when the block uses it. Tensors that are passed by themselves, or in lists and
objects, go at once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch

from .away import Away, Move, may_be_on
from .containers import Change, Exchange, Function, mapped
from .meeting import Meeting
from .mirrors import Copy, Mirror, Mirrors, alias_counted, moved_counted


class Visit:
    """A call on a device: the device is current meanwhile, and containers among the arguments hold tensors on it.

    Args:
        device: where the call computes.
        meanwhile: contexts that last as long as the call.

    Attributes:
        exchange: of the arguments.
    """

    def __init__(self, device: torch.device, exchange: Exchange, *meanwhile: AbstractContextManager[Any]) -> None:
        self.device = device
        self.exchange = exchange
        self._guards = ExitStack()
        for guard in meanwhile:
            self._guards.enter_context(guard)
        if device.type == "cuda" and torch.cuda.is_available():
            self._guards.enter_context(torch.cuda.device(device))

    def meanwhile(self, guard: AbstractContextManager[Any]) -> None:
        """Have ``guard`` last as long as the call."""
        self._guards.enter_context(guard)

    def afterwards(self, act: Callable[[], Any]) -> None:
        """Have ``act`` done when the call is over."""
        self._guards.callback(act)

    def end(self, change: Change) -> None:
        """The call is over, or was given up (:meth:`Exchange.undo`)."""
        try:
            self.exchange.undo(change)
        finally:
            self._guards.close()


class Guest:
    """What a block is given on its device, and what becomes of that.

    Args:
        device: where the block runs.
        home: where the tensors of the model are.
        mirrors: of the step.
        move: returns a copy of a tensor on a device.
        uniform: whether the block gets no tensors of inference mode on other devices than home.

    Attributes:
        meeting: brings tensors that the block is not given; None where none are expected.
    """

    def __init__(
        self, device: torch.device, home: torch.device, mirrors: Mirrors, move: Move, uniform: bool = False
    ) -> None:
        self.device, self.home = device, home
        self._mirrors, self._move, self._is_uniform = mirrors, move, uniform
        self._given: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._copies: dict[int, tuple[Mirror, torch.Tensor]] = {}
        self._crossed: dict[int, tuple[Away, Copy]] = {}
        self.meeting: Meeting | None = None

    def without_meeting(self) -> AbstractContextManager[None]:
        """While this lasts nothing is brought to the block."""
        return nullcontext() if self.meeting is None else self.meeting.paused()

    def give(self, tensor: torch.Tensor) -> torch.Tensor:
        """What the block gets for ``tensor``."""
        if self.device == self.home:
            return self._give_at_home(tensor)
        if not isinstance(tensor, Away) and not may_be_on(tensor, self.home):
            return tensor  # The host keeps it elsewhere (on the CPU, say) and wants it there.
        if tensor.layout != torch.strided:
            return self._lend(tensor, self._move(tensor, self.device))  # No code writes to a part of it.
        return self._bring(tensor)

    def give_later(self, tensor: torch.Tensor) -> torch.Tensor:
        """What the block gets for a tensor in a dictionary (Note: given when looked at)."""
        stays = self.device == self.home or (isinstance(tensor, Away) and tensor.place == self.device)
        if stays or not (isinstance(tensor, Away) or may_be_on(tensor, self.home)) or tensor.layout != torch.strided:
            return self.give(tensor)
        known = self._given.get(id(tensor))
        if known is not None and isinstance(known[0], Away):
            return known[0]
        stands = Away(tensor, self.home, self.device, lambda there, _: self._bring_now(there))
        self._given[id(tensor)] = (stands, tensor)
        return self._lend(tensor, stands)

    def original(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The original for which the block was given ``tensor``; None if it was not given that."""
        given = self._given.get(id(tensor))
        return given[1] if given is not None and given[0] is tensor else None

    def is_copy(self, tensor: torch.Tensor) -> bool:
        """Whether it is a copy of a tensor at home."""
        return self.device != self.home and id(tensor) in self._copies

    def note_writes(self) -> None:
        """Find out what the block has written to, and take note of it."""
        for key, (away, copy) in self._crossed.items():
            if copy.is_written and not away.stands_for(copy.tensor):
                away.is_now(copy.tensor, self.device)
                self._crossed[key] = (away, Copy(copy.tensor, copy.tensor._version))
        self._mirrors.written(self.device, [mirror for mirror, _ in self._copies.values()])

    def renew(self) -> None:
        """Have copies hold what was written at home meanwhile."""
        for mirror, copy in self._copies.values():
            original = mirror.alive
            if original is not None and self.device != self.home and mirror.copy_on(self.device) is None:
                copy.copy_(self._move(original, self.device))
                mirror.keep(self.device, copy)

    def leave(self) -> None:
        """The block has ended: forget what it was given, which may refer to this guest."""
        self._given.clear()
        self._copies.clear()
        self._crossed.clear()
        self.meeting = None

    def _give_at_home(self, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, Away):
            tensor = tensor.here()
        given, mirror = self._mirrors.at_home(tensor)
        if mirror is not None:
            self._copies[id(given)] = (mirror, given)
        return tensor if given is tensor else self._lend(tensor, given)

    def _bring_now(self, tensor: torch.Tensor) -> torch.Tensor:
        """As :meth:`_bring`, while the block runs: it may have written to another view of the same memory."""
        self.note_writes()
        return self._bring(tensor)

    def _bring(self, original: torch.Tensor) -> torch.Tensor:
        tensor = original
        if isinstance(tensor, Away):
            if tensor.place != self.home:
                return self._lend(original, self._cross(tensor))
            tensor = tensor.here()
        copy, mirror = self._mirrors.bring(tensor, self.device)
        self._copies[id(copy)] = (mirror, copy)
        return self._lend(original, copy)

    def _cross(self, away: Away) -> torch.Tensor:
        """The tensor for which ``away`` stands, brought straight from its device."""
        if away.place == self.device:
            there = away.on(self.device)
            return alias_counted(there) if self._is_uniform and there.is_inference() else there
        if id(away) not in self._crossed:
            there = away.on(away.place)
            copy = moved_counted(self._move, there, self.device)
            self._crossed[id(away)] = (away, Copy(copy, copy._version))
        return self._crossed[id(away)][1].tensor

    def _lend(self, original: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        self._given[id(given)] = (given, original)
        return given


class Loan:
    """The tensors of a block that a function at home is given."""

    def __init__(self, place: torch.device, home: torch.device, move: Move) -> None:
        self._place, self._home, self._move = place, home, move
        self._lent: dict[int, Away] = {}
        self._owned: dict[int, torch.Tensor] = {}
        self._copies: list[tuple[torch.Tensor, Copy]] = []

    def lend(self, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, Away):
            there = tensor.on(tensor.place)
            if tensor.place == self._home:
                self._owned[id(there)] = tensor
                return there
            tensor = there
        if not may_be_on(tensor, self._place):
            return tensor
        if id(tensor) not in self._lent:
            away = self._lent[id(tensor)] = Away(tensor, self._place, self._home, self._copy)
            self._owned[id(away)] = tensor
        return self._lent[id(tensor)]

    def copy_back(self) -> None:
        """Have tensors of the block hold what was written to their copies."""
        for tensor, copy in self._copies:
            if copy.is_written:
                tensor.copy_(self._move(copy.tensor, self._place))

    def take_back(self, tensor: torch.Tensor) -> torch.Tensor:
        """What the block gets for a tensor that the function has returned."""
        if id(tensor) in self._owned:
            return self._owned[id(tensor)]
        if isinstance(tensor, Away):
            return tensor.on(self._place)
        return self._move(tensor, self._place) if may_be_on(tensor, self._home) else tensor

    def _copy(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        copy = moved_counted(self._move, tensor, device)
        self._copies.append((tensor, Copy(copy, copy._version)))
        return copy


def visited(visit: Visit, loan: Loan, function: Function, args: Any, kwargs: Any) -> Any:
    """Call ``function`` at home for a block, and return what the block gets. This is a function of its own, so that
    what was made at home is freed with this frame, before the record pauses again."""
    args, kwargs = visit.exchange.all_of(args, kwargs)
    output = function(*args, **kwargs)
    loan.copy_back()
    return mapped(output, loan.take_back)
