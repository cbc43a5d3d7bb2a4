"""The tensors that a safetensors file lists in its header, or the files of a model in several: names, dtypes, bytes."""

from __future__ import annotations

import json
import math
import re
import reprlib
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CheckpointError
from .dtypes import DTYPES

MOST_HEADER_BYTES = 100_000_000
# No file of ext4 is larger.
MOST_BYTES = 1 << 44
# How long the header is, before it.
HEAD = struct.Struct("<Q")
METADATA = "__metadata__"
SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})\.safetensors", re.DOTALL)
INDEX = ".index.json"
# A full checkpoint has text encoders and a VAE beside the diffusion model.
DIFFUSION_MODEL = "model.diffusion_model."


class Tensor(NamedTuple):
    """A tensor in a file; ``dtype`` as the format writes it."""

    name: str
    dtype: str
    nbytes: int


def read_tensors(path: Path) -> list[Tensor]:
    """Return the tensors of the diffusion model in a file, or in all files of its model.

    Raises:
        CheckpointError: a file is missing, damaged, has no tensors, or is no safetensors file.
    """
    found = [tensor for file in _files(path) for tensor in _read(file)]
    if not found:
        raise CheckpointError(f"{path}: it lists no tensors")
    inside = [tensor for tensor in found if tensor.name.startswith(DIFFUSION_MODEL)]
    return [tensor._replace(name=tensor.name.removeprefix(DIFFUSION_MODEL)) for tensor in inside] or found


def missing_bytes(path: Path) -> int:
    """How many bytes of its tensors a file, or the files of its model, do not have: they did not come whole."""
    missing = 0
    for file in _files(path):
        raw = _bytes_of(file, header=True)
        ends = [info["data_offsets"][1] for name, info in _json(file, raw).items() if name != METADATA]
        try:
            there = file.stat().st_size
        except OSError as error:
            raise _unreadable(file, error) from error
        missing += max(0, HEAD.size + len(raw) + max(ends, default=0) - there)
    return missing


def _files(path: Path) -> list[Path]:
    if path.name.endswith(INDEX):
        weight_map = _json(path, _bytes_of(path)).get("weight_map")
        names = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
        if not all(isinstance(name, str) and name and Path(name).name == name for name in names):
            raise CheckpointError(f"{path}: it is no index of a model in several files")
        return [path.with_name(name) for name in sorted(set(names))]
    if (match := SHARD.fullmatch(path.name)) is None:
        return [path]
    stem, count = match.groups()
    return [path.with_name(f"{stem}-{number:05}-of-{count}.safetensors") for number in range(1, int(count) + 1)]


def _read(path: Path) -> list[Tensor]:
    raw = _bytes_of(path, header=True)
    tree = _json(path, raw)
    tree.pop(METADATA, None)
    try:
        places = [(*_place(info["data_offsets"]), name) for name, info in tree.items()]
        _check_order(places)
        tensors = zip(tree.items(), places, strict=True)
        return [Tensor(name, _dtype(info, end - begin), end - begin) for (name, info), (begin, end, _) in tensors]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its header does not describe tensors ({error}); it may be damaged") from error


def _place(offsets: Any) -> tuple[int, int]:
    begin, end = offsets
    if not (type(begin) is type(end) is int and 0 <= begin <= end < MOST_BYTES):
        raise ValueError(f"no place in a file: {reprlib.repr(offsets)}")
    return begin, end


def _check_order(places: Iterable[tuple[int, int, str]]) -> None:
    """Each tensor begins where the one before it ends, or safetensors would not read the file."""
    last = 0
    for begin, end, name in sorted(places):
        if begin != last:
            raise ValueError(f"{name!r} begins at {begin}, and what is before it ends at {last}")
        last = end


def _dtype(info: dict[str, Any], nbytes: int) -> str:
    """The dtype of a tensor, whose shape then takes so many bytes."""
    dtype, shape = info["dtype"], info["shape"]
    if type(dtype) is not str or dtype not in DTYPES:
        raise ValueError(f"nothing is known of the dtype {reprlib.repr(dtype)}")
    if type(shape) is not list or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"no shape: {reprlib.repr(shape)}")
    if math.prod(shape) * DTYPES[dtype][1] != 8 * nbytes:
        raise ValueError(f"{dtype} in the shape {reprlib.repr(shape)} does not take {nbytes} bytes")
    return dtype


def _bytes_of(path: Path, header: bool = False) -> bytes:
    """The bytes of a file; of a safetensors file those of its header."""
    try:
        with open(path, "rb") as file:
            if not header:
                return file.read(MOST_HEADER_BYTES)
            length = HEAD.unpack(file.read(HEAD.size).ljust(HEAD.size, b"\xff"))[0]
            raw = file.read(length) if length <= MOST_HEADER_BYTES else None
    except (OSError, ValueError) as error:  # A ValueError: the name has a character that no file's name has.
        raise _unreadable(path, error) from error
    if raw is None:
        raise CheckpointError(f"{path}: it is no safetensors file; only such files have a header to plan by")
    if len(raw) < length:
        raise CheckpointError(f"{path}: its header cannot be read; the file ends within it")
    return raw


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}")


def _json(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        tree = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header cannot be read; the file may be damaged ({error})") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path}: its header is no JSON object; the file may be damaged")
    return tree
