"""What differs between versions of ComfyUI. Everything else in this folder reads as if there were one.

docs/hosts.md has what is relied on beyond this, and since when it is so; contracts.py asks the cheap part of it when
the pack starts.

[Note: of the model, or of its use]
A patcher carries what belongs to its model (the file's disk policy, since 0.37) beside what belongs to one use of it
(patches, options, hooks). The host shows which is which: what belongs to the model is an argument of the constructor of
its own classes, or is what all patchers of one model share (``get_clone_model_override``). So an attribute that is
named like such an argument belongs to the model, whatever a newer host calls it, and everything else is use. Only what
says where a model came from is told to no constructor, and is named here.

[Note: names that are borrowed]
Some names of the host are no part of what it offers to packs. Were they imported where they are used, one that is gone
would keep the whole pack from starting, and workflows would miss their nodes. So they are imported here; one that is
gone is :data:`missing`, contracts.py says so, and models are loaded the host's own way.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import ModuleType
from typing import Any

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_version import __version__ as VERSION

from ..streaming.allocation_record import AllocationRecord

logger = logging.getLogger(__name__)

# The newest ComfyUI whose whole source was read, and with which everything was tried.
NEWEST_KNOWN = "0.33"

# Where a model came from, whose clone a patcher is, and what hooks have put aside of its weights.
ORIGIN = frozenset({"cached_patcher_init", "clone_base_uuid", "parent", "hook_backup"})

# Names that this host lacks (Note: names that are borrowed).
missing: list[str] = []


def _module(name: str) -> ModuleType | None:
    """A module that some versions have."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise  # It is there, and something that it needs is not.
        return None


def _borrowed(module: str, name: str, stand_in: Any) -> Any:
    """What the host has under this name; ``stand_in``, which nobody runs, where it is gone."""
    found = getattr(_module(module), name, None)
    if found is None:
        missing.append(f"{module}.{name}")
    return stand_in if found is None else found


class _Gone:
    """Stands in for a class or a module: nothing is an instance of it."""


wipe_lowvram_weight = _borrowed("comfy.model_patcher", "wipe_lowvram_weight", None)
LazyCastingParam = _borrowed("comfy.model_patcher", "LazyCastingParam", _Gone)
QuantizedTensor = _borrowed("comfy.quant_ops", "QuantizedTensor", _Gone)
COMPILE_KEY = _borrowed("comfy_api.torch_helpers.torch_compile", "COMPILE_KEY", "")
get_progress_state = _borrowed("comfy_execution.progress", "get_progress_state", None)
_vbars_analyze = _borrowed("comfy_aimdo.model_vbar", "vbars_analyze", None)
_prefetch = _module("comfy.model_prefetch") or _Gone


def is_newer_than_known() -> bool:
    """Whether this ComfyUI is newer than the newest that was tried."""
    return release(VERSION) > release(NEWEST_KNOWN)


def release(version: str) -> tuple[int, ...]:
    """``(0, 33)`` of 0.33.1; a version of another form counts as the newest that there can be."""
    parts = version.split(".")[:2]
    return tuple(map(int, parts)) if len(parts) == 2 and all(part.isdecimal() for part in parts) else (1 << 30,)


# -- patchers --------------------------------------------------------------------------------------------------------


def made_with(patcher: ModelPatcher) -> dict[str, Any]:
    """The arguments, but for the model, with which a patcher like ``patcher`` is made."""
    held = vars(patcher)
    return {name: held[name] for name in _constructor_arguments(type(patcher)) if name in held and name != "model"}


def what_is_of_the_model(patcher: ModelPatcher) -> set[str]:
    """The names of its attributes that belong to its model (Note: of the model, or of its use)."""
    return ORIGIN | _constructor_arguments(type(patcher)) | _shared(patcher)


def _constructor_arguments(kind: type) -> set[str]:
    own = [one for one in kind.__mro__ if issubclass(one, ModelPatcher) and one.__module__ == ModelPatcher.__module__]
    found = [parameter for one in own for parameter in inspect.signature(one.__init__).parameters.values()]
    return {one.name for one in found if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)} - {"self"}


def _shared(patcher: ModelPatcher) -> set[str]:
    """The attributes of which all patchers of one model have the same."""
    model, others = patcher.get_clone_model_override()
    wanted = {id(model), *map(id, others)}
    return {name for name, value in vars(patcher).items() if id(value) in wanted}


# -- files -----------------------------------------------------------------------------------------------------------


def mark_as_loaded(tensors: Mapping[str, torch.Tensor], path: str) -> None:
    """Leave on tensors of a file that we have opened what the host's own loader leaves on them: since 0.37 the file's
    path, by which it decides whether to read from the disk in every step."""
    storage = _module("comfy.storage")
    if storage is not None:
        storage.annotate_state_dict(tensors, path)


# -- memory ----------------------------------------------------------------------------------------------------------


def counted_ram() -> int:
    """Bytes of RAM of which the host's limits are shares: the machine's, since 0.34 those of its control group."""
    return int(mm.get_total_memory(torch.device("cpu")))


def evictable(device: torch.device) -> int:
    """Bytes of VRAM that models with dynamic VRAM hold and give up when somebody allocates."""
    return int(_vbars_analyze(device.index))


# -- records of allocations (0.35 and newer) -------------------------------------------------------------------------


def end_recordings() -> None:
    """After a step that failed: nothing that the host has begun in it (records of allocations, prefetching) goes on."""
    _prefetch.cleanup_prefetch_queues()


def broken_recordings() -> Iterator[str]:
    """What is lacking to keep our allocations out of the host's records, where it keeps some."""
    if not hasattr(_prefetch, "cleanup_prefetch_queues"):
        yield "model_prefetch.cleanup_prefetch_queues is gone"
    if hasattr(_prefetch, "malloc_graph_begin") and not hasattr(_prefetch, "pause_malloc_graph"):
        yield "model_prefetch.pause_malloc_graph is gone"


class HostRecord(AllocationRecord):
    """The host's record of this thread's allocations. One for the process."""

    def __init__(self) -> None:
        self._thread = threading.local()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        # The host's pause is a switch: the end of one inside of another would switch the record on too early.
        depth = getattr(self._thread, "depth", 0)
        pause = getattr(_prefetch, "pause_malloc_graph", contextlib.nullcontext)()
        if not depth:
            _switch(pause.__enter__)
        self._thread.depth = depth + 1
        try:
            yield
        finally:
            self._thread.depth = depth
            if not depth:
                _switch(partial(pause.__exit__, None, None, None))

    def held_bytes(self, device: torch.device) -> int:
        # Of this thread alone: another one may be taking its record down.
        graph = getattr(_prefetch, "MALLOC_GRAPHS", {}).get(threading.get_ident())
        if graph is None or graph._stream.device != device:
            return 0
        return int(graph.physical_bytes)


def _switch(record: Callable[[], Any]) -> None:
    """Pause or resume. A record that has failed (memory ran out in it) can do neither, and records nothing; the error
    that says why is on its way, and must not be hidden by this one."""
    try:
        record()
    except RuntimeError as error:
        logger.debug("ComfyUI's record of allocations has failed already: %s", error)


record = HostRecord()
