"""The tensors that a safetensors file lists in its header, or the files of a model in several: names, dtypes, bytes."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CheckpointError

MOST_HEADER_BYTES = 100_000_000
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
        CheckpointError: a file is missing, or is no safetensors file.
    """
    found = [tensor for file in _files(path) for tensor in _read(file)]
    inside = [tensor for tensor in found if tensor.name.startswith(DIFFUSION_MODEL)]
    return [tensor._replace(name=tensor.name.removeprefix(DIFFUSION_MODEL)) for tensor in inside] or found


def _files(path: Path) -> list[Path]:
    if path.name.endswith(INDEX):
        weight_map = _json(path, _bytes_of(path)).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{path}: it is no index of a model in several files")
        return [path.with_name(str(name)) for name in sorted(set(weight_map.values()))]
    if (match := SHARD.fullmatch(path.name)) is None:
        return [path]
    stem, count = match.groups()
    return [path.with_name(f"{stem}-{number:05}-of-{count}.safetensors") for number in range(1, int(count) + 1)]


def _read(path: Path) -> list[Tensor]:
    raw = _bytes_of(path, header=True)
    tree = _json(path, raw)
    tree.pop("__metadata__", None)
    try:
        return [Tensor(name, str(info["dtype"]), _length(info["data_offsets"])) for name, info in tree.items()]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its header does not describe tensors ({error}); it may be damaged") from error


def _length(offsets: Any) -> int:
    begin, end = offsets
    return int(end) - int(begin)


def _bytes_of(path: Path, header: bool = False) -> bytes:
    """The bytes of a file; of a safetensors file those of its header."""
    try:
        with open(path, "rb") as file:
            if not header:
                return file.read(MOST_HEADER_BYTES)
            length = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))[0]
            if length > MOST_HEADER_BYTES:
                raise CheckpointError(f"{path}: it is no safetensors file; only such files have a header to plan by")
            return file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def _json(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        tree = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header cannot be read; the file may be damaged ({error})") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path}: its header is no JSON object; the file may be damaged")
    return tree
