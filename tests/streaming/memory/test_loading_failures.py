# ruff: noqa: PT012, PT017
"""The file goes or changes, a read fails, memory or threads run short: an error may come, a wrong weight never."""

from __future__ import annotations

import errno
import gc
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import Doubled, PinningBackend, Stored
from weightstream.streaming import (
    CheckpointChangedError,
    CheckpointError,
    CpuBackend,
    DeviceMemoryError,
    State,
    VirtualMemory,
)
from weightstream.streaming.memory.master_copy import MasterCopy

pytestmark = pytest.mark.usefixtures("watched")


# -- the file goes, or changes ---------------------------------------------------------------------------------------


def replace(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(bytes(path.stat().st_size))
    os.replace(other, path)


@pytest.mark.parametrize("go", [os.remove, replace])
@pytest.mark.parametrize("pin_memory", [True, False])
def test_a_file_that_is_deleted_or_replaced_goes_on_streaming(
    tmp_path: Path, go: Callable[[Path], None], pin_memory: bool
) -> None:
    stored = Stored(tmp_path, pin_memory=pin_memory)
    go(stored.path)
    stored.streamer.load(stored.half)
    stored.check(2)
    stored.streamer.finish_building()
    stored.check(2)
    stored.streamer.unload()
    stored.streamer.load(stored.least)
    stored.check(2)
    stored.close()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def rewrite(path: Path) -> None:
    stat = path.stat()
    with open(path, "r+b") as file:
        file.seek(stat.st_size - 1000)
        file.write(bytes(1000))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))


@pytest.mark.parametrize("change", [truncate, rewrite])
@pytest.mark.parametrize("stage", ["before", "loaded", "building", "patching"])
def test_a_changed_file_is_an_error_that_names_it(
    tmp_path: Path,
    change: Callable[[Path], None],
    stage: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go_on = threading.Event()
    fill = MasterCopy.fill
    if stage == "building":
        monkeypatch.setattr(MasterCopy, "fill", lambda *args: go_on.wait(20) and fill(*args))
    stored = Stored(tmp_path, pin_memory=stage != "loaded")
    content = stored.path.read_bytes()
    if stage != "before":
        stored.streamer.load(stored.half)
        if stage != "building":
            stored.check()
        stored.streamer.drain()
    if stage == "patching":
        stored.streamer.finish_building()
    change(stored.path)
    if stage == "building":
        go_on.set()
        stored.streamer.finish_building()
        assert "no master copy" in caplog.text
    with pytest.raises(CheckpointChangedError, match=str(stored.path)):
        stored.streamer.load(stored.least, Doubled({"blocks.5.qkv.weight"} if stage == "patching" else set()))
        for _ in range(2):
            stored.model(stored.x)
    stored.close()
    # The mapped weights may be gone: whoever touched them now would end the process.
    stored.path.write_bytes(content)
    again = Stored(tmp_path)
    again.streamer.load(again.half)
    again.check(2)
    again.close()


# -- reading fails ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fail_reads(monkeypatch: pytest.MonkeyPatch) -> Callable[[range], None]:
    """Have reads fail, by their numbers from now on."""
    preadv = os.preadv
    counting = threading.Lock()
    state = {"count": 0, "failing": range(0)}

    def read(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        with counting:
            state["count"] += 1
            fails = state["count"] in state["failing"]
        if fails:
            buffers[0][: len(buffers[0]) // 2] = bytes(len(buffers[0]) // 2)
            raise OSError(errno.EIO, "Input/output error")
        return preadv(descriptor, buffers, offset)

    def fail(failing: range) -> None:
        state.update(count=0, failing=failing)

    monkeypatch.setattr(os, "preadv", read)
    return fail


@pytest.mark.slow
@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("pin_memory", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_a_failed_read_is_an_error_or_made_good(
    tmp_path: Path, fail_reads: Callable[[range], None], patched: bool, pin_memory: bool, count: int
) -> None:
    """While residents, patched master copies or the first steps are read, and in the builder."""
    names = {f"blocks.{block}.qkv.weight" for block in range(6)} if patched else set()
    failures = 0
    for first in range(1, 130, 16):
        stored = Stored(tmp_path, pin_memory=pin_memory)
        for name in names:
            stored.plain.get_parameter(name).mul_(2)
        expected = stored.plain(stored.x)
        fail_reads(range(first, first + count))
        for _ in range(6):
            try:
                if stored.streamer.state is not State.LOADED:
                    stored.streamer.load(stored.half, Doubled(names))
                assert torch.equal(stored.model(stored.x), expected)
            except CheckpointError as error:
                assert str(stored.path) in str(error)
                assert "tensor blocks." in str(error) or "tensor input" in str(error) or "tensor output" in str(error)
                failures += 1
        fail_reads(range(0))
        stored.streamer.load(stored.half, Doubled(names))
        assert torch.equal(stored.model(stored.x), expected)
        stored.close()
    assert failures > 0


def test_no_device_memory_hangs_on_the_error_of_a_failed_read(
    tmp_path: Path, fail_reads: Callable[[range], None]
) -> None:
    """It goes when the error has been handled, and not when the garbage collector comes."""
    backend = WeakBackend()
    stored = Stored(tmp_path, backend, pin_memory=False)
    gc.collect()
    gc.disable()
    try:
        for first in (1, 8, 40):
            fail_reads(range(first, 10_000))
            with pytest.raises(CheckpointError):
                stored.streamer.load(stored.half)
                stored.model(stored.x)
            stored.streamer.unload()
            assert backend.alive == 0
    finally:
        gc.enable()
    stored.close()


class WeakBackend(CpuBackend):
    """Knows which of its memory is really alive."""

    def __init__(self) -> None:
        super().__init__(VirtualMemory(10**9))
        self._storages: list[weakref.ref[bytearray]] = []

    class Memory(bytearray):
        __hash__ = object.__hash__

    def _empty(self, nbytes: int) -> torch.Tensor:
        memory = self.Memory(max(1, nbytes))
        self._storages.append(weakref.ref(memory))
        return torch.frombuffer(memory, dtype=torch.uint8)[:nbytes]

    @property
    def alive(self) -> int:
        return sum(reference() is not None for reference in self._storages)


# -- memory or threads run short -------------------------------------------------------------------------------------


def test_a_load_without_room_gives_everything_back(tmp_path: Path) -> None:
    """While residents are on their way."""
    full = Stored(tmp_path).streamer.model_bytes
    for budget in range(full // 20, full, full // 7):
        stored = Stored(tmp_path, PinningBackend(budget=budget))
        with pytest.raises(DeviceMemoryError):
            stored.streamer.load(stored.streamer.plan_for(10**9))
        assert stored.backend.allocated == stored.backend.store.allocated == 0
        assert stored.streamer.reader.ring_bytes == 0
        if budget > stored.streamer.minimum_bytes:
            stored.streamer.load(stored.least)
            stored.check()
        stored.close()


@pytest.mark.parametrize("fails_at", [0, 1])
def test_threads_that_do_not_start_are_an_error(tmp_path: Path, fails_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = Stored(tmp_path)
    start, started = threading.Thread.start, []

    def fail(thread: threading.Thread) -> None:
        if thread.name == "weightstream-read":
            started.append(thread)
            if len(started) == fails_at + 1:
                raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(RuntimeError, match="can't start"):
        stored.streamer.load(stored.half)
    stored.close()
    stored.streamer.load(stored.half)
    stored.check(2)
    stored.close()
