"""Lets the host load a model without copying its files: parameters are views of them, and we know which part of which.

[Note: what is exchanged, and for whom]
Whether the host copies a file into new memory depends on the class that ``comfy.model_patcher.CoreModelPatcher`` is at
that moment, and on nothing that a caller can pass. In a file that the host opens in its own way we cannot find a tensor
again. So that class, and the function that opens files, are replaced for the length of one call, for the calling thread
alone: other threads get the originals. Otherwise every byte of the model would be copied, and the copy dropped.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_patcher
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from ...streaming import Checkpoint, CheckpointFile
from .hosts import mark_as_loaded

SAFETENSORS_ENDINGS = (".safetensors", ".sft")


class MappedFiles:
    """The safetensors files that the host has opened within :func:`mapped_loading`."""

    def __init__(self) -> None:
        self._checkpoints: list[Checkpoint] = []

    def open(self, path: str) -> Checkpoint:
        """Open this file alone: a caller that passes one shard passes the others too."""
        checkpoint = Checkpoint(path, [CheckpointFile(path)])
        self._checkpoints.append(checkpoint)
        return checkpoint

    def locate(self, tensor: torch.Tensor) -> Any:
        """The part of a file that ``tensor`` maps; None where it is in memory alone."""
        found = (checkpoint.locate(tensor) for checkpoint in self._checkpoints)
        return next((source for source in found if source is not None), None)


def opened(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint, marked as the host marks those of files that it has opened itself."""
    tensors = dict(checkpoint.state_dict())
    for file in checkpoint.files:
        mark_as_loaded({name: tensors[name] for name in file.entries}, file.path)
    return tensors


class MappedModelPatcher(ModelPatcher):
    """Says that it is dynamic, so that the host keeps the parameters as views of the mapped file."""

    def is_dynamic(self) -> bool:
        return True


# Reentrant, since the factory that runs inside may be our own loader.
_mapping = threading.RLock()


@contextmanager
def mapped_loading() -> Iterator[MappedFiles]:
    """Have the host load models as views of their files (Note: what is exchanged, and for whom)."""
    files = MappedFiles()
    with _mapping:
        patcher, load = comfy.model_patcher.CoreModelPatcher, comfy.utils.load_torch_file
        comfy.model_patcher.CoreModelPatcher = _for_this_thread(MappedModelPatcher, patcher)
        comfy.utils.load_torch_file = _opening(files, load)
        try:
            yield files
        finally:
            comfy.model_patcher.CoreModelPatcher, comfy.utils.load_torch_file = patcher, load


def _for_this_thread(ours: type[ModelPatcher], theirs: type[ModelPatcher]) -> type[ModelPatcher]:
    """A class that makes ``ours`` on the calling thread and ``theirs`` on any other."""
    caller = threading.get_ident()

    class Choice(theirs):
        def __new__(cls, *args: object, **kwargs: object) -> ModelPatcher:
            return (ours if threading.get_ident() == caller else theirs)(*args, **kwargs)

        def __init__(self, *args: object, **kwargs: object) -> None:
            """Never called: what ``__new__`` returns is no instance of this class."""

    return Choice


def _opening(files: MappedFiles, load: Callable[..., Any]) -> Callable[..., Any]:
    """Return a ``load_torch_file`` that maps safetensors files by ``files`` on the calling thread."""
    caller = threading.get_ident()
    signature = inspect.signature(load)

    @functools.wraps(load)
    def choice(*args: object, **kwargs: object) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        (path, *_), device = call.args, call.arguments.get("device")
        ours = threading.get_ident() == caller and path.lower().endswith(SAFETENSORS_ENDINGS)
        if not ours or (device is not None and device.type != "cpu"):
            return load(*args, **kwargs)
        checkpoint = files.open(path)
        tensors = opened(checkpoint)
        return (tensors, checkpoint.metadata or None) if call.arguments.get("return_metadata") else tensors

    return choice
