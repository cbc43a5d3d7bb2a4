"""The tensors that a safetensors file lists in its header, or the files of a model in several: names, dtypes, bytes."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CheckpointError

MOST_HEADER_BYTES = 100_000_000
MOST_BYTES = 1 << 63
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
        missing += max(0, HEAD.size + len(raw) + max(ends, default=0) - file.stat().st_size)
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
        return [Tensor(name, str(info["dtype"]), _length(info["data_offsets"])) for name, info in tree.items()]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its header does not describe tensors ({error}); it may be damaged") from error


def _length(offsets: Any) -> int:
    begin, end = offsets
    if not (type(begin) is type(end) is int and 0 <= begin <= end < MOST_BYTES):
        raise ValueError(f"no place in a file: {offsets}")
    return end - begin


def _bytes_of(path: Path, header: bool = False) -> bytes:
    """The bytes of a file; of a safetensors file those of its header."""
    try:
        with open(path, "rb") as file:
            if not header:
                return file.read(MOST_HEADER_BYTES)
            length = HEAD.unpack(file.read(HEAD.size).ljust(HEAD.size, b"\xff"))[0]
            raw = file.read(length) if length <= MOST_HEADER_BYTES else None
    except (OSError, ValueError) as error:  # A ValueError: the name has a character that no file's name has.
        raise CheckpointError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if raw is None:
        raise CheckpointError(f"{path}: it is no safetensors file; only such files have a header to plan by")
    if len(raw) < length:
        raise CheckpointError(f"{path}: its header cannot be read; the file ends within it")
    return raw


def _json(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        tree = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header cannot be read; the file may be damaged ({error})") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path}: its header is no JSON object; the file may be damaged")
    return tree
