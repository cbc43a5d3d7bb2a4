"""Let the host load a model without copying its files: its parameters are views of them, and we know of which part.

[Note: what is exchanged, and for whom]
Whether the host copies a file into fresh memory hangs on the class that ``comfy.model_patcher.CoreModelPatcher`` is at
that moment, and on nothing that a caller can pass. How it opens a file does not let us find a tensor in it again. So
that class, and the function that opens files, are exchanged for the length of one call, for the calling thread alone:
other threads find what they always find. A copy would be made, and dropped, for every byte of the model.
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
    """Safetensors files that the host has opened meanwhile."""

    def __init__(self) -> None:
        self._checkpoints: list[Checkpoint] = []

    def open(self, path: str) -> Checkpoint:
        """This file alone: who passes a shard passes the others too."""
        checkpoint = Checkpoint(path, [CheckpointFile(path)])
        self._checkpoints.append(checkpoint)
        return checkpoint

    def locate(self, tensor: torch.Tensor) -> Any:
        """The part of a file that ``tensor`` maps; None where it is in memory alone."""
        found = (checkpoint.locate(tensor) for checkpoint in self._checkpoints)
        return next((source for source in found if source is not None), None)


def opened(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, with what the host leaves on those of the files that it has opened itself."""
    tensors = dict(checkpoint.state_dict())
    for file in checkpoint.files:
        mark_as_loaded({name: tensors[name] for name in file.entries}, file.path)
    return tensors


class MappedModelPatcher(ModelPatcher):
    """Says that it is dynamic, so that the host keeps the parameters as views of the mapped file."""

    def is_dynamic(self) -> bool:
        return True


# Reentrant: a factory may be ours.
_mapping = threading.RLock()


@contextmanager
def mapped_loading() -> Iterator[MappedFiles]:
    """While this lasts the host loads models as views of their files (Note: what is exchanged, and for whom)."""
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
            """Whoever was made is no instance of this class, so this is never called."""

    return Choice


def _opening(files: MappedFiles, load: Callable[..., Any]) -> Callable[..., Any]:
    """``load_torch_file`` that opens safetensors files as ours on the calling thread."""
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
