"""The header of a safetensors file: which tensors it holds, and where.

A header is accepted if the safetensors library or ComfyUI's own parser accepts it. The latter reads any JSON, and each
tensor by itself, so there may be bytes that belong to no tensor, tensors that share bytes, and metadata of any kind.
"""

from __future__ import annotations

import json
import math
import reprlib
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CheckpointError
from ..estimating.dtypes import DTYPES

MAX_HEADER_BYTES = 100_000_000
_AGAIN = "The file is damaged or is no safetensors file; download it again."
_FIELDS = ("dtype", "shape", "data_offsets")


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; ``begin`` and ``end`` are bytes from the file's start."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def parse_header(path: str, raw: bytes, nbytes: int) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Return metadata and tensors, these in the order of the file, from the header of a file of ``nbytes`` bytes.

    Raises:
        CheckpointError: the header cannot be read, or names bytes that the file does not have.
    """
    try:
        tree = _read(raw)
        metadata = tree.pop("__metadata__", None)
        origin = 8 + len(raw)
        found = [_entry(name, info, origin) for name, info in tree.items()]
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    expected = max((entry.end for entry in found if entry.begin < entry.end), default=0)
    if expected > nbytes:
        raise CheckpointError(
            f"{path}: {nbytes} bytes found where the header says {expected}. It is truncated; download it again."
        )
    found.sort(key=lambda entry: (entry.begin, entry.end, entry.name))
    return metadata if isinstance(metadata, dict) else {}, {entry.name: entry for entry in found}


def _read(raw: bytes) -> dict[str, Any]:
    """Parse the header as JSON; if a name occurs twice, the last value counts."""
    try:
        tree = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the header is not valid JSON ({error}). {_AGAIN}") from None
    if type(tree) is not dict:
        raise ValueError(f"the header is not a JSON object. {_AGAIN}")
    return tree


def _entry(name: str, info: Any, origin: int) -> Entry:
    """Return the tensor as torch holds it; the header's offsets count from ``origin``."""
    kind, shape, begin, end = _fields(name, info)
    label = f"tensor {name!r} ({kind}, {reprlib.repr(list(shape))})"
    dtype_name, bits = DTYPES[kind]
    count = math.prod(shape)
    if count * bits != 8 * (end - begin):
        raise ValueError(
            f"{label} takes {_bytes(count * bits)} bytes, but its data_offsets hold {end - begin}. {_AGAIN}"
        )
    dtype = getattr(torch, dtype_name, None) if dtype_name else None
    if dtype is None:
        raise ValueError(f"{label} is of a dtype that this torch ({torch.__version__}) does not have")
    if kind == "F4":
        if shape[-1] % 2:
            raise ValueError(f"{label} needs an even last size: torch holds two elements in a byte")
        shape = (*shape[:-1], shape[-1] // 2)
    if count == 0:
        _check_torch_holds(label, shape)
        end = begin
    return Entry(name, dtype, shape, origin + begin, origin + end)


def _fields(name: str, info: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Return dtype, shape, begin and end, their types checked; like the library, accept a list of the three fields."""
    if type(info) is list and len(info) == len(_FIELDS):
        info = dict(zip(_FIELDS, info, strict=True))
    if type(info) is not dict:
        raise ValueError(f"tensor {name!r} is not described by a JSON object. {_AGAIN}")
    if lacking := [field for field in _FIELDS if field not in info]:
        raise ValueError(f"tensor {name!r} has no {' and no '.join(lacking)}. {_AGAIN}")
    dtype, shape, offsets = (info[field] for field in _FIELDS)
    if type(dtype) is dict and list(dtype.values()) == [None]:
        (dtype,) = dtype  # The library's other way to write a variant: {"F32": null}.
    if type(dtype) is not str or dtype not in DTYPES:
        raise ValueError(f"tensor {name!r} has the dtype {reprlib.repr(dtype)}, which nothing is known of here")
    if not _are_sizes(shape):
        raise ValueError(f"tensor {name!r} has the shape {reprlib.repr(shape)}, not a list of sizes. {_AGAIN}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise ValueError(f"tensor {name!r} has the data_offsets {reprlib.repr(offsets)}, not two offsets. {_AGAIN}")
    return dtype, tuple(shape), *offsets


def _are_sizes(value: Any) -> bool:
    return type(value) is list and all(type(item) is int and item >= 0 for item in value)


def _bytes(bits: int) -> str:
    """Return a number of bytes for people, halves included, but not one of 400 digits."""
    return f"{bits / 8:.15g}" if bits < 2**70 else "more than 2^67"


def _check_torch_holds(label: str, shape: tuple[int, ...]) -> None:
    """Raise if an empty tensor has sizes beyond torch's range; for one with bytes no file is long enough."""
    try:
        torch.empty(0, device="cpu").reshape(shape)
    except (RuntimeError, TypeError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{label} is of a shape that torch does not hold ({reason})") from None
