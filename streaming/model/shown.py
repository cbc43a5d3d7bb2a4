"""What modules hold while no copy of ours is bound, and how writes to it are noticed.

[Note: who has written]
ComfyUI changes a model by writing to its weights, replacing them, or replacing modules; what is there when it loads the
model counts. So each tensor that we put into a module can tell whether it is as we left it. A tensor counts the writes
to it and to most views of it (``_version``). But ``data``, numpy, DLPack, storages and pointers hand out its memory
without its counter, and so do some views in inference mode. So our class looks at what functions return: views are of
the class too, and a tensor whose memory is in any other result counts as handed out, and its bytes are compared then
(changes.py). Only ``torch.utils.dlpack.to_dlpack`` asks no class.

Each such tensor has a counter of its own, which torch only gives to ``data`` of another; inference tensors have none,
so their memory is put into a tensor that is not one. It has a storage of its own too, for code that writes to a storage
from its begin on. What computes on a device must be of torch's own classes: there sums tell (sums.py).

[Note: stand-ins]
A weight that is cast on its way to the device exists nowhere in the dtype in which modules have it with the host's own
loader, and memory for that would be a second model. So modules hold a stand-in, which knows shape, dtype and device.
When code asks for more, the values are made once, and the stand-in passes everything on to them; they take its place
when modules are pointed at it again. A stand-in also replaces what a system maps read-only: a write to that would end
the process.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from .contents import read_tensor
from .layout import TensorSpec, Value

_data = torch.Tensor.data


class Watched(torch.Tensor):
    """A tensor in host memory that knows whether it is as we left it (Note: who has written), or a view of one, which
    answers for that one. What is computed from them is plain tensors.

    Attributes:
        spec: what its bytes are unless they were written to; None for a view of something else than the whole.
        counter: a plain tensor with the same counter, which is quicker to ask.
    """

    spec: TensorSpec | None
    counter: torch.Tensor
    _origin: Watched | None = None
    _stamp = 0
    _handed_out = False

    @property
    def origin(self) -> Watched:
        """The tensor that it is a view of; itself otherwise. (It has no reference to itself: memory would stay until
        the garbage collector comes.)"""
        return self if self._origin is None else self._origin

    @property
    def changed(self) -> bool:
        """Whether it was written to, or may have been."""
        return self.origin._handed_out or self.written

    @property
    def written(self) -> bool:
        """Whether it was written to in a way that torch counts."""
        return self.counter._version != self.origin._stamp

    def settle(self) -> None:
        """Count it as unchanged: it was compared, and is as it was."""
        self._handed_out, self._stamp = False, self.counter._version

    def hand_out(self) -> None:
        """Count it as handed out: other code has its memory, and may write to it uncounted."""
        self.origin._handed_out = True

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
            quiet = not _takes_memory(function)
            if quiet and isinstance(result, _VALUES):
                return result
            for one in tree_leaves((args, kwargs)):
                if isinstance(one, Watched) and quiet:
                    result = tree_map(partial(_followed, one, function), result)
                elif isinstance(one, Watched):
                    one.hand_out()
        return result

    @property
    def data(self) -> torch.Tensor:
        self.hand_out()
        return memory_of(self)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        self.leave_origin()
        with torch._C.DisableTorchFunctionSubclass():
            _data.__set__(self, value)

    def set_(self, *args: Any, **options: Any) -> Watched:
        self.leave_origin()
        with torch._C.DisableTorchFunctionSubclass():
            return super().set_(*args, **options)

    def leave_origin(self) -> None:
        """Be no view from now on, because it gets other memory."""
        self._origin = None
        self.hand_out()

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """Return a copy of torch's own classes, which is not watched."""
        memo[id(self)] = copied = plain(self, copy=True)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return plain(self).__reduce_ex__(protocol)


# Functions that give access to the memory, but not by an object that they return.
_POINTERS = {torch.Tensor.data_ptr, torch.Tensor.share_memory_, _data.__set__}

