"""Forward hooks that tell when a step and each streamed block begins and ends.

torch runs hooks marked ``always_call`` after an ``Exception`` too, but not after an interrupt of another kind (a
``BaseException``): who listens must be able to settle what such a one left behind.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import nn


class Listener(Protocol):
    """Who wants to know."""

    def begin_step(self) -> None: ...

    def end_step(self, completed: bool) -> None: ...

    def enter(self, index: int) -> None: ...

    def leave(self, index: int) -> None: ...


def attach(root: nn.Module, blocks: Iterable[tuple[int, nn.Module]], listener: Listener) -> list[Any]:
    """Hook ``root`` and the numbered ``blocks``, referring to the listener weakly; gives the handles to remove."""
    reference = weakref.ref(listener)
    handles = [
        root.register_forward_pre_hook(_call(reference, lambda who: who.begin_step()), prepend=True),
        root.register_forward_hook(_step_ends(reference), always_call=True),
    ]
    for index, block in blocks:
        handles.append(block.register_forward_pre_hook(_call(reference, _entering(index)), prepend=True))
        handles.append(block.register_forward_hook(_call(reference, _leaving(index)), always_call=True))
    return handles


def _call(reference: Callable[[], Listener | None], event: Callable[[Listener], None]) -> Callable[..., None]:
    def hook(*_: object) -> None:
        if (listener := reference()) is not None:
            event(listener)

    return hook


def _step_ends(reference: Callable[[], Listener | None]) -> Callable[..., None]:
    def hook(module: nn.Module, args: object, output: object) -> None:
        if (listener := reference()) is not None:
            listener.end_step(completed=output is not None)  # There is no output after an exception.

    return hook


def _entering(index: int) -> Callable[[Listener], None]:
    return lambda listener: listener.enter(index)


def _leaving(index: int) -> Callable[[Listener], None]:
    return lambda listener: listener.leave(index)
