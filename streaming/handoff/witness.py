"""Tells which memory at home is read and written to between the blocks of a model.

[Note: the witness between blocks]
Between blocks a model computes next to nothing, and patches may compute anything. A mode of torch's dispatcher sees
each operation there, whichever code asks for it, for some microseconds each. Within blocks it would cost as much for
each of thousands of operations, so it is taken off while a block runs. Other code may put modes of its own around
blocks in a step, and takes them off in the order of a stack, whatever is on top. So the witness is put beneath all
modes that were put on since the step began, and is taken off for a block only where nothing is on top of it. Otherwise
it stays on, which is slow but right.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode,
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)

from ..errors import StreamingError
from .away import Away

# Called with a tensor, and whether it is written to.
Touched = Callable[[torch.Tensor, bool], None]


class Witness(TorchDispatchMode):
    """Tells of the tensors of each operation, before it runs, for as long as it is on."""

    def __init__(self, touched: Touched) -> None:
        super().__init__()
        self._touched = touched
        self._is_on = False
        self._beneath: list[Any] | None = None

    def begin(self) -> None:
        """A step begins: modes that are put on from now on last no longer than it."""
        self._beneath = _get_current_dispatch_mode_stack()

    def on(self) -> bool:
        """Put it on; returns whether it was off before."""
        if self._is_on:
            return False
        above = []
        while self._beneath is not None and len(now := _get_current_dispatch_mode_stack()) > len(self._beneath):
            _pop_mode()
            above.append(now[-1])
        for mode in (self, *reversed(above)):
            _push_mode(mode)
        self._is_on = True
        return True

    def off(self) -> bool:
        """Take it off for a while, unless another mode is on top of it; returns whether it was taken off.

        Raises:
            StreamingError: other code has taken it off.
        """
        if not self._is_on:
            return False
        if self not in (now := _get_current_dispatch_mode_stack()):
            self._is_on = False
            raise StreamingError(
                "a mode of torch's dispatcher that was put on before a step was taken off in it, and so nobody has "
                "seen what was written between blocks on several devices; run the model on one, or without that mode"
            )
        if now[-1] is not self:
            return False
        _pop_mode()
        self._is_on = False
        return True

    def remove(self) -> None:
        """Take it off for good, wherever it is."""
        self._beneath = None
        if not self._is_on:
            return
        self._is_on = False
        if self not in _get_current_dispatch_mode_stack():
            return  # Other code has taken it off in the place of a mode of its own.
        above = []
        while (mode := _get_current_dispatch_mode()) is not self:
            _pop_mode()
            above.append(mode)
        _pop_mode()
        for mode in reversed(above):
            _push_mode(mode)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = _written_by(operation)
        for place, value in (*enumerate(args), *kwargs.items()):
            for tensor in _tensors(value):
                self._touched(tensor, place in written)
        return operation(*args, **kwargs)


@functools.cache
def _written_by(operation: Any) -> frozenset[int | str]:
    """Places and names of the arguments that an operation writes to."""
    arguments = operation._schema.arguments if isinstance(operation, torch._ops.OpOverload) else ()
    return frozenset(
        key
        for place, argument in enumerate(arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
        for key in (place, argument.name)
    )


def _tensors(value: Any) -> Iterable[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return () if isinstance(value, Away) else (value,)
    if isinstance(value, (list, tuple)):
        return [item for item in value if isinstance(item, torch.Tensor) and not isinstance(item, Away)]
    return ()