# Functions that return a view without the counter. So do operators below autograd, from where a stand-in calls them,
# and some functions in inference mode, which return inference tensors.
_OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
_UNCOUNTED = {_data.__get__}
_UNCOUNTED |= {
    getattr(owner, name)
    for owner in (torch, torch.Tensor)
    for name in ("unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes")
    if hasattr(owner, name)
}

# Results that hold no memory of a tensor.
_VALUES = (int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.Size, type(None))


def _takes_memory(function: Callable) -> bool:
    """Whether it may keep or write to its arguments' memory, whatever it returns; other libraries' operators may."""
    return function in _POINTERS or (isinstance(function, _OPERATORS) and not str(function).startswith("aten."))


def _followed(one: Watched, function: Callable, found: Any) -> Any:
    """Return ``found``, which ``function`` has made of ``one``, watched too if it is a view with the same counter. For
    anything else that has its memory, ``one`` counts as handed out."""
    if isinstance(found, (Watched, *_VALUES)) or (isinstance(found, torch.Tensor) and not _share(found, one)):
        return found
    is_counted = function not in _UNCOUNTED and not isinstance(function, _OPERATORS)
    if is_counted and type(found) is torch.Tensor and not found.is_inference():
        view = found.as_subclass(Watched)
        view.spec = one.spec if function is torch.Tensor.detach else None
        view._origin, view.counter = one.origin, one.counter
        return view
    one.hand_out()
    return found


