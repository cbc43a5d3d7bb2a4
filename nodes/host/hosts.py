"""What differs between versions of ComfyUI. All other code is written as if there were one version.

docs/hosts.md lists what else we rely on, and since which version; contracts.py checks the cheap part of that when the
pack starts.

[Note: of the model, or of its use]
An attribute of a patcher belongs either to its model (the file's disk policy, since 0.37) or to one use of the model
(patches, options, hooks). The host shows which: what belongs to the model is an argument of the constructor of the
host's own classes, or is shared by all patchers of one model (``get_clone_model_override``). So an attribute with the
name of such an argument belongs to the model, whatever a newer host calls it, and everything else belongs to the use.
The exception is what says where a model came from: no constructor takes it, so :data:`ORIGIN` names it. A newer host
may have more of that kind: a test lists all attributes of a patcher, and fails for one that is none of these.

[Note: names that are borrowed]
Some names of the host are not part of what it offers to packs. If they were imported where they are used, one that a
host lacks would keep the whole pack from starting, and workflows would miss their nodes. So they are imported here. A
name that is gone is listed in :data:`missing`, contracts.py reports it, and models are loaded the host's own way.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from types import ModuleType
from typing import Any

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher

from ...streaming.devices.allocation_record import AllocationRecord

logger = logging.getLogger(__name__)

# The newest ComfyUI in which we have run the whole test suite.
NEWEST_KNOWN = "0.33"

# The arguments of a patcher's constructor in all versions.
ARGUMENTS = frozenset({"model", "load_device", "offload_device", "size", "weight_inplace_update"})

# Where a model came from, whose clone a patcher is, and the weights that hooks have set aside.
ORIGIN = frozenset({"cached_patcher_init", "clone_base_uuid", "parent", "hook_backup"})

# Unrelated attributes may hold the same object of these types.
CONSTANTS = (type(None), bool, int, float, str, tuple, frozenset)

# Names that this host lacks (Note: names that are borrowed).
missing: list[str] = []


def module_of_host(name: str) -> ModuleType | None:
    """Import a module that only some versions have; None if it is missing or cannot be imported."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # A module may do anything when it is imported.
        logger.debug("%s cannot be imported: %s", name, error)
        return None


VERSION: str = getattr(module_of_host("comfyui_version"), "__version__", "unknown")


def _borrowed(module: str, name: str, stand_in: Any, needed: bool = True) -> Any:
    """Return what the host has under this name, else ``stand_in``. If a ``needed`` name is gone nothing streams, so its
    stand-in is never run."""
    found = getattr(module_of_host(module), name, None)
    if found is None and needed:
        missing.append(f"{module}.{name}")
    return stand_in if found is None else found


class _Gone:
    """Stands in for a class or a module: nothing is an instance of it."""


wipe_lowvram_weight = _borrowed("comfy.model_patcher", "wipe_lowvram_weight", None)
LazyCastingParam = _borrowed("comfy.model_patcher", "LazyCastingParam", _Gone)
QuantizedTensor = _borrowed("comfy.quant_ops", "QuantizedTensor", _Gone)
CallbacksMP = _borrowed("comfy.patcher_extension", "CallbacksMP", _Gone)
WrappersMP = _borrowed("comfy.patcher_extension", "WrappersMP", _Gone)
COMPILE_KEY = _borrowed("comfy_api.torch_helpers.torch_compile", "COMPILE_KEY", "torch.compile", needed=False)
get_progress_state = _borrowed("comfy_execution.progress", "get_progress_state", None, needed=False)
_vbars_analyze = _borrowed("comfy_aimdo.model_vbar", "vbars_analyze", None)
_prefetch = module_of_host("comfy.model_prefetch") or _Gone


def is_newer_than_known() -> bool:
    """Whether this ComfyUI is newer than the newest that was tried."""
    return release(VERSION) > release(NEWEST_KNOWN)


def release(version: str) -> tuple[int, ...]:
    """``(0, 33)`` of 0.33.1; a version of another form counts as the newest that there can be."""
    parts = version.split(".")[:2]
    return tuple(map(int, parts)) if len(parts) == 2 and all(part.isdecimal() for part in parts) else (1 << 30,)


