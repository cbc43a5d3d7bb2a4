"""Activations across a device boundary: a block on another device gets its inputs there, and its outputs come home.

[Note: what moves]
Tensors among the arguments move, wherever they are held (containers.py). The containers stay the same objects, because
code inside and around blocks writes to them: the tensors in them are exchanged while the block runs. A tensor that
several blocks on one device get, such as a rotary table or a mask, moves there once in a step, and again when it was
written to (mirrors.py). The outputs of a block are :class:`Away`, and come home when other code uses them.

[Note: blocks that nobody enters]
Some code runs the layers of a block one by one (by_units.py). Which code does is not known beforehand, and a layer that
is given a tensor of another device fails already in the first step. So until a block has been entered in a step the
modules in it are watched too: the outermost module that is entered while no block runs gets its inputs on its device.
Once its block has been entered, only the block is watched. What the model computes between such layers runs at home; if
it reads the block's own weights there, these are on the other device, and the model must run on one device. Compiled
models are left alone, because their blocks' graphs would be cut up.

[Note: what runs at home]
Functions that other code has put into a model, and that a block calls, have tensors and modules of their own, which are
at home. So a block on another device gets such a function wrapped: it is called at home, with tensors that are
:class:`Away`, and its outputs go to the block's device. A tensor that it was given and returns, or has written to, is
the block's own tensor again. The names below which functions are found tell which run at home, because others, such as
those that compute attention, belong on the block's device.

[Note: what does not run at home]
All else that other code has put into a block or into its options runs where the block does, and may have tensors of its
own at home: functions in the place of a layer's ``forward`` (strangers.py), functions that compute attention, and
objects in options. While such a block runs, a mode of torch's functions brings those tensors to it (meeting.py). Other
blocks, which are nearly all, run without that mode.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ..devices.allocation_record import NO_RECORD, AllocationRecord
from ..model.entries import Entries
from ..split.links import Links
from .away import Away
from .containers import Change, Exchange, Function, mapped
from .meeting import Meeting
from .mirrors import Mirrors
from .strangers import Strangers
from .visits import Guest, Loan, Visit, may_be_on, visited
from .witness import Witness


class Boundary:
    """Runs some blocks of a model on other devices than its home.

    Args:
        home: where the model's inputs and outputs are, and everything that is in no block.
        links: copies between devices.
        at_home: names in dictionaries among blocks' arguments; functions below them are called at home.
        ignored: names in dictionaries; no block looks below them.
        record: has the allocations at home, and must not have those of other devices.

    Attributes:
        broke_on: the device of the block that an exception ended; None if the last block has ended without one.
    """

    def __init__(
        self,
        home: torch.device,
        links: Links,
        at_home: Collection[str] = (),
        record: AllocationRecord = NO_RECORD,
        ignored: Collection[str] = (),
    ) -> None:
        self.home = home
        self._at_home, self._ignored = frozenset(at_home), frozenset(ignored)
        self._call = _calls(weakref.ref(self))
        self._move = _Mover(links, record)
        self._record = record
        self.broke_on: torch.device | None = None
        self._mirrors = Mirrors(home, self._move)
        self._witness = Witness(self._mirrors.touched)
        self._strangers = Strangers()
        self._is_compiled = self._in_step = False
        self._sent: weakref.WeakValueDictionary[int, Away] = weakref.WeakValueDictionary()
        self._visits: list[_Call] = []
        # Outermost: whoever times a block times it with its inputs there (recorder.py).
        self._entries = Entries(outermost=True)
        self._parts: dict[nn.Module, Entries] = {}
        self._alone: nn.Module | None = None
        self._entered: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def attach(self, root: nn.Module, blocks: Sequence[tuple[nn.Module, torch.device]], compiled: bool = False) -> None:
        """Watch ``blocks`` that run on these devices, and ``root``, whose forward is one step.

        The hooks refer to the boundary weakly. They are called before all others when a module begins, and after these
        when it ends. ``compiled``: steps run compiled.
        """
        self.detach()
        self._is_compiled = compiled
        self._strangers.watch(module for module, _ in blocks)
        who = weakref.ref(self)
        begins, ends = _begins(who, Boundary._begin_step), _ends(who, Boundary._end_step)
        self._entries.watch(root, begins, ends, methods=False)
        for module, device in blocks:
            if device != self.home and not compiled and module not in self._entered:
                self._parts[module] = _watch_parts(who, module, device)
            self._entries.watch(module, _enters(who, device), _ends(who, Boundary._leave))

    def detach(self) -> None:
        """Remove the hooks: blocks run where they are called."""
        self.settle()
        self._entries.remove()
        for entries in self._parts.values():
            entries.remove()
        self._parts.clear()

    def out_of_reach(self) -> list[nn.Module]:
        """Blocks that must run at home because of what other code has put into them: steps run compiled, and a mode
        that brings the tensors of that code to another device would be compiled too. Otherwise there are none."""
        if not self._is_compiled:
            return []
        self._strangers.look()
        return self._strangers.found

    def settle(self) -> None:
        """Undo what an exception or an interrupt left behind. Harmless when there is nothing."""
        while self._visits:
            call = self._visits.pop()
            call.visit.end(self._sending(call.guest))
            call.guest.leave()
        self._witness.remove()
        self._mirrors.clear()
        self._sent.clear()
        self._in_step = False
        self._alone = None
        for entries in (self._entries, *self._parts.values()):
            entries.settle()

    # -- what hooks tell -----------------------------------------------------------------------------------------

    def _begin_step(self) -> None:
        self.settle()
        self._strangers.look()
        self._witness.begin()
        self._in_step = not self._is_compiled

    def _end_step(self, output: Any) -> Any:
        """A step ends; ``output`` is None after an exception, and then nothing comes home."""
        if output is not None:
            self._witness.off()
            output = mapped(output, _home)
            self._mirrors.all_come_home()
        self.settle()
        for block in [block for block in self._parts if block in self._entered]:
            self._parts.pop(block).remove()
        return output

    def _enter_block(
        self, module: nn.Module, device: torch.device, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        if module in self._parts:
            self._entered.add(module)
        return self._enter(device, args, kwargs, self._strangers.are_in(module))

    def _enter_part(
        self, block: nn.Module, module: nn.Module, device: torch.device, args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        """A module in a block begins (Note: blocks that nobody enters)."""
        if self._visits:
            return None
        self._alone = module
        return self._enter(device, args, kwargs, self._strangers.are_in(block))

    def _leave_part(self, module: nn.Module, output: Any) -> Any:
        if self._alone is not module or not self._visits:
            return None
        self._alone = None
        return self._leave(output)

    def _enter(
        self, device: torch.device, args: tuple, kwargs: dict[str, Any], strange: bool
    ) -> tuple[tuple, dict[str, Any]]:
        was_on = self._witness.off()  # Tensors that are brought here need not be reported.
        guest = Guest(device, self.home, self._mirrors, self._move, self._is_compiled)
        if device == self.home:
            self._mirrors.all_come_home()  # The block may get at originals in any way.
            wrap = self._wrap_watched if self._in_step else _unchanged
            visit = Visit(device, Exchange(guest.give, self._at_home, wrap, ignored=self._ignored))
        else:
            later = None if self._is_compiled else guest.give_later
            wrap = partial(self._wrap, guest)
            exchange = Exchange(guest.give, self._at_home, wrap, later, self._ignored)
            visit = Visit(device, exchange, self._record.paused())
        self._visits.append(_Call(visit, guest))
        args, kwargs = visit.exchange.all_of(args, kwargs)
        if not (strange or visit.exchange.has_strangers):
            if was_on:
                visit.afterwards(self._witness.on)
            return args, kwargs
        if was_on:
            self._witness.on()
        if device != self.home and self.home.type != "cpu" and not self._is_compiled:
            meeting = guest.meeting = Meeting(device, self.home, self._move, guest.note_writes, guest.renew)
            visit.meanwhile(meeting)
        return args, kwargs

    def _leave(self, output: Any) -> Any:
        """A block ends; ``output`` is None after an exception."""
        if not self._visits:
            return None  # A step inside of the block has settled all of them.
        call = self._visits.pop()
        self.broke_on = call.visit.device if output is None else None
        call.visit.end(self._sending(call.guest))
        call.guest.note_writes()
        output = mapped(output, self._sending(call.guest, apart=not self._in_step))
        if not self._in_step:
            self._mirrors.all_come_home()
            self._mirrors.clear()
        elif not self._visits and self._mirrors:
            self._witness.on()
        call.guest.leave()
        return output

    def _wrap(self, guest: Guest, function: Function) -> Function:
        return partial(self._call, guest, function)

    def _wrap_watched(self, function: Function) -> Function:
        return partial(self._call, None, function)

    def _call_at_home(self, guest: Guest | None, function: Function, *args: Any, **kwargs: Any) -> Any:
        """Call what a block calls (Note: what runs at home); ``guest`` is None for a block at home."""
        was_off = not self._is_compiled and self._witness.on()
        try:
            return function(*args, **kwargs) if guest is None else self._call_for(guest, function, args, kwargs)
        finally:
            if was_off:
                self._witness.off()

    def _call_for(self, guest: Guest, function: Function, args: Any, kwargs: Any) -> Any:
        guest.note_writes()
        loan = Loan(guest.device, self.home, self._move)
        visit = Visit(self.home, Exchange(loan.lend), self._record.resumed(), guest.without_meeting())
        try:
            return visited(visit, loan, function, args, kwargs)
        finally:
            visit.end(loan.take_back)
            guest.renew()

    # -- tensors -------------------------------------------------------------------------------------------------

    def _sending(self, guest: Guest, apart: bool = False) -> Change:
        """Make the change for tensors that a block returns: one that it was given becomes the original again.

        ``apart``: a copy does not. Where uses of the original are not seen, it would come home for nothing.
        """
        device = guest.device

        def send(tensor: torch.Tensor) -> torch.Tensor:
            original = guest.original(tensor)
            if original is not None and not (apart and guest.is_copy(tensor)):
                return original
            if device == self.home or isinstance(tensor, Away) or not may_be_on(tensor, device):
                return tensor
            known = self._sent.get(id(tensor))
            if known is None or not known.stands_for(tensor):
                known = self._sent[id(tensor)] = Away(tensor, device, self.home, self._move)
            return known

        return send


class _Call(NamedTuple):
    """A block that runs."""

    visit: Visit
    guest: Guest


class _Mover:
    """Copies tensors. Which steps make a copy depends on the code that uses a tensor, so copies are not recorded."""

    def __init__(self, links: Links, record: AllocationRecord) -> None:
        self._links, self._record = links, record

    def __call__(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """A copy of ``tensor`` on ``device``."""
        with self._record.paused():
            return self._links.move(tensor, device)


def _unchanged(function: Function) -> Function:
    return function


def _home(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.here() if isinstance(tensor, Away) else tensor


Reference = Callable[[], Boundary | None]


def _begins(who: Reference, what: Callable[[Boundary], None]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None) -> None:
        if (boundary := who()) is not None:
            what(boundary)

    return hook


def _enters(who: Reference, device: torch.device) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        boundary = who()
        return None if boundary is None else boundary._enter_block(module, device, args, kwargs)

    return hook


def _watch_parts(who: Reference, block: nn.Module, device: torch.device) -> Entries:
    """Watch the modules in ``block``, for as long as the block itself has not been entered."""

    def begins(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        boundary = who()
        return None if boundary is None else boundary._enter_part(block, module, device, args, kwargs)

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
    def call(guest: Guest | None, function: Function, *args: Any, **kwargs: Any) -> Any:
        boundary = who()
        assert boundary is not None, "a block runs, but nobody moves its tensors"
        return boundary._call_at_home(guest, function, *args, **kwargs)

    return torch.compiler.disable(call)  # hooks.py, Note: compiled models
