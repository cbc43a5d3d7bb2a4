"""A tensor that is still on another device than the one where everybody believes it to be.

[Note: home when somebody looks]
What a block on another device gives must come home, because the code between blocks works with tensors of its own
device. Mostly there is no such code: the next block gets what the last one gave, and if it runs on the same device the
way home and back would be for nothing. Nobody can tell beforehand which of the two it will be, so a block gives an
:class:`Away`. It says of itself that it is at home. Whoever computes with it has it come home first, and computes with
the copy: torch's functions and methods arrive at ``__torch_function__`` whole, before anything is taken apart, so what
is computed is what would have been computed with the copy from the start. C++ that calls torch arrives at
``__torch_dispatch__``. Only who asks for a shape or the like is answered without. Once it has come home it is the copy,
and what is there is forgotten: the copy may be written to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .views import View

Move = Callable[[torch.Tensor, torch.device], torch.Tensor]

# What is true of a tensor wherever it is, and of a copy of it: asking moves nothing.
_METADATA = {getattr(torch.Tensor, name) for name in ("size", "stride", "dim", "numel", "element_size")}
_METADATA |= {
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "layout", "ndim", "nbytes", "requires_grad", "is_cuda", "is_cpu")
}


class Away(torch.Tensor):
    """Stands at home for ``there``, a tensor on another device (Note: home when somebody looks).

    Args:
        there: the tensor.
        place: the device on which it is. (A virtual one cannot be told from a tensor.)
        home: the device on which it seems to be.
        move: gives a copy of a tensor on a device, with the same strides.
    """

    _there: torch.Tensor | None
    _place: torch.device
    _here: torch.Tensor | None
    _home: torch.device
    _move: Move

    @staticmethod
    def __new__(cls, there: torch.Tensor, place: torch.device, home: torch.device, move: Move) -> Away:
        away = torch.Tensor._make_wrapper_subclass(
            cls, there.size(), strides=there.stride(), dtype=there.dtype, layout=there.layout, device=_as_told(home)
        )
        away._there, away._here, away._place, away._home, away._move = there, None, place, home, move
        return away

    def here(self) -> torch.Tensor:
        """The copy at home."""
        if self._here is None:
            self._here, self._there, self._place = self._move(self._there, self._home), None, self._home
        return self._here

    def on(self, device: torch.device) -> torch.Tensor:
        """The tensor on ``device``, straight from where it is; this stays as it is."""
        tensor = self._here if self._there is None else self._there
        return tensor if self._place == device else self._move(tensor, device)

    @property
    def place(self) -> torch.device:
        """The device on which it is: home, once it has come there."""
        return self._place

    @property
    def standing(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.device]:
        """What it stands for, which it can be made to stand for again."""
        return self._there, self._here, self._place

    @standing.setter
    def standing(self, before: tuple[torch.Tensor | None, torch.Tensor | None, torch.device]) -> None:
        self._there, self._here, self._place = before

    def stands_for(self, tensor: torch.Tensor) -> bool:
        """Whether it is this very tensor, and has not come home."""
        return self._there is tensor

    def is_now(self, tensor: torch.Tensor, place: torch.device) -> None:
        """Somebody has written to a copy on another device than home: that is what this stands for from now on. Where
        others use the memory of what it stood for, they get it there."""
        if self._there is None:
            self._here.copy_(self._move(tensor, self._home))
            return
        view, self._there = View(self._there), None
        there = view.again()
        if there is None:
            self._there, self._place = tensor, place
        else:
            self._there = there.copy_(self._move(tensor, self._place))

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _METADATA:
                return func(*args, **(kwargs or {}))
            return func(*at_home(tuple(args)), **at_home(dict(kwargs or {})))

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return func(*at_home(tuple(args)), **at_home(dict(kwargs or {})))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Away({tuple(self.shape)}, {self.dtype}, on {self._place}, for {self._home})"


def may_be_on(tensor: torch.Tensor, device: torch.device) -> bool:
    """Whether it is on ``device``. Tensors do not tell of virtual ones, which are all the CPU."""
    return tensor.device.type == device.type and (device.type == "cpu" or tensor.device == device)


def _as_told(device: torch.device) -> torch.device:
    """As tensors name it: the CPU has no numbers."""
    return torch.device("cpu") if device.type == "cpu" else device


def at_home(value: Any) -> Any:
    """Arguments of a function of torch, which may be lists, with everything at home."""
    if isinstance(value, Away):
        return value.here()
    if isinstance(value, (list, tuple)) and any(isinstance(item, (Away, list, tuple)) for item in value):
        items = [at_home(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if type(value) is dict:
        return {name: at_home(item) for name, item in value.items()}
    return value
