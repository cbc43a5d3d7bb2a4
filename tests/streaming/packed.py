"""Weights as a pack for GGUF files holds them: a tensor of bytes that shows another shape, layers that unpack it, and
a patcher that leaves patches on the weight for the layer to apply.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import nn


class PackedTensor(torch.Tensor):
    """The bytes of a tensor in a GGUF file.

    Attributes:
        tensor_type: how they are packed.
        tensor_shape: the shape of the values, which ``shape`` shows.
        patches: what its layer changes of the values; pairs of a change and a name.
    """

    tensor_type: Kind
    tensor_shape: torch.Size
    patches: list[tuple[torch.Tensor, str]]

    @property
    def shape(self) -> torch.Size:
        return self.tensor_shape

    def to(self, *args: Any, **kwargs: Any) -> PackedTensor:
        return pack(super().to(*args, **kwargs), self.tensor_type, self.tensor_shape, list(self.patches))

    def detach(self) -> PackedTensor:
        return self

    def clone(self) -> PackedTensor:
        return self


def pack(
    data: torch.Tensor, kind: Kind, shape: torch.Size, patches: list[tuple[torch.Tensor, str]] | None = None
) -> PackedTensor:
    result = data.as_subclass(PackedTensor)
    result.tensor_type, result.tensor_shape, result.patches = kind, shape, patches or []
    return result


class PackedLinear(nn.Linear):
    """Unpacks its weight, and applies the patches on it, whenever it runs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, unpack(self.weight), unpack(self.bias))


def unpack(tensor: PackedTensor) -> torch.Tensor:
    assert type(tensor) is PackedTensor
    data = tensor.as_subclass(torch.Tensor).numpy()
    values = torch.from_numpy(gguf.quants.dequantize(data, tensor.tensor_type)).reshape(tensor.tensor_shape)
    for change, _ in tensor.patches:
        values = values + change
    return values


class WeightPatches:
    """Leaves each change on its weight, whose bytes stay as they are (:class:`streaming.Patches`)."""

    def __init__(self, changes: dict[str, torch.Tensor]) -> None:
        self.changes = changes

    def signature(self, name: str) -> object | None:
        return id(self.changes[name]) if name in self.changes else None

    def compute(self, name: str, original: PackedTensor) -> PackedTensor:
        patched = original.to("cpu")
        patched.patches = [(self.changes[name], name)]
        return patched


def packed_bytes(values: np.ndarray, kind: Kind) -> np.ndarray:
    """``values`` packed; for kinds that the package only unpacks, bytes at random with scales that are numbers."""
    if kind not in SCALES:
        return gguf.quants.quantize(values, kind)
    width, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(values.size).integers(0, 256, (values.size // width, size), np.uint8)
    for place in SCALES[kind]:
        blocks[:, place : place + 2] = np.frombuffer(np.float16(1e-3).tobytes(), np.uint8)
    return blocks.reshape(*values.shape[:-1], -1)


# Where in a block the scales of its scales are.
SCALES = {Kind.Q4_K: (0, 2), Kind.Q6_K: (208,)}


def write_gguf(path: Path, model: nn.Module, kind: Kind) -> None:
    """The model's tensors, with the matrices of its blocks packed, as a file."""
    writer = gguf.GGUFWriter(path, "test")
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if is_matrix(name, tensor):
            writer.add_tensor(name, packed_bytes(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def is_matrix(name: str, tensor: torch.Tensor) -> bool:
    return name.startswith("blocks.") and name.endswith(".weight") and tensor.dim() == 2


def load_gguf(path: Path, model: nn.Module, wrapped: bool) -> None:
    """Give ``model`` the file's tensors, views of the mapped file, and layers that unpack them.

    Args:
        wrapped: whether packed tensors become parameters, or stay bare.
    """
    for found in gguf.GGUFReader(path).tensors:
        shape = torch.Size(int(size) for size in reversed(found.shape))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            data = torch.from_numpy(found.data)
        module_name, _, attribute = found.name.rpartition(".")
        module = model.get_submodule(module_name)
        if isinstance(module, nn.Linear) and module_name.startswith("blocks."):
            module.__class__ = PackedLinear
            packed = pack(data, found.tensor_type, shape)
            module._parameters[attribute] = nn.Parameter(packed, requires_grad=False) if wrapped else packed
        else:
            getattr(module, attribute).data.copy_(data.reshape(shape))
