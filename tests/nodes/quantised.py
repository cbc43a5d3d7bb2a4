"""Checkpoints in the host's quantised formats, made of a plain one."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from comfy.quant_ops import QuantizedTensor
from safetensors.torch import load_file, save_file


@dataclass(frozen=True)
class Format:
    """How the matrices of a file's blocks are quantised.

    Attributes:
        name: as the file says it, layer by layer.
        layout: the host's class for it.
        options: for its quantisation.
        said: what else the file says.
    """

    name: str
    layout: str
    options: dict[str, Any] = field(default_factory=dict)
    said: dict[str, Any] = field(default_factory=dict)


ROTATED = {"convrot": True, "convrot_groupsize": 64}
FORMATS = {
    "fp8": Format("float8_e4m3fn", "TensorCoreFP8E4M3Layout", {"scale": "recalculate"}),
    "fp8-e5m2": Format("float8_e5m2", "TensorCoreFP8E5M2Layout", {"scale": "recalculate"}),
    "nvfp4": Format("nvfp4", "TensorCoreNVFP4Layout"),
    "mxfp8": Format("mxfp8", "TensorCoreMXFP8Layout"),
    "int8": Format("int8_tensorwise", "TensorWiseINT8Layout"),
    "int8-rotated": Format("int8_tensorwise", "TensorWiseINT8Layout", {"per_channel": True, **ROTATED}, ROTATED),
    "w4a4": Format("convrot_w4a4", "TensorCoreConvRotW4A4Layout"),
}


def write_quantised(plain: Path, path: Path, form: Format, only: str = "") -> None:
    """Write the tensors of ``plain`` to ``path``, the matrices of its blocks quantised, or ``only`` those named so."""
    tensors = {}
    for name, tensor in load_file(plain).items():
        if not (_is_matrix(name, tensor) and name.startswith(only)):
            tensors[name] = tensor
            continue
        quantised = QuantizedTensor.from_float(tensor, form.layout, **form.options)
        tensors |= {key: _storable(part) for key, part in quantised.state_dict(name).items()}
        said = json.dumps({"format": form.name, **form.said}).encode()
        tensors[name.replace(".weight", ".comfy_quant")] = torch.tensor(list(said), dtype=torch.uint8)
    save_file(tensors, path)


def write_scaled_fp8(plain: Path, path: Path) -> None:
    """The older format: a scale, an array of one number, for each matrix, and one mark for the whole file."""
    form = FORMATS["fp8"]
    tensors = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    for name, tensor in load_file(plain).items():
        tensors[name] = tensor
        if _is_matrix(name, tensor):
            quantised = QuantizedTensor.from_float(tensor, form.layout, **form.options)
            tensors[name] = quantised._qdata
            tensors[name.replace(".weight", ".scale_weight")] = quantised._params.scale.reshape(1)
    save_file(tensors, path)


def _is_matrix(name: str, tensor: torch.Tensor) -> bool:
    return "_blocks." in name and name.endswith(".weight") and tensor.dim() == 2


def _storable(tensor: torch.Tensor) -> torch.Tensor:
    """Files hold exponents alone as bytes."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e8m0fnu else tensor
