"""A model's checkpoint: one safetensors file, or several of which each holds a shard."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from typing import Any

import torch

from ..errors import CheckpointError
from .checkpoint_file import CheckpointFile, FileSlice

_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors", re.DOTALL)


class Checkpoint:
    """All files of one model."""

    def __init__(self, path: str, files: Iterable[CheckpointFile]) -> None:
        self.path = path
        self.files = tuple(files)
        self._holders: dict[str, CheckpointFile] = {}
        for file in self.files:
            for name in file.entries:
                other = self._holders.setdefault(name, file)
                if other is not file:
                    raise CheckpointError(f"{path}: tensor {name!r} is in two files, {other.path} and {file.path}")

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Open the file at ``path``, or all files of its model if it is a shard or an index of shards.

        Raises:
            CheckpointError: a file is missing, cannot be read, or does not fit the others.
        """
        path = os.fsdecode(path)
        names, weight_map = _find_files(path)
        files: list[CheckpointFile] = []
        try:
            for name in names:
                files.append(CheckpointFile(os.path.join(os.path.dirname(path), name)))
            checkpoint = cls(path, files)
            checkpoint._check_against(weight_map)
        except BaseException:
            for file in files:
                file.close()
            raise
        return checkpoint

    def _check_against(self, weight_map: dict[str, str]) -> None:
        for name, expected in weight_map.items():
            holder = self._holders.get(name)
            found = os.path.basename(holder.path) if holder else "no file"
            if found != expected:
                raise CheckpointError(
                    f"{self.path}: the index says that tensor {name!r} is in {expected}, but it is in {found}. "
                    "The files belong to different versions, or one is damaged; download them again."
                )

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: tensor for file in self.files for name, tensor in file.views().items()}

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata of all files; where two files differ, the first one counts."""
        return {name: value for file in reversed(self.files) for name, value in file.metadata.items()}

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    def locate(self, tensor: torch.Tensor) -> FileSlice | None:
        return next((place for file in self.files if (place := file.locate(tensor)) is not None), None)

    def check_unchanged(self) -> None:
        for file in self.files:
            file.check_unchanged()

    def close(self) -> None:
        for file in self.files:
            file.close()


def _find_files(path: str) -> tuple[list[str], dict[str, str]]:
    """Return the names of all files of the model at ``path``, and the index's map of tensors to files (or nothing)."""
    folder, name = os.path.split(path)
    if name.endswith(".index.json"):
        weight_map = _read_index(path)
        return _present(path, sorted(set(weight_map.values()))), weight_map
    shard = _SHARD.fullmatch(name)
    if shard is None:
        return [name], {}
    index = os.path.join(folder, f"{shard['stem']}.safetensors.index.json")
    if os.path.exists(index):
        weight_map = _read_index(index)
        names = sorted(set(weight_map.values()))
    else:
        weight_map, count = {}, int(shard["count"])
        names = [f"{shard['stem']}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    if name not in names:
        raise CheckpointError(f"{path}: is not one of the files of its model, {', '.join(names[:3]) or 'none'} ...")
    return _present(path, names), weight_map


def _present(path: str, names: list[str]) -> list[str]:
    for name in names:
        if not os.path.exists(os.path.join(os.path.dirname(path), name)):
            raise CheckpointError(
                f"{path}: the model has {len(names)} files, and {name} is missing. Download it into the same folder."
            )
    return names


def _read_index(path: str) -> dict[str, str]:
    try:
        with open(path, encoding="utf-8") as file:
            weight_map = json.load(file)["weight_map"]
        if not all(type(name) is str for name in weight_map.values()):
            raise ValueError("weight_map is not a map of tensors to files")
        if not weight_map:
            raise ValueError("weight_map is empty")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no index of a model's files ({error!r}). Download it again.") from error
    for tensor, name in weight_map.items():
        if name in ("", ".", "..") or any(sign in name for sign in "/\\:\0"):
            raise CheckpointError(f"{path}: has tensor {tensor!r} in {name!r}, which is no name of a file beside it")
    return weight_map
