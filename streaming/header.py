"""The header of a safetensors file: which tensors it holds, and where. What is accepted is what the library accepts."""

from __future__ import annotations

import json
import math
import re
import reprlib
from dataclasses import dataclass
from typing import Any

import torch

from .errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
_AGAIN = "The file is damaged or is no safetensors file; download it again."
_FIELDS = ("dtype", "shape", "data_offsets")
_MAX_DEPTH = 127
_MAX_SIZE = 2**64 - 1
_SURROGATE = re.compile("[\ud800-\udfff]")
# The format's name of a dtype: torch's name (None: torch has nothing like it) and the bits of one element.
_DTYPES: dict[str, tuple[str | None, int]] = {
    "BOOL": ("bool", 8),
    "F4": ("float4_e2m1fn_x2", 4),
    "F6_E2M3": (None, 6),
    "F6_E3M2": (None, 6),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "I16": ("int16", 16),
    "U16": ("uint16", 16),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "I32": ("int32", 32),
    "U32": ("uint32", 32),
    "F32": ("float32", 32),
    "C64": ("complex64", 64),
    "F64": ("float64", 64),
    "I64": ("int64", 64),
    "U64": ("uint64", 64),
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; ``begin`` and ``end`` are bytes from the file's start."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class _Info:
    """What the header says of a tensor, its types checked, nothing else; offsets from the start of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def parse_header(path: str, raw: bytes, nbytes: int) -> tuple[dict[str, str], dict[str, Entry]]:
    """Metadata and tensors, in the order of the file, of a header that stands in a file of ``nbytes`` bytes."""
    try:
        metadata, infos = _read(raw)
        origin, position = 8 + len(raw), 0
        entries = {}
        for info in sorted(infos.values(), key=lambda info: (info.begin, info.end, info.name)):
            if info.begin != position:
                raise ValueError(
                    f"tensor {info.name!r} has the bytes {info.begin} to {info.end} of the data where its bytes "
                    f"should begin at {position}: tensors overlap or leave a hole. {_AGAIN}"
                )
            entries[info.name] = _entry(info, origin)
            position = info.end
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if origin + position != nbytes:
        fault = "It is truncated" if nbytes < origin + position else "It has bytes that belong to no tensor"
        raise CheckpointError(
            f"{path}: {nbytes} bytes found where the header says {origin + position}. {fault}; download it again."
        )
    return metadata, entries


def _read(raw: bytes) -> tuple[dict[str, str], dict[str, _Info]]:
    """The header as JSON; an object is a tuple of pairs here, as a name may occur twice."""
    try:
        tree = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=tuple,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_no_constant,
        )
        _check_text(tree, 1)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the header is not valid JSON ({error}). {_AGAIN}") from None
    if type(tree) is not tuple:
        raise ValueError(f"the header is not a JSON object. {_AGAIN}")
    metadata: dict[str, str] | None = None
    infos: dict[str, _Info] = {}
    for name, value in tree:
        if name != "__metadata__":
            infos[name] = _info(name, value)
        elif metadata is not None:
            raise ValueError(f"the header has __metadata__ twice. {_AGAIN}")
        else:
            metadata = _metadata(value)
    return metadata or {}, infos


def _integer(text: str) -> int | float:
    """A number that 64 bits without a sign cannot hold is a float to the library, and so is no size or offset."""
    if text.startswith("-") or len(text) > 20 or int(text) > _MAX_SIZE:
        return _finite(text)
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError("a number is out of range")
    return value


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _check_text(value: Any, depth: int) -> None:
    """Half a character or nesting beyond the library's limit is refused wherever it stands."""
    if type(value) is str:
        if _SURROGATE.search(value):
            raise ValueError("an escaped character is incomplete")
    elif type(value) in (list, tuple):
        if depth > _MAX_DEPTH:
            raise ValueError(f"values are nested more than {_MAX_DEPTH} deep")
        for item in value:
            if type(value) is tuple:
                _check_text(item[0], depth)
                item = item[1]
            _check_text(item, depth + 1)


def _metadata(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if type(value) is not tuple or any(type(text) is not str for _, text in value):
        raise ValueError(f"__metadata__ is not a map of names to texts. {_AGAIN}")
    return dict(value)


def _info(name: str, value: Any) -> _Info:
    dtype, shape, offsets = _fields(name, value)
    if type(dtype) is tuple and len(dtype) == 1 and dtype[0][1] is None:
        dtype = dtype[0][0]  # the library's other way to write a variant: {"F32": null}
    if type(dtype) is not str or dtype not in _DTYPES:
        raise ValueError(f"tensor {name!r} has the dtype {reprlib.repr(dtype)}, unknown to the format. {_AGAIN}")
    if not _are_sizes(shape):
        raise ValueError(f"tensor {name!r} has the shape {reprlib.repr(shape)}, not a list of sizes. {_AGAIN}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has the data_offsets {reprlib.repr(offsets)}, not two offsets. {_AGAIN}")
    return _Info(name, dtype, tuple(shape), *offsets)


def _fields(name: str, value: Any) -> list[Any]:
    """dtype, shape and data_offsets; the library takes a list of the three as well, and ignores other fields."""
    if type(value) is list and len(value) == len(_FIELDS):
        return value
    if type(value) is not tuple:
        raise ValueError(f"tensor {name!r} is not described by a JSON object. {_AGAIN}")
    found = [key for key, _ in value if key in _FIELDS]
    if sorted(found) != sorted(_FIELDS):
        raise ValueError(f"tensor {name!r} has the fields {found}, not each of {list(_FIELDS)} once. {_AGAIN}")
    fields = dict(value)
    return [fields[key] for key in _FIELDS]


def _are_sizes(value: Any) -> bool:
    return type(value) is list and all(type(item) is int for item in value)


def _entry(info: _Info, origin: int) -> Entry:
    """``info`` as torch has it, its size checked."""
    kind, bits = _DTYPES[info.dtype]
    label = f"tensor {info.name!r} ({info.dtype}, {reprlib.repr(list(info.shape))})"
    count = 1
    for size in info.shape:
        count *= size
        if count > _MAX_SIZE:  # which a later size of 0 does not mend
            raise ValueError(f"{label} has more elements than can be counted. {_AGAIN}")
    if count * bits != 8 * (info.end - info.begin):
        raise ValueError(
            f"{label} takes {count * bits / 8:.15g} bytes, but its data_offsets hold {info.end - info.begin}. {_AGAIN}"
        )
    dtype = getattr(torch, kind, None) if kind else None
    if dtype is None:
        raise ValueError(f"{label} is of a dtype that this torch ({torch.__version__}) does not have")
    shape = info.shape
    if info.dtype == "F4":
        if shape[-1] % 2:
            raise ValueError(f"{label} needs an even last size: torch holds two elements in a byte")
        shape = (*shape[:-1], shape[-1] // 2)
    if count == 0:
        _check_torch_holds(label, shape)
    return Entry(info.name, dtype, shape, origin + info.begin, origin + info.end)


def _check_torch_holds(label: str, shape: tuple[int, ...]) -> None:
    """An empty tensor may have sizes beyond torch's counting; one with bytes has not, as its file is not so long."""
    try:
        torch.empty(0, device="cpu").reshape(shape)
    except (RuntimeError, TypeError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{label} is of a shape that torch does not hold ({reason})") from None
