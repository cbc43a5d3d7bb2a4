"""Activations across a device boundary: a block on another device gets its inputs there, and what it gives comes home.

[Note: what moves]
Tensors among the arguments move, however deep in lists, tuples and dictionaries. Lists and dictionaries stay the same
objects, because code inside and around blocks writes to them: their tensors are exchanged while the block runs. What
several blocks on one device get, as rotary tables and masks, moves there once in a step: a copy is kept for as long as
its original lives, and until the step ends. Copies are compared by identity, so it counts on what a model passes to
several blocks not being written to between them; that no model of the host does so is tested with virtual devices, for
which copies are made too. What a block gives is :class:`Away`, and comes home when somebody looks at it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .away import Away
from .links import Links

# What is done to a tensor.
Change = Callable[[torch.Tensor], torch.Tensor]


class Boundary:
    """Runs some blocks of a model on other devices than its home.

    Args:
        home: where the model's inputs and outputs are, and everything that is in no block.
        links: copies between devices.
    """

    def __init__(self, home: torch.device, links: Links) -> None:
        self.home = home
        self._links = links
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
        visit = _Visit(device)
        self._visits.append(visit)
        move = _home if device == self.home else lambda tensor: self._bring(tensor, device)
        return visit.exchange(args, move), visit.exchange(dict(kwargs), move)

    def _leave(self, output: Any) -> Any:
        """A block ends; ``output`` is None after an exception."""
        visit = self._visits.pop()
        self._end(visit)
        return _mapped(output, self._sending(visit.device))

    def _end(self, visit: _Visit) -> None:
        visit.end(self._sending(visit.device))

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


class _Visit:
    """A block that runs: its device is current, and the containers among its arguments hold what is there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._containers: list[_Container] = []
        self._guard = torch.cuda.device(device) if device.type == "cuda" and torch.cuda.is_available() else None
        if self._guard is not None:
            self._guard.__enter__()

    def exchange(self, value: Any, move: Change) -> Any:
        """``value`` with its tensors moved; lists and dictionaries are changed in place until :meth:`end`."""
        if isinstance(value, torch.Tensor):
            return move(value)
        if isinstance(value, tuple):
            return _tuple_of(value, [self.exchange(item, move) for item in value])
        if isinstance(value, (list, dict)):
            before = dict(_items(value))
            now = {key: self.exchange(item, move) for key, item in before.items()}
            self._containers.append(_Container(value, before, now))
            for key, item in now.items():
                if item is not before[key]:
                    value[key] = item
        return value

    def end(self, change: Change) -> None:
        """The block is over: what was exchanged is as it was, and ``change`` is made to what the block has put in."""
        for container in self._containers:
            container.restore(change)
        if self._guard is not None:
            self._guard.__exit__(None, None, None)


class _Container(NamedTuple):
    """A list or dictionary among a block's arguments: what was in it, and what took its place while the block ran."""

    value: Any
    before: dict[Any, Any]
    now: dict[Any, Any]

    def restore(self, change: Change) -> None:
        known = {id(item) for item in self.before.values()}
        back = {id(now): before for now, before in zip(self.now.values(), self.before.values(), strict=True)}
        for key, item in _items(self.value):
            if id(item) not in known:
                self.value[key] = back[id(item)] if id(item) in back else _mapped(item, change)


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    """Places in a list or a dictionary, and what is there; nothing for anything else."""
    if isinstance(value, dict):
        yield from list(value.items())
    elif isinstance(value, list):
        yield from enumerate(list(value))


def _tuple_of(kind: tuple, items: list[Any]) -> tuple:
    if all(new is old for new, old in zip(items, kind, strict=True)):
        return kind
    return type(kind)(*items) if hasattr(kind, "_fields") else tuple(items)


def _mapped(value: Any, change: Change) -> Any:
    """``value`` with its tensors changed; lists and dictionaries stay the same objects."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple):
        return _tuple_of(value, [_mapped(item, change) for item in value])
    for key, item in _items(value):
        value[key] = _mapped(item, change)
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
