"""What modules hold while no copy of ours is bound, and how it is noticed that somebody has written to it.

[Note: who has written]
ComfyUI changes a model by writing to its weights, exchanging them, or exchanging modules; what is there when it loads
the model counts. So each tensor that we put into a module can tell whether it is as we have left it. A tensor counts
what is written to it and to views of it (``_version``), except through ``data`` and numpy, which hand out its memory
without its counter: a class of ours notes that somebody has asked for these, and the bytes are compared then
(changes.py). Each such tensor has a counter of its own, which torch only gives to ``data`` of another; and inference
tensors have none, so the same memory is put into a tensor that is not one. What computes on a device must be of torch's
own classes: there sums of the bytes tell (sums.py).

[Note: stand-ins]
A weight that is cast on its way to the device exists nowhere in the dtype in which modules have it with the host's own
loader, and memory for that would be a second model. So modules hold a stand-in, which knows shape, dtype and device.
When somebody asks for more, the values are made once, and the stand-in passes everything on to them; they take its
place when modules are pointed at it again. The same stands in for what a system maps read-only: a write to that would
end the process.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from .contents import read_tensor
from .layout import TensorSpec, Value

_data = torch.Tensor.data


class _HandedOut:
    """Counts how often memory of any watched tensor was handed out without its counter."""

    count = 0


handed_out = _HandedOut()


class Watched:
    """A tensor of host memory that is as we have left it, or not (Note: who has written).

    Attributes:
        spec: what its bytes are while nobody has written to it.
    """

    spec: TensorSpec
    _stamp = 0
    _handed_out = False

    @property
    def changed(self) -> bool:
        """Whether somebody has written to it, or may have."""
        return self._handed_out or self.written

    @property
    def written(self) -> bool:
        """Whether somebody has written to it in a way that torch counts."""
        return self._version != self._stamp

    def _hand_out(self) -> None:
        self._handed_out = True
        handed_out.count += 1

    def settle(self) -> None:
        """It was compared, and is as it was."""
        self._handed_out, self._stamp = False, self._version

    @property
    def data(self) -> torch.Tensor:
        self._hand_out()
        return _data.__get__(self)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        self._hand_out()
        _data.__set__(self, value)

    def numpy(self, *args: Any, **options: Any) -> Any:
        self._hand_out()
        return super().numpy(*args, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """A copy is nobody's but its maker's, of torch's own classes."""
        memo[id(self)] = copied = plain(self, copy=True)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return plain(self).__reduce_ex__(protocol)


class WatchedParameter(Watched, nn.Parameter):
    """A parameter."""


class WatchedBuffer(Watched, torch.Tensor):
    """A buffer. What is computed of it is a plain tensor, as of a parameter."""

    __torch_function__ = torch._C._disabled_torch_function_impl


def watch(tensor: torch.Tensor, spec: TensorSpec, is_parameter: bool) -> torch.Tensor:
    """The same memory as a :class:`Watched` with a counter of its own."""
    with torch.inference_mode(False):
        plain = counted(tensor)
        watched = WatchedParameter(plain, False) if is_parameter else plain.as_subclass(WatchedBuffer)
        watched.spec, watched._stamp = spec, watched._version
        return watched


