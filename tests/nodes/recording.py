"""A strict stand-in for the record of allocations that newer hosts keep of a step (ComfyUI 0.35, aimdo 0.5 and newer).

It has the interface and the rules of the real one as far as a CPU can have them, and is put in place of it: below the
functions of a host that keeps records, and below functions like these where a host has none. What the recording thread
allocates is followed by torch's dispatch mode. A *root* lasts from begin to end; in it there may be *scopes*.

- An allocation that outlives its root or scope is a *rogue*.
- One that is freed in another scope than its own makes the record *fail*: all that is asked of it then raises.
- One that is freed while the record pauses has *escaped*: the real one does not recognise it, and the process aborts.
"""

from __future__ import annotations

import inspect
import sys
import threading
import types
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import comfy.model_prefetch
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

AIMDO = "comfy_aimdo.malloc_graph"
FAILED = "aimdo memory compile error"
HELD_BYTES = 5 << 20
CPU = torch.device("cpu")


class _Watch(TorchDispatchMode):
    def __init__(self, record: StrictRecord) -> None:
        super().__init__()
        self._record = record

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if _is_plain(each)}
        output = function(*args, **(kwargs or {}))
        self._record.look()
        for each in tree_leaves(output):
            if _is_plain(each) and each.untyped_storage()._cdata not in given:
                self._record.note(each, f"{function} {tuple(each.shape)}")
        return output


def _is_plain(value: Any) -> bool:
    return type(value) in (torch.Tensor, torch.nn.Parameter)


class _Allocation(NamedTuple):
    storage: StorageWeakRef
    what: str
    depth: int


class StrictRecord:
    """One thread's record, begun when it is made.

    Attributes:
        allocated: how many allocations were recorded.
        rogues, escaped: what was (see above).
        failed: why it has failed; empty while it has not.
        paused: whether it pauses.
    """

    physical_bytes = HELD_BYTES

    def __init__(self, device: torch.device = CPU) -> None:
        self._stream = types.SimpleNamespace(device=device)
        self._comfy_active = False
        self._comfy_cuda_graph_modules: weakref.WeakSet[Any] = weakref.WeakSet()
        self.allocated = 0
        self.rogues: list[str] = []
        self.escaped: list[str] = []
        self.failed = ""
        self.paused = False
        self._scopes: list[str | None] = []
        self._live: dict[int, _Allocation] = {}
        self._watch: _Watch | None = None
        self.push()

    # -- as the host asks it --------------------------------------------------------------------------------------

    def push(self, name: str | None = None) -> None:
        if name is not None:
            self._check()
            self._scopes.append(name)
        elif self._watch is not None:
            raise RuntimeError(f"{FAILED}: a second root")
        else:
            self._watch = _Watch(self)
            self._watch.__enter__()

    def pop(self) -> bool:
        self._check()
        depth = len(self._scopes)
        for key, allocation in list(self._live.items()):
            if allocation.depth == depth:
                self.rogues.append(self._live.pop(key).what)
        if self._scopes:
            self._scopes.pop()
        else:
            self._stop()
        return False

    def iterate(self, name: str | None = None) -> bool:
        if self._scopes and (name is None or self._scopes[-1] == name):
            self.pop()
        if name is not None:
            self.push(name)
        return False

    def abort(self) -> None:
        if self._watch is not None:
            self._stop()

    def pause(self, sync: bool = False) -> None:
        self._check()
        self.paused = True

    def resume(self, sync: bool = False) -> None:
        self._check()
        self.paused = False

    @property
    def rogue_count(self) -> int:
        return len(self.rogues)

    # -- what the watch tells -------------------------------------------------------------------------------------

    def note(self, tensor: torch.Tensor, what: str) -> None:
        if self.paused:
            return
        storage = StorageWeakRef(tensor.untyped_storage())
        if storage.cdata not in self._live:
            self.allocated += 1
            self._live[storage.cdata] = _Allocation(storage, what, len(self._scopes))

    def look(self) -> None:
        for key, allocation in list(self._live.items()):
            if allocation.storage.expired():
                del self._live[key]
                if self.paused:
                    self.escaped.append(allocation.what)
                elif allocation.depth != len(self._scopes):
                    self.failed = f"freed in another scope: {allocation.what}"

    def _stop(self) -> None:
        self.look()
        assert self._watch is not None
        self._watch.__exit__(None, None, None)
        self._watch = None
        self._scopes.clear()
        self.rogues += [allocation.what for allocation in self._live.values()]
        self._live.clear()

    def _check(self) -> None:
        self.look()
        if self._watch is None or self.failed:
            raise RuntimeError(f"{FAILED}: {self.failed or 'it is not open'}")


