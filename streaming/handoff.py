"""Activations across a device boundary: a block on another device gets its inputs there, and what it gives comes home.

[Note: what moves]
Tensors among the arguments move, however deep in lists, tuples and dictionaries. In objects (a dataclass, say, or a
cache) and in what functions have closed over they move too, but not in those that a dictionary brings along: options
hold what belongs to anybody. Lists, dictionaries and objects stay the same, because code inside and around blocks
writes to them: their tensors are exchanged while the block runs. What several blocks on one device get, as rotary
tables and masks, moves there once in a step: a copy is kept for as long as its original lives, and until the step ends.
Copies are compared by identity, so it counts on what a model passes to several blocks not being written to between
them; that no model of the host does so is tested with virtual devices, for which copies are made too. What a block
gives is :class:`Away`, and comes home when somebody looks at it.

[Note: what runs at home]
Functions that somebody hung into a model, and that a block calls, have tensors and modules of their own, and these are
at home. So a block on another device gets such a function wrapped: it is called at home, with tensors that are
:class:`Away`, and what it gives goes to the block's device. What it was given and gives back, or has written to, is the
block's own tensor again. Which functions these are is told by the names below which they are found, because there are
others, as those that compute attention, that belong where the block is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from types import CellType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn

from .away import Away
from .links import Links

# What is done to a tensor.
Change = Callable[[torch.Tensor], torch.Tensor]
Function = Callable[..., Any]


class Boundary:
    """Runs some blocks of a model on other devices than its home.

    Args:
        home: where the model's inputs and outputs are, and everything that is in no block.
        links: copies between devices.
        at_home: names in dictionaries among blocks' arguments; functions below them are called at home.

    Attributes:
        broke_on: the device of the block that an exception has ended last, if none has run since.
    """

    def __init__(self, home: torch.device, links: Links, at_home: Collection[str] = ()) -> None:
        self.home = home
        self._at_home = frozenset(at_home)
        self._call = _calls(weakref.ref(self))
        self._links = links
        self.broke_on: torch.device | None = None
        self._moved: dict[tuple[int, torch.device], _Moved] = {}
        self._visits: list[_Visit] = []
        self._handles: list[Any] = []

    def attach(self, root: nn.Module, blocks: Sequence[tuple[nn.Module, torch.device]]) -> None:
        """Hook ``blocks`` that run on these devices, and ``root``, whose forward is one step.

        The hooks refer to the boundary weakly. They begin before and end after all that are there.
        """
        self.detach()
        who = weakref.ref(self)
        hooks = [(root, _begins(who, Boundary._begin_step), _ends(who, Boundary._end_step))]
        for module, device in blocks:
            hooks.append((module, _enters(who, device), _ends(who, Boundary._leave)))
        for module, begins, ends in hooks:
            hidden = torch.compiler.disable(begins), torch.compiler.disable(ends)  # hooks.py, Note: compiled models
            self._handles.append(module.register_forward_pre_hook(hidden[0], prepend=True, with_kwargs=True))
            self._handles.append(module.register_forward_hook(hidden[1], always_call=True))

    def detach(self) -> None:
        """Blocks run where they are called."""
        self.settle()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def settle(self) -> None:
        """Undo what an exception or an interrupt left behind. Harmless when there is nothing."""
        while self._visits:
            self._end(self._visits.pop())
        self._moved.clear()

    # -- what hooks tell -----------------------------------------------------------------------------------------

    def _begin_step(self) -> None:
        self.settle()

    def _end_step(self, output: Any) -> Any:
        self.settle()
        return _mapped(output, _home)

    def _enter(self, device: torch.device, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if device == self.home:
            visit = _Visit(device, _home)
        else:
            visit = _Visit(device, partial(self._bring, device=device), self._at_home, partial(self._wrap, device))
        self._visits.append(visit)
        return visit.exchange_all(args, kwargs)

    def _leave(self, output: Any) -> Any:
        """A block ends; ``output`` is None after an exception."""
        visit = self._visits.pop()
        self.broke_on = visit.device if output is None else None
        self._end(visit)
        return _mapped(output, self._sending(visit.device))

    def _end(self, visit: _Visit) -> None:
        visit.end(self._sending(visit.device))

    def _wrap(self, device: torch.device, function: Function) -> Function:
        return partial(self._call, device, function)

    def _call_at_home(self, device: torch.device, function: Function, *args: Any, **kwargs: Any) -> Any:
        """Call what a block on ``device`` calls (Note: what runs at home)."""
        loan = _Loan(device, self.home, self._links)
        visit = _Visit(self.home, loan.lend)
        try:
            args, kwargs = visit.exchange_all(args, kwargs)
            output = function(*args, **kwargs)
            loan.copy_back()
            return _mapped(output, loan.take_back)
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
        if known is None:
            # The identity is another tensor's when this one is gone, so the copy goes with it.
            gone = weakref.ref(tensor, lambda _, moved=self._moved: moved.pop(key, None))
            known = self._moved[key] = _Moved(gone, self._links.move(tensor, device))
        return known.copy

    def _sending(self, device: torch.device) -> Change:
        """What is made of tensors that a block on ``device`` gives."""

        def send(tensor: torch.Tensor) -> torch.Tensor:
            if device == self.home or isinstance(tensor, Away) or not _may_be_on(tensor, device):
                return tensor
            return Away(tensor, device, self.home, self._links.move)

        return send


def _may_be_on(tensor: torch.Tensor, device: torch.device) -> bool:
    """Whether it is on ``device``. Tensors do not tell of virtual ones, which are all the CPU."""
    return tensor.device.type == device.type and (device.type == "cpu" or tensor.device == device)


class _Moved(NamedTuple):
    """A copy on another device, for as long as its original lives."""

    gone: weakref.ref[torch.Tensor]
    copy: torch.Tensor


class _Loan:
    """A block's tensors that a function at home is given."""

    def __init__(self, place: torch.device, home: torch.device, links: Links) -> None:
        self._place, self._home, self._links = place, home, links
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
                tensor.copy_(self._links.move(copy, self._place))

    def take_back(self, tensor: torch.Tensor) -> torch.Tensor:
        """What the block gets for a tensor that the function has given."""
        if id(tensor) in self._owned:
            return self._owned[id(tensor)]
        if isinstance(tensor, Away):
            return tensor.on(self._place)
        return self._links.move(tensor, self._place) if _may_be_on(tensor, self._home) else tensor

    def _copy(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
        ):  # Of others, torch does not count how often they are written to.
            copy = self._links.move(tensor, device)
        self._copies.append((tensor, copy, copy._version))
        return copy


