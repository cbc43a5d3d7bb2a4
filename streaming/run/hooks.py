"""Tells when a step, a block and a unit begin and end.

Blocks are entered by any of their methods (entries.py), and so are units that consist of several modules. A layer is
entered by a call alone; its other methods are about loading.

A model that is loaded again while its root is being called gets new hooks at that moment. torch still goes through the
previous hooks then, and calls them without keywords.

Ends are reported after an ``Exception`` too, but not after any other ``BaseException``, such as an interrupt: the
listener must be able to settle what that left behind.

[Note: compiled models]
torch.compile would trace through hooks. But what they do to streams, threads and clocks is no part of a graph, and what
they bind would take effect only when the graph ends. So hooks are hidden from it: a graph ends before each of them and
a new one begins behind it. With hooks on every layer little would be left to compile, and each layer would count as a
function that is compiled anew for every shape, which torch allows eight times. So a compiled model streams whole
blocks, and nothing inside of them is hooked: a block is one graph, as it is without streaming.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import nn

from ..model.entries import Entries, hidden


class Listener(Protocol):
    """Receives the begins and ends of steps, blocks and units."""

    def begin_step(self) -> None: ...

    def end_step(self, completed: bool) -> None: ...

    def enter_block(self, block: int) -> None: ...

    def leave_block(self, block: int) -> None: ...

    def enter_unit(self, unit: int) -> None: ...

    def leave_unit(self, unit: int) -> None: ...

    def recorded(self, block: int | None) -> None:
        """Gradients are recorded through ``block``, or through a step."""


class Hooks:
    """The hooks that tell one listener, to which they refer weakly.

    Those of layers are made once, however often they are attached: to hide one from torch.compile takes eleven objects,
    and thousands of new ones bring nearer that Python's collector looks through all (collector.py).
    """

    def __init__(self, listener: Listener) -> None:
        self._who = weakref.ref(listener)
        self._of_layers: dict[int, tuple[Callable[..., None], Callable[..., None]]] = {}

    def attach(
        self, root: nn.Module, blocks: Iterable[tuple[int, nn.Module]], units: Iterable[tuple[int, nn.Module]]
    ) -> Entries:
        """Watch ``root``, the numbered ``blocks`` and ``units``, until what this returns is removed.

        The end of a unit that raises is not reported, only that of its block.
        """
        who = self._who
        entries = Entries()
        entries.watch(root, _step_begins(who), _step_ends(who), methods=False)
        for number, module in blocks:
            entries.watch(module, _block_begins(who, number), _block_ends(who, number))
        for number, module in units:
            if any(True for _ in module.children()):  # Other methods of it are entries too.
                entries.watch(module, _unit_begins(who, number), _unit_ends(who, number), always_ends=False)
            else:
                entries.watch(module, *self._hooks_of_layer(number), always_ends=False, methods=False)
        return entries

    def _hooks_of_layer(self, unit: int) -> tuple[Callable[..., None], Callable[..., None]]:
        hooks = self._of_layers.get(unit)
        if hooks is None:
            hooks = hidden(_unit_begins(self._who, unit)), hidden(_unit_ends(self._who, unit))
            self._of_layers[unit] = hooks
        return hooks


# One closure for each event, and no common dispatcher: they run hundreds of times in every step.
Reference = Callable[[], "Listener | None"]


def _step_begins(who: Reference) -> Callable[..., None]:
    def hook(module: nn.Module, args: object, kwargs: object = None) -> None:
        if (listener := who()) is not None:
            listener.begin_step()

    return hook


def _step_ends(who: Reference) -> Callable[..., None]:
    def hook(module: nn.Module, args: object, output: object) -> None:
        if (listener := who()) is not None:
            listener.end_step(completed=output is not None)  # There is no output after an exception.
            if torch.is_grad_enabled() and _has_gradients(output):
                listener.recorded(None)

    return hook


def _block_begins(who: Reference, block: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: object, kwargs: object) -> None:
        if (listener := who()) is not None:
            listener.enter_block(block)

    return hook


def _block_ends(who: Reference, block: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: object, output: object) -> None:
        if (listener := who()) is not None:
            listener.leave_block(block)
            if torch.is_grad_enabled() and _has_gradients(output):
                listener.recorded(block)

    return hook


def _has_gradients(output: object) -> bool:
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else (output,)
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)


def _unit_begins(who: Reference, unit: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: object, kwargs: object) -> None:
        if (listener := who()) is not None:
            listener.enter_unit(unit)

    return hook


def _unit_ends(who: Reference, unit: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: object, output: object) -> None:
        if (listener := who()) is not None:
            listener.leave_unit(unit)

    return hook