# -- patchers --------------------------------------------------------------------------------------------------------


def made_with(patcher: ModelPatcher) -> dict[str, Any]:
    """Return the constructor arguments, except the model, that make a patcher like ``patcher``."""
    held = vars(patcher)
    return {name: held[name] for name in _constructor_arguments(type(patcher)) if name in held and name != "model"}


def what_is_of_the_model(patcher: ModelPatcher) -> set[str]:
    """The names of its attributes that belong to its model (Note: of the model, or of its use)."""
    return ORIGIN | _constructor_arguments(type(patcher)) | _shared(patcher)


def _constructor_arguments(kind: type) -> set[str]:
    """The names of the arguments of the host's constructors for this class. Those that all versions have are always
    among them: another pack may have replaced a constructor by a function that does not name its arguments."""
    own = [one for one in kind.__mro__ if issubclass(one, ModelPatcher) and one.__module__ == ModelPatcher.__module__]
    found = [parameter for one in own for parameter in inspect.signature(one.__init__).parameters.values()]
    named = {one.name for one in found if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}
    return ARGUMENTS | named - {"self"}


def _shared(patcher: ModelPatcher) -> set[str]:
    """The names of the attributes that all patchers of one model share."""
    model, others, *_ = patcher.get_clone_model_override()
    wanted = {id(model), *(id(other) for other in others if not isinstance(other, CONSTANTS))}
    return {name for name, value in vars(patcher).items() if id(value) in wanted}


# -- files -----------------------------------------------------------------------------------------------------------


def mark_as_loaded(tensors: Mapping[str, torch.Tensor], path: str) -> None:
    """Mark the tensors of a file that we have opened as the host's own loader does: since 0.37 with the file's path, by
    which the host decides whether to read from the disk in every step."""
    annotate = getattr(module_of_host("comfy.storage"), "annotate_state_dict", None)
    if annotate is not None:
        annotate(tensors, path)


# -- memory ----------------------------------------------------------------------------------------------------------


def counted_ram() -> int:
    """Bytes of RAM of which the host's limits are shares: the machine's, since 0.34 those of its control group."""
    return int(mm.get_total_memory(torch.device("cpu")))


def evictable(device: torch.device) -> int:
    """Bytes of VRAM that models with dynamic VRAM hold and give up when somebody allocates."""
    return int(_vbars_analyze(device.index))


# -- records of allocations (0.35 and newer) -------------------------------------------------------------------------

# Since this release the host records allocations.
RECORDS_SINCE = (0, 35)


def broken_recordings() -> Iterator[str]:
    """Yield what is missing to keep our allocations out of the host's records, if it keeps any. Names without which we
    only know less (what a record holds) are not reported."""
    records = hasattr(_prefetch, "malloc_graph_begin")
    if not records and release(VERSION) >= RECORDS_SINCE:
        yield "model_prefetch.malloc_graph_begin is gone"  # They may be kept under another name.
    if records and not hasattr(_prefetch, "pause_malloc_graph"):
        yield "model_prefetch.pause_malloc_graph is gone"
    if records and not (hasattr(_prefetch, "cleanup_malloc_graph") or hasattr(_prefetch, "cleanup_prefetch_queues")):
        yield "model_prefetch.cleanup_malloc_graph is gone"


def end_recordings() -> None:
    """After a failed step, end the records that the host began in it on this thread."""
    if hasattr(_prefetch, "cleanup_malloc_graph"):
        end = _prefetch.cleanup_malloc_graph
    elif hasattr(_prefetch, "malloc_graph_begin"):
        end = _prefetch.cleanup_prefetch_queues
    else:
        return
    try:
        end()
    except Exception as error:  # The step's own error says why, and must not be hidden by this one.
        logger.warning("ComfyUI could not end its record of allocations: %s", error)