class _Visit:
    """A block that runs: its device is current, and the containers among its arguments hold what is there.

    Args:
        device: the device.
        move: what is made of tensors.
        names: keys of dictionaries below which functions are changed too.
        wrap: what is made of those.
    """

    def __init__(
        self,
        device: torch.device,
        move: Change,
        names: Collection[str] = (),
        wrap: Callable[[Function], Function] = lambda function: function,
    ) -> None:
        self.device = device
        self._move, self._names, self._wrap = move, names, wrap
        self._containers: dict[int, _Container] = {}
        self._guard = torch.cuda.device(device) if device.type == "cuda" and torch.cuda.is_available() else None
        if self._guard is not None:
            self._guard.__enter__()

    def exchange_all(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Arguments with their tensors moved; whatever else holds tensors is changed in place until :meth:`end`."""
        return (
            tuple(self._exchange(value, own=not isinstance(value, dict)) for value in args),
            {name: self._exchange(value, own=not isinstance(value, dict)) for name, value in kwargs.items()},
        )

    def _exchange(self, value: Any, own: bool, named: bool = False) -> Any:
        """An argument or a part of one, which is ``own`` if no dictionary brought it, ``named`` if below a name."""
        if isinstance(value, torch.Tensor):
            return self._move(value)
        if isinstance(value, tuple):
            return _tuple_of(value, [self._exchange(item, own, named) for item in value])
        if named and callable(value) and not isinstance(value, type):
            return self._wrap(value)
        before = dict(_items(value)) if own or isinstance(value, (list, dict)) else {}
        if id(value) not in self._containers and (before or isinstance(value, (list, dict))):
            now: dict[Any, Any] = {}
            self._containers[id(value)] = _Container(value, before, now)
            for key, item in before.items():
                now[key] = self._exchange(item, own, named or key in self._names)
                if now[key] is not item:
                    _put(value, key, now[key])
        return value

    def end(self, change: Change) -> None:
        """The block is over: what was exchanged is as it was, and ``change`` is made to what the block has put in."""
        for container in self._containers.values():
            container.restore(change)
        if self._guard is not None:
            self._guard.__exit__(None, None, None)


class _Container(NamedTuple):
    """A list, dictionary or object among a block's arguments: what it held, and what it held while the block ran."""

    value: Any
    before: dict[Any, Any]
    now: dict[Any, Any]

    def restore(self, change: Change) -> None:
        known = {id(item) for item in self.before.values()}
        back = {id(now): before for now, before in zip(self.now.values(), self.before.values(), strict=True)}
        for key, item in _items(self.value):
            if id(item) not in known:
                _put(self.value, key, back[id(item)] if id(item) in back else _mapped(item, change))


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    """Places where tensors may be in a list, a dictionary or an object, or in what a function has closed over."""
    if isinstance(value, dict):
        yield from list(value.items())
    elif isinstance(value, list):
        yield from enumerate(list(value))
    elif isinstance(value, FunctionType):
        for number, cell in enumerate(value.__closure__ or ()):
            if isinstance(content := _content(cell), (torch.Tensor, tuple, list, FunctionType)):
                yield number, content
    elif not isinstance(value, (type, nn.Module)):
        names = [*getattr(value, "__dict__", ()), *getattr(type(value), "__slots__", ())]
        for name in names:
            if isinstance(item := getattr(value, name, None), (torch.Tensor, tuple, list, dict)):
                yield name, item


def _content(cell: CellType) -> Any:
    """None if nothing was assigned yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _put(value: Any, key: Any, item: Any) -> None:
    if isinstance(value, (list, dict)):
        value[key] = item
    elif isinstance(value, FunctionType):
        value.__closure__[key].cell_contents = item
    else:
        object.__setattr__(value, key, item)  # A dataclass may be frozen.


def _tuple_of(kind: tuple, items: list[Any]) -> tuple:
    if all(new is old for new, old in zip(items, kind, strict=True)):
        return kind
    return type(kind)(*items) if hasattr(kind, "_fields") else tuple(items)


def _mapped(value: Any, change: Change, seen: set[int] | None = None) -> Any:
    """``value`` with its tensors changed; whatever holds them stays the same object."""
    if isinstance(value, torch.Tensor):
        return change(value)
    seen = set() if seen is None else seen
    if isinstance(value, tuple):
        return _tuple_of(value, [_mapped(item, change, seen) for item in value])
    if id(value) not in seen:
        seen.add(id(value))
        for key, item in _items(value):
            if (changed := _mapped(item, change, seen)) is not item:
                _put(value, key, changed)
    return value


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
        return None if boundary is None else boundary._enter(device, args, kwargs)

    return hook


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
