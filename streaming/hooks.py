"""Forward hooks that tell when a step, a block and a unit begin and end.

torch runs hooks marked ``always_call`` after an ``Exception`` too, but not after an interrupt of another kind (a
``BaseException``): who listens must be able to settle what such a one left behind.

[Note: compiled models]
torch.compile would trace through hooks: what they do to streams, threads and clocks is no part of a graph, and what
they bind would come into effect when the graph ends. So hooks are hidden from it: a graph ends before each of them and
a new one begins behind it. With hooks on every layer little would be left to compile, and each layer would count as a
function that is compiled anew for every shape, of which torch allows eight. So a compiled model streams whole blocks,
and nothing inside of them is hooked: a block is one graph, as it is without streaming.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import nn


class Listener(Protocol):
    """Who wants to know."""

    def begin_step(self) -> None: ...

    def end_step(self, completed: bool) -> None: ...

    def enter_block(self, block: int) -> None: ...

    def leave_block(self, block: int) -> None: ...

    def enter_unit(self, unit: int) -> None: ...

    def leave_unit(self, unit: int) -> None: ...


def attach(
    root: nn.Module,
    blocks: Iterable[tuple[int, nn.Module]],
    units: Iterable[tuple[int, nn.Module]],
    listener: Listener,
) -> list[Any]:
    """Hook ``root``, the numbered ``blocks`` and ``units``, referring to the listener weakly; gives handles to remove.

    A unit that raises is not told to have ended: the end of its block says so.
    """
    who = weakref.ref(listener)
    handles = _hook(root, _step_begins(who), _step_ends(who), always_call=True)
    for number, module in blocks:
        handles += _hook(module, _block_begins(who, number), _block_ends(who, number), always_call=True)
    for number, module in units:
        handles += _hook(module, _unit_begins(who, number), _unit_ends(who, number), always_call=False)
    return handles


def _hook(module: nn.Module, begins: Callable[..., None], ends: Callable[..., None], always_call: bool) -> list[Any]:
    hidden_begins, hidden_ends = torch.compiler.disable(begins), torch.compiler.disable(ends)  # Note: compiled models
    return [
        module.register_forward_pre_hook(hidden_begins, prepend=True),
        module.register_forward_hook(hidden_ends, always_call=always_call),
    ]


# One closure for each event, and no common dispatcher: they run hundreds of times in every step.
Reference = Callable[[], "Listener | None"]


def _step_begins(who: Reference) -> Callable[..., None]:
    def hook(module: nn.Module, args: object) -> None:
        if (listener := who()) is not None:
            listener.begin_step()

    return hook


def _step_ends(who: Reference) -> Callable[..., None]:
    def hook(module: nn.Module, args: object, output: object) -> None:
        if (listener := who()) is not None:
            listener.end_step(completed=output is not None)  # There is no output after an exception.

    return hook


def _block_begins(who: Reference, block: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: object) -> None:
        if (listener := who()) is not None:
            listener.enter_block(block)

    return hook


def _block_ends(who: Reference, block: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: object, output: object) -> None:
        if (listener := who()) is not None:
            listener.leave_block(block)

    return hook


def _unit_begins(who: Reference, unit: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: object) -> None:
        if (listener := who()) is not None:
            listener.enter_unit(unit)

    return hook


def _unit_ends(who: Reference, unit: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: object, output: object) -> None:
        if (listener := who()) is not None:
            listener.leave_unit(unit)

    return hook