class HostRecord(AllocationRecord):
    """The host's record of what the calling thread allocates. One object serves all threads."""

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        pause = getattr(_prefetch, "pause_malloc_graph", contextlib.nullcontext)()
        _switch(pause.__enter__)
        try:
            yield
        finally:
            _switch(partial(pause.__exit__, None, None, None))

    def resumed(self) -> AbstractContextManager[None]:
        return nesting_pauses.suspended(self._graph())

    def held_bytes(self, device: torch.device) -> int:
        graph = self._graph()
        # A record of another device, or of an unknown one, holds nothing on this device.
        if getattr(getattr(graph, "_stream", None), "device", None) != device:
            return 0
        return int(getattr(graph, "physical_bytes", 0))

    @staticmethod
    def _graph() -> Any:
        """The record of this thread alone, since another thread may be ending its own."""
        return getattr(_prefetch, "MALLOC_GRAPHS", {}).get(threading.get_ident())


def _switch(record: Callable[[], Any]) -> None:
    """Pause or resume a record. One that has failed (memory ran out in it) can do neither, and records nothing. The
    error that says why is already being raised, and this one must not hide it."""
    try:
        record()
    except RuntimeError as error:
        logger.debug("ComfyUI's record of allocations has failed already: %s", error)


record = HostRecord()


def _kind_of_records() -> type | None:
    return getattr(module_of_host("comfy_aimdo.malloc_graph"), "MallocGraph", None)


class _Nesting:
    """Makes pauses of records nest while it is in use (Note: pauses nest).

    [Note: pauses nest]
    The host's pause of a record is a switch: the end of an inner pause would switch the record on in the middle of the
    outer one. Our pauses meet others in both orders: kernels of comfy-kitchen pause inside of a block that runs on
    another device, where we have paused already; and some models pause around blocks, inside of which we pause for
    checksums. So as long as any thread is in a step of ours, the two methods of the record's class count pauses. Code
    that pauses alone, and resumes what it has paused, notices no difference. A pause that began before the step is not
    counted. The host offers no other way: it does not tell whether a record is paused.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._kind: Any = None
        self._originals: tuple[Any, Any] = (None, None)
        self._counting: tuple[Any, Any] = (None, None)
        self._depths: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0 and hasattr(_prefetch, "malloc_graph_begin"):
                self._begin(_kind_of_records())
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._kind is not None:
                self._end()

    def _begin(self, kind: Any) -> None:
        if not (hasattr(kind, "pause") and hasattr(kind, "resume")):
            return
        self._depths = weakref.WeakKeyDictionary()
        self._kind, self._originals = kind, (kind.pause, kind.resume)
        kind.pause, kind.resume = self._counting = self._count(*self._originals)

    def _end(self) -> None:
        if (self._kind.pause, self._kind.resume) == self._counting:
            self._kind.pause, self._kind.resume = self._originals
        # If other code has wrapped our methods meanwhile, its wrappers stay, and our methods only pass calls on.
        self._kind, self._depths = None, weakref.WeakKeyDictionary()

    def _count(self, pause: Callable[..., None], resume: Callable[..., None]) -> tuple[Any, Any]:
        depths = self._depths

        @functools.wraps(pause)
        def counted_pause(graph: Any, *args: Any, **options: Any) -> None:
            pause(graph, *args, **options)
            if self._depths is depths:
                depths[graph] = depths.get(graph, 0) + 1

        @functools.wraps(resume)
        def counted_resume(graph: Any, *args: Any, **options: Any) -> None:
            resume(graph, *args, **options)
            if self._depths is not depths:
                return  # This method is of an earlier step, and other code has wrapped it.
            depths[graph] = max(0, depths.get(graph, 0) - 1)
            if depths[graph]:
                pause(graph)  # The outer pause goes on. Nothing is allocated between the two.

        return counted_pause, counted_resume

    @contextlib.contextmanager
    def suspended(self, graph: Any) -> Iterator[None]:
        """Have ``graph`` record inside of this context, even if it is paused."""
        depth = self._depths.get(graph, 0) if graph is not None else 0
        if not depth:
            yield
            return
        pause, resume = self._originals
        self._depths[graph] = 0
        _switch(partial(resume, graph))
        try:
            yield
        finally:
            self._depths[graph] = depth
            _switch(partial(pause, graph))


nesting_pauses = _Nesting()
