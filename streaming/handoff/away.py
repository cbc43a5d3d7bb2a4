"""A tensor that is still on another device than the one where it seems to be.

[Note: home when somebody looks]
The output of a block on another device must come home, because the code between blocks works with tensors of its own
device. Mostly there is no such code: the next block gets what the last one returned, and if it runs on the same device
the way home and back would be for nothing. Which of the two it will be is not known beforehand, so a block returns an
:class:`Away`, which says of itself that it is at home. A computation with it makes it come home first, and computes
with the copy: torch's functions and methods arrive at ``__torch_function__`` whole, before anything is taken apart, so
the result is the same as with the copy from the start. C++ that calls torch arrives at ``__torch_dispatch__``. Only
questions for a shape or the like are answered without moving it. Once it has come home it is the copy, and the tensor
on the other device is forgotten: the copy may be written to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .views import View

Move = Callable[[torch.Tensor, torch.device], torch.Tensor]

# What is the same for a tensor and its copy on any device: asking for it moves nothing.
_METADATA = {getattr(torch.Tensor, name) for name in ("size", "stride", "dim", "numel", "element_size")}
_METADATA |= {
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "layout", "ndim", "nbytes", "requires_grad", "is_cuda", "is_cpu")
}


class Away(torch.Tensor):
    """Stands at home for ``there``, a tensor on another device (Note: home when somebody looks).

    Args:
        there: the tensor.
        place: the device on which it is. (A tensor does not show on which virtual device it is.)
        home: the device on which it seems to be.
        move: returns a copy of a tensor on a device, with the same strides.
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
        """Return the copy at home, which is made now if there is none yet."""
        if self._here is None:
            self._here, self._there, self._place = self._move(self._there, self._home), None, self._home
        return self._here

    def on(self, device: torch.device) -> torch.Tensor:
        """Return the tensor on ``device``, straight from where it is; this object stays as it is."""
        tensor = self._here if self._there is None else self._there
        return tensor if self._place == device else self._move(tensor, device)

    @property
    def place(self) -> torch.device:
        """The device on which it is: home, once it has come there."""
        return self._place

    @property
    def standing(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.device]:
        """What it stands for; to set this makes it stand for that again."""
        return self._there, self._here, self._place

    @standing.setter
    def standing(self, before: tuple[torch.Tensor | None, torch.Tensor | None, torch.device]) -> None:
        self._there, self._here, self._place = before

    def stands_for(self, tensor: torch.Tensor) -> bool:
        """Whether it is this very tensor, and has not come home."""
        return self._there is tensor

    def is_now(self, tensor: torch.Tensor, place: torch.device) -> None:
        """``tensor``, a copy on another device than home, was written to: this stands for it from now on. Where other
        code uses the memory of what it stood for, the new values are copied there."""
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
    """Whether it is on ``device``, as far as tensors show that: virtual devices are all the CPU to them."""
    return tensor.device.type == device.type and (device.type == "cpu" or tensor.device == device)


def _as_told(device: torch.device) -> torch.device:
    """As tensors name it: the CPU has no numbers."""
    return torch.device("cpu") if device.type == "cpu" else device


def at_home(value: Any) -> Any:
    """Arguments of a function of torch, which may be lists, with copies at home in the place of each :class:`Away`."""
    if isinstance(value, Away):
        return value.here()
    if isinstance(value, (list, tuple)) and any(isinstance(item, (Away, list, tuple)) for item in value):
        items = [at_home(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if type(value) is dict:
        return {name: at_home(item) for name, item in value.items()}
    return value
