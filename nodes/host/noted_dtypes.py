"""The dtype in which a tensor computes. The host notes it on the module: a tensor that maps a file has the file's."""

from __future__ import annotations

import torch

# The suffix, behind the name of a parameter or buffer, of the attribute that holds its noted dtype.
NOTE = "_comfy_model_dtype"
PLAIN = (torch.Tensor, torch.nn.Parameter)


def noted_dtype(module: torch.nn.Module, name: str) -> torch.dtype | None:
    """Return the dtype that is noted for this parameter or buffer; None if there is none."""
    return getattr(module, f"{name}{NOTE}", None)


def note_dtypes(model: torch.nn.Module) -> None:
    """Replace noted dtypes by those that the tensors have now: somebody may have changed them since."""
    for module in model.modules():
        for name, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is not None and hasattr(module, f"{name}{NOTE}"):
                setattr(module, f"{name}{NOTE}", tensor.dtype)


def compute_as_noted(model: torch.nn.Module) -> None:
    """Cast tensors to their noted dtypes, for a model whose tensors nothing casts when they compute."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                noted = noted_dtype(module, name)
                if noted not in (None, getattr(tensor, "dtype", None)) and type(tensor) in PLAIN:
                    tensors[name] = _like(tensor, tensor.data.to(noted))


def change_dtypes(model: torch.nn.Module, before: torch.dtype | None, after: torch.dtype | None) -> None:
    """Have what computes in ``before`` compute in ``after``, and copy all tensors to memory of their own. A layer that
    was made without a dtype computes in ``before``, the dtype of the whole, which is None if it is not known."""
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
