"""Tensors of classes of their own: which plain tensors they consist of, and how they are put together again.

[Note: three forms]
A weight is a plain tensor; or it wraps others and has no memory of its own, as a quantised weight with its scales does
(``__tensor_flatten__`` is torch's protocol for that); or it has memory, and attributes beside it, as a weight from a
GGUF file does. Only the plain tensors of each are copied. What the class adds, a context or attributes, stays in host
memory, and a weight is put together with it once for each buffer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import UnsupportedModelError

PLAIN_CLASSES = (torch.Tensor, torch.nn.Parameter)


class Form(Protocol):
    """How plain tensors make a tensor."""

    def assemble(self, parts: Iterator[torch.Tensor]) -> torch.Tensor:
        """Take as many of ``parts`` as it needs, and return the tensor that they make, without a copy."""


@dataclass(frozen=True)
class PlainForm:
    """A plain tensor."""

    shape: torch.Size

    def assemble(self, parts: Iterator[torch.Tensor]) -> torch.Tensor:
        part = next(parts)
        return part if part.shape == self.shape else part.view(self.shape)


@dataclass(frozen=True)
class AttributesForm:
    """A tensor of a class of its own, with memory and attributes."""

    type: type[torch.Tensor]
    attributes: Mapping[str, Any] = field(repr=False)

    def assemble(self, parts: Iterator[torch.Tensor]) -> torch.Tensor:
        value = next(parts).as_subclass(self.type)
        value.__dict__.update(self.attributes)
        return value


@dataclass(frozen=True)
class WrapperForm:
    """A tensor that wraps others, which may do so too.

    Attributes:
        inner: the forms of what it wraps, by attribute.
        context: what its class needs beside them, opaque to us.
        size, stride: those that the tensor itself has.
    """

    type: type[torch.Tensor]
    inner: Mapping[str, Form]
    context: object = field(repr=False)
    size: torch.Size
    stride: tuple[int, ...]

    def assemble(self, parts: Iterator[torch.Tensor]) -> torch.Tensor:
        inner = {name: form.assemble(parts) for name, form in self.inner.items()}
        return self.type.__tensor_unflatten__(inner, self.context, self.size, self.stride)


@dataclass(frozen=True)
class OtherForm:
    """Another tensor in the place of a plain one, to which a patch has given another shape.

    It has device memory of its own, wherever the parts are.
    """

    tensor: torch.Tensor = field(repr=False)

    def assemble(self, parts: Iterator[torch.Tensor]) -> torch.Tensor:
        next(parts)
        return self.tensor


def take_apart(name: str, tensor: torch.Tensor) -> tuple[dict[str, torch.Tensor], Form]:
    """Return the plain tensors that ``tensor`` is made of, by their full names, and how they make it.

    Raises:
        UnsupportedModelError: it keeps its data in another way, or not densely.
    """
    if type(tensor) not in PLAIN_CLASSES:
        return _unwrap(name, tensor) if is_traceable_wrapper_subclass(tensor) else _strip(name, tensor)
    if tensor.layout != torch.strided:
        raise UnsupportedModelError(f"{name} has the layout {tensor.layout}; only dense tensors stream")
    return {name: tensor}, PlainForm(tensor.shape)


def _unwrap(name: str, tensor: torch.Tensor) -> tuple[dict[str, torch.Tensor], Form]:
    attributes, context = tensor.__tensor_flatten__()
    parts: dict[str, torch.Tensor] = {}
    inner: dict[str, Form] = {}
    for attribute in attributes:
        found, inner[attribute] = take_apart(f"{name}.{attribute}", getattr(tensor, attribute))
        parts |= found
    return parts, WrapperForm(type(tensor), inner, context, tensor.size(), tensor.stride())


def _strip(name: str, tensor: torch.Tensor) -> tuple[dict[str, torch.Tensor], Form]:
    # The class may have methods and properties of its own under any name, so torch's are called.
    with torch._C.DisableTorchFunctionSubclass():
        try:
            torch.Tensor.untyped_storage(tensor).data_ptr()
        except RuntimeError as error:
            kind = type(tensor).__name__
            raise UnsupportedModelError(f"{name} is a {kind}, which has no memory and no __tensor_flatten__") from error
        plain = torch.Tensor.as_subclass(tensor, torch.Tensor).detach()
    parts, _ = take_apart(name, plain)
    return parts, AttributesForm(type(tensor), dict(tensor.__dict__))
