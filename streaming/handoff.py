"""Activations across a device boundary: a block on another device gets its inputs there, and what it gives comes home.

[Note: what moves]
Tensors among the arguments move, wherever they are held (containers.py). What holds them stays the same object, because
code inside and around blocks writes to it: its tensors are exchanged while the block runs. What several blocks on one
device get, as rotary tables and masks, moves there once in a step: a copy is kept for as long as its original lives,
and until the step ends. Copies are compared by identity, so it counts on what a model passes to several blocks not
being written to between them; that no model of the host does so is tested with virtual devices, for which copies are
made too. What a block gives is :class:`Away`, and comes home when somebody looks at it.

[Note: blocks that nobody enters]
Some code runs the layers of a block one by one (by_units.py). Which do, nobody can tell beforehand, and a layer that is
given a tensor of another device is an error already in the first step. So until a block has been entered in a step the
modules in it are watched too: the outermost that is entered while no block is gets its inputs where it is. From then on
its block is all that counts. What the model computes between such layers runs at home; if it reads the block's own
weights there, they are on the other device, and only one device will do. Models that are compiled are left alone,
because their blocks would be cut up.

[Note: what runs at home]
Functions that somebody hung into a model, and that a block calls, have tensors and modules of their own, and these are
at home. So a block on another device gets such a function wrapped: it is called at home, with tensors that are
:class:`Away`, and what it gives goes to the block's device. What it was given and gives back, or has written to, is the
block's own tensor again. Which functions these are is told by the names below which they are found, because there are
others, as those that compute attention, that belong where the block is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from .allocation_record import NO_RECORD, AllocationRecord
from .away import Away, Move
from .containers import Change, Exchange, Function, mapped
from .entries import Entries
from .links import Links


class Boundary:
    """Runs some blocks of a model on other devices than its home.

    Args:
        home: where the model's inputs and outputs are, and everything that is in no block.
        links: copies between devices.
        at_home: names in dictionaries among blocks' arguments; functions below them are called at home.
        record: of the allocations at home, of which those of other devices must not be part.

    Attributes:
        broke_on: the device of the block that an exception has ended last, if none has run since.
    """

    def __init__(
        self,
        home: torch.device,
        links: Links,
        at_home: Collection[str] = (),
        record: AllocationRecord = NO_RECORD,
    ) -> None:
        self.home = home
        self._at_home = frozenset(at_home)
        self._call = _calls(weakref.ref(self))
        self._links = links
        self._record = record
        self.broke_on: torch.device | None = None
        self._moved: dict[tuple[int, torch.device], _Moved] = {}
        self._visits: list[_Visit] = []
        self._entries = Entries()
        self._parts: dict[nn.Module, Entries] = {}
        self._alone: nn.Module | None = None
        self._entered: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def attach(self, root: nn.Module, blocks: Sequence[tuple[nn.Module, torch.device]], compiled: bool = False) -> None:
        """Watch ``blocks`` that run on these devices, and ``root``, whose forward is one step.

        The hooks refer to the boundary weakly. They begin before and end after all that are there. ``compiled``: steps
        run compiled.
        """
        self.detach()
        who = weakref.ref(self)
        begins, ends = _begins(who, Boundary._begin_step), _ends(who, Boundary._end_step)
        self._entries.watch(root, begins, ends, methods=False)
        for module, device in blocks:
            if device != self.home and not compiled and module not in self._entered:
                self._parts[module] = _watch_parts(who, module, device)
            self._entries.watch(module, _enters(who, device), _ends(who, Boundary._leave))

    def detach(self) -> None:
        """Blocks run where they are called."""
        self.settle()
        self._entries.remove()
        for entries in self._parts.values():
            entries.remove()
        self._parts.clear()

    def settle(self) -> None:
        """Undo what an exception or an interrupt left behind. Harmless when there is nothing."""
        while self._visits:
            self._end(self._visits.pop())
        self._moved.clear()
        self._alone = None
        for entries in (self._entries, *self._parts.values()):
            entries.settle()

    # -- what hooks tell -----------------------------------------------------------------------------------------

    def _begin_step(self) -> None:
        self.settle()

    def _end_step(self, output: Any) -> Any:
        self.settle()
        for block in [block for block in self._parts if block in self._entered]:
            self._parts.pop(block).remove()
        return mapped(output, _home)

    def _enter_block(
        self, module: nn.Module, device: torch.device, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        if module in self._parts:
            self._entered.add(module)
        return self._enter(device, args, kwargs)

    def _enter_part(self, module: nn.Module, device: torch.device, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A module in a block begins (Note: blocks that nobody enters)."""
        if self._visits:
            return None
        self._alone = module
        return self._enter(device, args, kwargs)

    def _leave_part(self, module: nn.Module, output: Any) -> Any:
        if self._alone is not module or not self._visits:
            return None
        self._alone = None
        return self._leave(output)

    def _enter(self, device: torch.device, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if device == self.home:
            exchange = Exchange(_home)
        else:
            bring = partial(self._bring, device=device)
            exchange = Exchange(bring, self._at_home, partial(self._wrap, device))
        self._visits.append(_Visit(device, exchange, nullcontext() if device == self.home else self._record.paused()))
        return exchange.all_of(args, kwargs)

    def _leave(self, output: Any) -> Any:
        """A block ends; ``output`` is None after an exception."""
        if not self._visits:
            return None  # A step inside of the block has settled all of them.
        visit = self._visits.pop()
        self.broke_on = visit.device if output is None else None
        self._end(visit)
        return mapped(output, self._sending(visit.device))

    def _end(self, visit: _Visit) -> None:
        visit.end(self._sending(visit.device))

    def _wrap(self, device: torch.device, function: Function) -> Function:
        return partial(self._call, device, function)

    def _call_at_home(self, device: torch.device, function: Function, *args: Any, **kwargs: Any) -> Any:
        """Call what a block on ``device`` calls (Note: what runs at home)."""
        loan = _Loan(device, self.home, self._move)
        visit = _Visit(self.home, Exchange(loan.lend), self._record.resumed())
        try:
            return _visited(visit, loan, function, args, kwargs)
        finally:
            visit.end(loan.take_back)

    # -- tensors -------------------------------------------------------------------------------------------------

    def _bring(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """``tensor`` on ``device``; the same copy for every block of a step."""
        if isinstance(tensor, Away):
            return tensor.on(device)
        if not _may_be_on(tensor, self.home):
            return tensor  # What the host keeps elsewhere (on the CPU, say) it wants there.
        key = (id(tensor), device)
        known = self._moved.get(key)
        if known is None or known.gone() is not tensor:
            # The identity is another tensor's when this one is gone, so the copy goes with it.
            gone = weakref.ref(tensor, lambda _, moved=self._moved: moved.pop(key, None))
            known = self._moved[key] = _Moved(gone, self._move(tensor, device))
        return known.copy

    def _sending(self, device: torch.device) -> Change:
        """What is made of tensors that a block on ``device`` gives."""

        def send(tensor: torch.Tensor) -> torch.Tensor:
            if device == self.home or isinstance(tensor, Away) or not _may_be_on(tensor, device):
                return tensor
            return Away(tensor, device, self.home, self._move)

        return send

    def _move(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """A copy of ``tensor`` on ``device``. Which steps make one hangs on who looks at a tensor."""
        with self._record.paused():
            return self._links.move(tensor, device)


def _may_be_on(tensor: torch.Tensor, device: torch.device) -> bool:
    """Whether it is on ``device``. Tensors do not tell of virtual ones, which are all the CPU."""
    return tensor.device.type == device.type and (device.type == "cpu" or tensor.device == device)


class _Moved(NamedTuple):
    """A copy on another device, for as long as its original lives."""

    gone: weakref.ref[torch.Tensor]
    copy: torch.Tensor


class _Loan:
    """A block's tensors that a function at home is given."""

    def __init__(self, place: torch.device, home: torch.device, move: Move) -> None:
        self._place, self._home, self._move = place, home, move
        self._lent: dict[int, Away] = {}
        self._owned: dict[int, torch.Tensor] = {}
        self._copies: list[tuple[torch.Tensor, torch.Tensor, int]] = []

    def lend(self, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, Away) or not _may_be_on(tensor, self._place):
            return tensor
        if id(tensor) not in self._lent:
            away = self._lent[id(tensor)] = Away(tensor, self._place, self._home, self._copy)
            self._owned[id(away)] = tensor
        return self._lent[id(tensor)]

    def copy_back(self) -> None:
        """Have tensors of the block hold what was written to their copies."""
        for tensor, copy, version in self._copies:
            if copy._version != version:
                tensor.copy_(self._move(copy, self._place))

    def take_back(self, tensor: torch.Tensor) -> torch.Tensor:
        """What the block gets for a tensor that the function has given."""
        if id(tensor) in self._owned:
            return self._owned[id(tensor)]
        if isinstance(tensor, Away):
            return tensor.on(self._place)
        return self._move(tensor, self._place) if _may_be_on(tensor, self._home) else tensor

    def _copy(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
        ):  # Of others, torch does not count how often they are written to.
            copy = self._move(tensor, device)
        self._copies.append((tensor, copy, copy._version))
        return copy


class _Visit:
    """A call on a device: that is current, and what holds tensors among the arguments holds those that are there.

    ``meanwhile`` lasts as long as the call.
    """

    def __init__(self, device: torch.device, exchange: Exchange, meanwhile: AbstractContextManager[None]) -> None:
        self.device = device
        self.exchange = exchange
        self._guards = ExitStack()
        self._guards.enter_context(meanwhile)
        if device.type == "cuda" and torch.cuda.is_available():
            self._guards.enter_context(torch.cuda.device(device))

    def end(self, change: Change) -> None:
        """The call is over, or was given up (:meth:`Exchange.undo`)."""
        try:
            self.exchange.undo(change)
        finally:
            self._guards.close()


def _visited(visit: _Visit, loan: _Loan, function: Function, args: Any, kwargs: Any) -> Any:
    """What ``function`` gives at home, for the block that calls it. By itself, so that what was made at home goes with
    this frame, before the record pauses again."""
    args, kwargs = visit.exchange.all_of(args, kwargs)
    output = function(*args, **kwargs)
    loan.copy_back()
    return mapped(output, loan.take_back)


def _home(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.here() if isinstance(tensor, Away) else tensor


Reference = Callable[[], Boundary | None]


def _begins(who: Reference, what: Callable[[Boundary], None]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if (boundary := who()) is not None:
            what(boundary)

    return hook


def _enters(who: Reference, device: torch.device) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        boundary = who()
        return None if boundary is None else boundary._enter_block(module, device, args, kwargs)

    return hook


def _watch_parts(who: Reference, block: nn.Module, device: torch.device) -> Entries:
    """Have the modules in ``block`` told of, for as long as nobody has entered the block itself."""

    def begins(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        boundary = who()
        return None if boundary is None else boundary._enter_part(module, device, args, kwargs)

    def ends(module: nn.Module, args: object, output: Any) -> Any:
        boundary = who()
        return None if boundary is None else boundary._leave_part(module, output)

    entries = Entries()
    for module in block.modules():
        if module is not block:
            entries.watch(module, begins, ends, methods=any(True for _ in module.children()))
    return entries


def _ends(who: Reference, what: Callable[[Boundary, Any], Any]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: object, output: Any) -> Any:
        boundary = who()
        return None if boundary is None else what(boundary, output)

    return hook


def _calls(who: Reference) -> Function:
    def call(device: torch.device, function: Function, *args: Any, **kwargs: Any) -> Any:
        boundary = who()
        assert boundary is not None, "a block runs, but nobody moves its tensors"
        return boundary._call_at_home(device, function, *args, **kwargs)

    return torch.compiler.disable(call)  # hooks.py, Note: compiled models
