"""A strict stand-in for the record of allocations that newer hosts keep of a step (ComfyUI 0.35, aimdo 0.5 and newer).

It has the rules of the real one as far as a CPU can have them, and is put in place of it, or where a host has none.
What the recording thread allocates between two calls is followed by torch's dispatch mode. An allocation that outlives
the record is a *rogue*. One that is freed while the record pauses has *escaped*: the real one does not recognise it,
and the process aborts.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_prefetch
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FAILED = "aimdo memory compile error"
HELD_BYTES = 5 << 20


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


class StrictRecord:
    """One thread's record.

    Attributes:
        allocated: how many allocations were recorded.
        rogues, escaped: what was (see above).
        begun: how many times it was begun.
    """

    physical_bytes = HELD_BYTES
    _comfy_cuda_graph_modules = ()

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.Stream(device) if device.type == "cuda" else _Stream(device)
        self._comfy_active = False
        self.allocated = 0
        self.rogues: list[str] = []
        self.escaped: list[str] = []
        self.begun = 0
        self.failed = False
        self._paused = False
        self._live: dict[int, tuple[StorageWeakRef, str]] = {}
        self._watch: _Watch | None = None

    def begin(self) -> None:
        if self._watch is not None:
            raise RuntimeError(f"{FAILED}: a second root")
        self.begun += 1
        self._comfy_active, self._paused = True, False
        self._watch = _Watch(self)
        self._watch.__enter__()

    def end(self) -> None:
        self._check()
        self._stop()

    def iterate(self, name: str | None = None) -> bool:
        """Scopes within a record are not told apart here."""
        self._check()
        return False

    @property
    def rogue_count(self) -> int:
        return len(self.rogues)

    def abort(self) -> None:
        if self._watch is not None:
            self._stop()

    def pause(self, paused: bool) -> None:
        self._check()
        self.look()
        self._paused = paused

    def note(self, tensor: torch.Tensor, what: str) -> None:
        if self._paused:
            return
        reference = StorageWeakRef(tensor.untyped_storage())
        if reference.cdata not in self._live:
            self.allocated += 1
            self._live[reference.cdata] = (reference, what)

    def look(self) -> None:
        for key, (reference, what) in list(self._live.items()):
            if reference.expired():
                del self._live[key]
                if self._paused:
                    self.escaped.append(what)

    def _stop(self) -> None:
        self.look()
        assert self._watch is not None
        self._watch.__exit__(None, None, None)
        self._watch, self._comfy_active = None, False
        self.rogues += [what for _, what in self._live.values()]
        self._live.clear()

    def _check(self) -> None:
        if self._watch is None or self.failed:
            raise RuntimeError(FAILED)


class _Stream:
    def __init__(self, device: torch.device) -> None:
        self.device = device


class Recorder:
    """Takes the place of the host's functions for its records.

    Attributes:
        records: by thread; one that was cleaned up is gone.
        kept: all that there were.
        cleaned: how many times everything was cleaned up.
    """

    def __init__(self) -> None:
        self.records: dict[int, StrictRecord] = {}
        self.kept: list[StrictRecord] = []
        self.cleaned = 0

    def begin(self, device: torch.device) -> None:
        thread = threading.get_ident()
        if thread not in self.records:
            self.records[thread] = StrictRecord(device)
            self.kept.append(self.records[thread])
        self.records[thread].begin()

    def end(self) -> None:
        self.records[threading.get_ident()].end()

    @contextmanager
    def pause(self, sync: bool = False) -> Iterator[None]:
        """The host's: a switch, which is thrown only while a record is open."""
        self._switch(True)
        try:
            yield
        finally:
            self._switch(False)

    def _switch(self, paused: bool) -> None:
        record = self.records.get(threading.get_ident())
        if record is not None and record._comfy_active:
            record.pause(paused)

    def clean_up(self) -> None:
        self.cleaned += 1
        record = self.records.pop(threading.get_ident(), None)
        if record is not None:
            record.abort()

    @property
    def rogues(self) -> list[str]:
        return [what for record in self.kept for what in record.rogues]

    @property
    def escaped(self) -> list[str]:
        return [what for record in self.kept for what in record.escaped]

    @contextmanager
    def around_blocks(self, flux: torch.nn.Module, device: torch.device) -> Iterator[None]:
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


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """The host keeps records, with the strict stand-in."""
    recorder = Recorder()
    for name, function in (
        ("malloc_graph_begin", recorder.begin),
        ("malloc_graph_end", recorder.end),
        ("pause_malloc_graph", recorder.pause),
        ("cleanup_prefetch_queues", recorder.clean_up),
        ("MALLOC_GRAPHS", recorder.records),
    ):
        monkeypatch.setattr(comfy.model_prefetch, name, function, raising=False)
    return recorder
