"""In which dtype a tensor computes: the host notes it on its module, since a tensor that maps a file has the file's."""

from __future__ import annotations

import torch

# Behind the name of a parameter or buffer.
NOTE = "_comfy_model_dtype"
PLAIN = (torch.Tensor, torch.nn.Parameter)


def noted_dtype(module: torch.nn.Module, name: str) -> torch.dtype | None:
    """What is noted for this parameter or buffer; None where nothing is."""
    return getattr(module, f"{name}{NOTE}", None)


def note_dtypes(model: torch.nn.Module) -> None:
    """Note the dtypes that tensors have, where others are noted: somebody may have changed them since."""
    for module in model.modules():
        for name, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is not None and hasattr(module, f"{name}{NOTE}"):
                setattr(module, f"{name}{NOTE}", tensor.dtype)


def compute_as_noted(model: torch.nn.Module) -> None:
    """Cast tensors to the dtypes that are noted, for a loader that does not cast them when they compute."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                noted = noted_dtype(module, name)
                if noted not in (None, getattr(tensor, "dtype", None)) and type(tensor) in PLAIN:
                    tensors[name] = _like(tensor, tensor.data.to(noted))


def change_dtypes(model: torch.nn.Module, before: torch.dtype | None, after: torch.dtype | None) -> None:
    """Have what computes in ``before`` compute in ``after``, and all tensors in memory of their own. A layer that was
    made without a dtype computes in that of the whole, None if that is not known."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if type(tensor) not in PLAIN:
                    continue
                noted = noted_dtype(module, name)
                lazy = noted is None and hasattr(module, f"{name}{NOTE}")
                wanted = (before if lazy and tensor.is_floating_point() else noted) or tensor.dtype
                wanted = after if after is not None and wanted == before else wanted
                tensors[name] = _like(tensor, tensor.data.to(wanted, copy=True))
                setattr(module, f"{name}{NOTE}", wanted)


def _like(tensor: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    return torch.nn.Parameter(data, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else data