class RecordingHost:
    """A host that keeps records, of whatever version it is.

    Attributes:
        records: by thread; one that was cleaned up is gone.
        kept: all that there were.
        cleaned: how many times a record was ended from outside.
        own: whether the functions are the host's own.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kept: list[StrictRecord] = []
        self.cleaned = 0
        self.own = hasattr(comfy.model_prefetch, "malloc_graph_begin")
        if self.own:
            aimdo, clean_up = sys.modules[AIMDO], comfy.model_prefetch.cleanup_prefetch_queues
            monkeypatch.setattr(comfy.model_prefetch, "malloc_graph_enabled", lambda device: True)
        else:
            aimdo, clean_up = types.ModuleType(AIMDO), self._clean_up
            monkeypatch.setitem(sys.modules, AIMDO, aimdo)
            for name, function in (
                ("malloc_graph_begin", self._begin),
                ("malloc_graph_end", self._end),
                ("pause_malloc_graph", self._pause),
            ):
                monkeypatch.setattr(comfy.model_prefetch, name, function, raising=False)
        monkeypatch.setattr(aimdo, "MallocGraph", StrictRecord, raising=False)
        monkeypatch.setattr(aimdo, "record", self._record, raising=False)
        self.records: dict[int, StrictRecord] = {}
        monkeypatch.setattr(comfy.model_prefetch, "MALLOC_GRAPHS", self.records, raising=False)

        self._all = clean_up
        if not self.own:
            monkeypatch.setattr(comfy.model_prefetch, "cleanup_malloc_graph", self._clean_up, raising=False)
        clean_up_one = comfy.model_prefetch.cleanup_malloc_graph

        def counted() -> None:
            self.cleaned += 1
            clean_up_one()

        monkeypatch.setattr(comfy.model_prefetch, "cleanup_malloc_graph", counted)

    # -- what a test asks -----------------------------------------------------------------------------------------

    def begin(self, device: torch.device = CPU) -> None:
        comfy.model_prefetch.malloc_graph_begin(device)

    def end(self) -> None:
        comfy.model_prefetch.malloc_graph_end()

    def pause(self) -> Any:
        return comfy.model_prefetch.pause_malloc_graph()

    def clean_up(self) -> None:
        self._all()

    @property
    def rogues(self) -> list[str]:
        return [what for record in self.kept for what in record.rogues]

    @property
    def escaped(self) -> list[str]:
        return [what for record in self.kept for what in record.escaped]

    @contextmanager
    def around_blocks(self, flux: torch.nn.Module, device: torch.device = CPU) -> Iterator[None]:
        """Record what FLUX's blocks allocate: from the module that runs just before them to the one behind them. As in
        the host nothing ends the record where a block raises. A host that records FLUX itself does so meanwhile."""
        handles = []
        if "malloc_graph" not in inspect.getsource(type(flux).forward_orig):
            handles = [
                flux.pe_embedder.register_forward_hook(lambda *_: self.begin(device)),
                flux.final_layer.register_forward_pre_hook(lambda *_: self.end()),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.clean_up()

    # -- where a host has none of it ------------------------------------------------------------------------------

    def _record(self, stream: Any, assert_graph_breaks: bool = False) -> StrictRecord:
        self.kept.append(StrictRecord())
        return self.kept[-1]

    def _begin(self, device: torch.device) -> None:
        thread = threading.get_ident()
        if thread in self.records:
            self.records[thread].push()
        else:
            self.records[thread] = self._record(None)
        self.records[thread]._comfy_active = True

    def _end(self) -> None:
        record = self.records.get(threading.get_ident())
        if record is not None and record._comfy_active:
            record.pop()
            record._comfy_active = False

    @contextmanager
    def _pause(self, sync: bool = False) -> Iterator[None]:
        self._switch("pause", sync)
        try:
            yield
        finally:
            self._switch("resume", sync)

    def _switch(self, what: str, sync: bool) -> None:
        record = self.records.get(threading.get_ident())
        if record is not None and record._comfy_active:
            getattr(record, what)(sync=sync)

    def _clean_up(self) -> None:
        record = self.records.pop(threading.get_ident(), None)
        if record is not None and record._comfy_active:
            record._comfy_active = False
            record.abort()


@pytest.fixture
def recording_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordingHost]:
    """This host keeps records, by the strict stand-in."""
    host = RecordingHost(monkeypatch)
    yield host
    host.clean_up()