def _share(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether they use the same memory."""
    try:
        return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # One without a storage.
        return False


def watch(tensor: torch.Tensor, spec: TensorSpec, is_parameter: bool) -> Watched:
    """Return the same memory as a :class:`Watched` with a counter of its own."""
    with torch.inference_mode(False):
        counter = counted(tensor)
        watched = counter.as_subclass(Watched)
        watched.spec, watched.counter = spec, counter
        if is_parameter:
            watched._is_param = True  # What torch.nn.Parameter does to a tensor of another class.
        watched._stamp = counter._version
        return watched


def apart(tensor: torch.Tensor) -> torch.Tensor:
    """Return the memory of a plain tensor as a storage of its own, if it has no gaps. Not for inference mode."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    if tensor.numel() == 0 or sum((size - 1) * stride for size, stride in steps) + 1 != tensor.numel():
        return tensor
    raw = counted(tensor).as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    return torch.from_numpy(raw.numpy()).view(tensor.dtype).as_strided(tensor.shape, tensor.stride())


def memory_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the memory of a tensor for our own use: this does not count as handed out."""
    if not isinstance(tensor, Watched):
        return _data.__get__(tensor)
    with torch._C.DisableTorchFunctionSubclass():
        return _data.__get__(tensor)


def counted(tensor: torch.Tensor) -> torch.Tensor:
    """Return the memory of a plain tensor as a tensor with a counter of its own. Not for inference mode."""
    if not tensor.is_inference():
        return memory_of(tensor)
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
        real: the values, once they were needed.
    """

    def __init__(self, spec: TensorSpec, run_as: TensorSpec, is_parameter: bool) -> None:
        self.spec, self.run_as, self.is_parameter = spec, run_as, is_parameter
        self.real: Watched | None = None

    def get(self) -> Watched:
        if self.real is None:
            with torch.inference_mode(False):
                self.real = watch(read_tensor(self.spec), self.run_as, self.is_parameter)
        return self.real

    def again(self) -> _Values:
        """Return separate values for an alias that is about to differ."""
        values = _Values(self.spec, self.run_as, self.is_parameter)
        values.real = self.get().detach()
        return values

    def assign(self, tensor: torch.Tensor) -> None:
        """Take ``tensor``, which was set as ``data``, and may have another shape or dtype."""
        with torch.inference_mode(False):
            self.real = watch(tensor.detach(), self.run_as, self.is_parameter)
        self.real.hand_out()


class StandIn(torch.Tensor):
    """Stands for a tensor that does not exist yet in its shape and dtype (Note: stand-ins)."""

    _values: _Values
    _is_alias = False

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

    def set_(self, *args: Any, **options: Any) -> StandIn:
        _own_values(self).get().set_(*map(_real, args), **options)
        return self

    @classmethod
    def __torch_dispatch__(cls, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls that do not come from Python arrive here."""
        return function(*tree_map(_real, args), **tree_map(_real, kwargs or {}))


def _real(value: Any) -> Any:
    return value._values.get() if isinstance(value, StandIn) else value


def _alias(one: StandIn) -> torch.Tensor:
    with torch.inference_mode(False):
        alias = StandIn(one._values)
        alias._is_alias = True
        return alias


def _own_values(one: StandIn) -> _Values:
    """Return the values of a stand-in that is about to change, apart from those of what it is an alias of."""
    if one._is_alias:
        one._values, one._is_alias = one._values.again(), False
    return one._values


def _assign(one: StandIn, tensor: torch.Tensor) -> None:
    _own_values(one).assign(_real(tensor))


def _require_grad(one: StandIn, requires_grad: bool = True) -> torch.Tensor:
    if requires_grad:
        _own_values(one).get().requires_grad_()
    return one


# What a stand-in knows by itself.
_METHODS = ("size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "storage_offset", "__len__")
_METHODS += ("is_contiguous", "is_floating_point", "is_complex", "is_inference")
_ATTRIBUTES = ("dtype", "shape", "device", "layout", "ndim", "itemsize", "nbytes", "requires_grad", "grad", "grad_fn")
_ATTRIBUTES += ("is_leaf", "is_meta", "is_cuda", "is_cpu", "is_mps", "is_xpu", "is_quantized", "is_sparse", "is_nested")
_SHOWN = {getattr(torch.Tensor, name) for name in _METHODS}
_SHOWN |= {getattr(torch.Tensor, name).__get__ for name in _ATTRIBUTES}

# Functions that need more than its values.
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
    """Return what modules hold of ``value`` while no copy of it is bound."""
    if value.showing.tensor is None:
        with torch.inference_mode(False):
            value.showing.tensor = _show(value)
    return settled(value.showing.tensor)


def settled(tensor: torch.Tensor) -> torch.Tensor:
    """Return the values of a stand-in if they were made, or the origin of a view of the whole; else ``tensor``."""
    if isinstance(tensor, StandIn) and tensor._values.real is not None:
        tensor = tensor._values.real
    return tensor.origin if isinstance(tensor, Watched) and tensor.spec is not None else tensor


def is_shown(tensor: torch.Tensor) -> bool:
    """Whether it is a tensor that we put into a module to show, and that computes nothing on a device."""
    return isinstance(tensor, (StandIn, Watched))


def laid_out(tensor: torch.Tensor) -> TensorSpec | None:
    """Return the spec that was laid out for a tensor of ours that is as we left it; None for any other tensor."""
    tensor = settled(tensor)
    if isinstance(tensor, StandIn):
        return tensor._values.run_as
    return tensor.spec if isinstance(tensor, Watched) and not tensor.changed else None


def plain(tensor: torch.Tensor, copy: bool = False) -> torch.Tensor:
    """Return the memory of a watched tensor, or a copy, in one of torch's own classes; another tensor as it is."""
    tensor = settled(tensor)
    if not isinstance(tensor, Watched):
        return tensor
    with torch.inference_mode(False):
        own = memory_of(tensor)
        own = own.clone() if copy else own
        return nn.Parameter(own, requires_grad=False) if isinstance(tensor, nn.Parameter) else own


def _show(value: Value) -> torch.Tensor:
    if not value.is_plain or not value.places:
        return value.original
    (spec,) = value.specs
    original = spec.original
    as_it_is = value.shown_dtype == original.dtype and not original.is_meta
    if as_it_is and getattr(spec.source, "writable", True):
        return watch(apart(original), spec, value.is_parameter)
    return StandIn(_Values(spec.in_dtype(value.shown_dtype), spec, value.is_parameter), value.is_parameter)