def counted(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a plain tensor as one with a counter of its own. Outside of inference mode."""
    if not tensor.is_inference():
        return _data.__get__(tensor)
    if tensor.is_meta:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    fresh = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return fresh.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


# -- stand-ins -------------------------------------------------------------------------------------------------------


class _Values:
    """The values behind a stand-in and its aliases.

    Attributes:
        spec: what they are, in the dtype that modules show.
        run_as: what was laid out.
        is_parameter: whether modules hold a parameter.
        real: the values, once somebody has asked for them.
    """

    def __init__(self, spec: TensorSpec, run_as: TensorSpec, is_parameter: bool) -> None:
        self.spec, self.run_as, self.is_parameter = spec, run_as, is_parameter
        self.real: torch.Tensor | None = None

    def get(self) -> torch.Tensor:
        if self.real is None:
            with torch.inference_mode(False):
                self.real = watch(read_tensor(self.spec), self.run_as, self.is_parameter)
        return self.real

    def assign(self, tensor: torch.Tensor) -> None:
        """Somebody has set ``data``. The new one may have another shape or dtype."""
        with torch.inference_mode(False):
            self.real = watch(tensor.detach(), self.run_as, self.is_parameter)
        self.real._hand_out()


class StandIn(torch.Tensor):
    """Stands for a tensor that does not exist yet in its shape and dtype (Note: stand-ins)."""

    _values: _Values

    @staticmethod
    def __new__(cls, values: _Values, is_parameter: bool = False) -> StandIn:
        spec = values.spec
        made = torch.Tensor._make_wrapper_subclass(cls, spec.shape, strides=spec.stride, dtype=spec.dtype, device="cpu")
        made._values = values
        if is_parameter:
            made._is_param = True
        return made

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _SHOWN and args[0]._values.real is None:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        if function in _OWN:
            return _OWN[function](*args, **kwargs)
        return function(*tree_map(_real, args), **tree_map(_real, kwargs))

    @classmethod
    def __torch_dispatch__(cls, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What is not called from Python comes here."""
        return function(*tree_map(_real, args), **tree_map(_real, kwargs or {}))


def _real(value: Any) -> Any:
    return value._values.get() if isinstance(value, StandIn) else value


def _alias(one: StandIn) -> torch.Tensor:
    if one._values.real is not None:
        return one._values.real.detach()
    with torch.inference_mode(False):
        return StandIn(one._values)


def _assign(one: StandIn, tensor: torch.Tensor) -> None:
    one._values.assign(_real(tensor))


def _require_grad(one: StandIn, requires_grad: bool = True) -> torch.Tensor:
    return one._values.get().requires_grad_() if requires_grad else one


# What a stand-in knows by itself.
_METHODS = ("size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "storage_offset", "__len__")
_METHODS += ("is_contiguous", "is_floating_point", "is_complex", "is_inference")
_ATTRIBUTES = ("dtype", "shape", "device", "layout", "ndim", "itemsize", "nbytes", "requires_grad", "grad", "grad_fn")
_ATTRIBUTES += ("is_leaf", "is_meta", "is_cuda", "is_cpu", "is_mps", "is_xpu", "is_quantized", "is_sparse", "is_nested")
_SHOWN = {getattr(torch.Tensor, name) for name in _METHODS}
_SHOWN |= {getattr(torch.Tensor, name).__get__ for name in _ATTRIBUTES}

# What is more than a function of its values.
_OWN: dict[Callable, Callable] = {
    torch.Tensor.detach: _alias,
    torch.Tensor.requires_grad_: _require_grad,
    torch.Tensor.numpy: lambda one, *args, **options: one._values.get().numpy(*args, **options),
    torch.Tensor.__deepcopy__: lambda one, memo: copy.deepcopy(one._values.get(), memo),
    torch.Tensor.__reduce_ex__: lambda one, protocol: one._values.get().__reduce_ex__(protocol),
    _data.__get__: lambda one, *_: one._values.get().data,
    _data.__set__: _assign,
}


# -- what modules show -----------------------------------------------------------------------------------------------


def shown(value: Value) -> torch.Tensor:
    """What modules hold of ``value`` while no copy of it is bound."""
    if value.showing.tensor is None:
        with torch.inference_mode(False):
            value.showing.tensor = _show(value)
    return settled(value.showing.tensor)


def settled(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a stand-in, where somebody has asked for them."""
    if isinstance(tensor, StandIn) and tensor._values.real is not None:
        return tensor._values.real
    return tensor


def is_shown(tensor: torch.Tensor) -> bool:
    """Whether it is one that we have put into a module, which computes nothing on a device."""
    return isinstance(tensor, (StandIn, Watched))


def laid_out(tensor: torch.Tensor) -> TensorSpec | None:
    """What was laid out of a tensor that is as we have left it; None for any other."""
    tensor = settled(tensor)
    if isinstance(tensor, StandIn):
        return tensor._values.run_as
    return tensor.spec if isinstance(tensor, Watched) and not tensor.changed else None


def plain(tensor: torch.Tensor, copy: bool = False) -> torch.Tensor:
    """The memory of a watched tensor, or a copy, as one of torch's own classes; another tensor as it is."""
    tensor = settled(tensor)
    if not isinstance(tensor, Watched):
        return tensor
    with torch.inference_mode(False):
        own = _data.__get__(tensor)
        own = own.clone() if copy else own
        return nn.Parameter(own, requires_grad=False) if isinstance(tensor, nn.Parameter) else own


def _show(value: Value) -> torch.Tensor:
    if not value.is_plain or not value.places:
        return value.original
    (spec,) = value.specs
    original = spec.original
    as_it_is = value.shown_dtype == original.dtype and not original.is_meta
    if as_it_is and getattr(spec.source, "writable", True):
        return watch(original, spec, value.is_parameter)
    return StandIn(_Values(spec.in_dtype(value.shown_dtype), spec, value.is_parameter), value.is_parameter)
