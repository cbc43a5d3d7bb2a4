# ruff: noqa: PT012, PT017
"""Weights come from the file, through a small ring; master copies are made behind the steps. Whatever fails or is cut
short on the way: an error may come, a wrong weight never, and in the end nothing is left."""

from __future__ import annotations

import errno
import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from models import PinningBackend, Stored, Transformer
from test_streamer_patches import Doubled
from weightstream.streaming import (
    CheckpointChangedError,
    CheckpointError,
    CheckpointFile,
    CpuBackend,
    DeviceMemoryError,
    PinBudget,
    State,
    VirtualMemory,
    masters,
)
from weightstream.streaming.builder import Builder
from weightstream.streaming.masters import UnitCopies
from weightstream.streaming.reader import Reader

pytestmark = pytest.mark.usefixtures("watched")


class Reads:
    """What was read from files since it was last asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._nbytes = 0
        self._counting = threading.Lock()
        read_into = CheckpointFile.read_into

        def count(file: CheckpointFile, target: memoryview, offset: int) -> None:
            read_into(file, target, offset)
            with self._counting:
                self._nbytes += target.nbytes

        monkeypatch.setattr(CheckpointFile, "read_into", count)

    def take(self) -> int:
        nbytes, self._nbytes = self._nbytes, 0
        return nbytes


def tensor_bytes(stored: Stored, units: list[int] | None = None) -> int:
    """Bytes of tensors, as they are in the file, of units and of the rest."""
    blocks = stored.streamer.blocks
    chosen = blocks.units if units is None else [blocks.units[unit] for unit in units]
    return sum(spec.original.nbytes for unit in (*chosen, blocks.rest) for spec in unit.layout.specs)


def empty_mapping(stored: Stored) -> None:
    """Zero the mapping, which is private; the file has the weights still."""
    for tensor in stored.model.state_dict().values():
        tensor.detach().numpy().fill(0)
    assert not torch.equal(stored.model(stored.x), stored.expected)


# -- what is read, and from where ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pin_memory", [True, False])
@pytest.mark.parametrize("copy_streams", [0, 2])
def test_weights_come_from_the_file_and_not_from_its_mapping(
    tmp_path: Path, copy_streams: int, pin_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = Stored(tmp_path, copy_streams=copy_streams, pin_memory=pin_memory)
    assert all(spec.source is not None for spec in stored.streamer.blocks.specs)
    empty_mapping(stored)
    reads = Reads(monkeypatch)
    stored.streamer.load(stored.streamer.plan_for(10**9))
    assert reads.take() == tensor_bytes(stored)
    stored.check()
    for plan in (stored.half, stored.least):
        stored.streamer.load(plan)
        stored.check(3)
    if pin_memory:
        stored.streamer.finish_building()
        stored.check()
        reads.take()
    stored.check()
    assert (reads.take() == 0) is pin_memory
    stored.close()


@pytest.mark.parametrize("stored_dtype", [torch.float8_e4m3fn, torch.float16, torch.float32])
def test_weights_are_cast_on_the_way(tmp_path: Path, stored_dtype: torch.dtype) -> None:
    for pin_memory in (True, False):
        stored = Stored(tmp_path, stored=stored_dtype, dtype=torch.bfloat16, pin_memory=pin_memory)
        for plan in (stored.streamer.plan_for(10**9), stored.half, stored.least):
            stored.streamer.load(plan)
            stored.check(2)
        stored.streamer.finish_building()
        stored.check(2)
        stored.close()


def keep_in_memory(model: Transformer) -> None:
    for block in model.blocks[::2]:
        block.qkv.weight = torch.nn.Parameter(block.qkv.weight * 2, requires_grad=False)


def keep_strided(model: Transformer) -> None:
    """One fills its memory in another order, one leaves gaps."""
    for block in model.blocks:
        block.qkv.weight = torch.nn.Parameter(block.qkv.weight.t().contiguous().t(), requires_grad=False)
        wide = torch.cat([block.out.weight, block.out.weight], 1)
        block.out.weight = torch.nn.Parameter(wide[:, :32], requires_grad=False)


@pytest.mark.parametrize("change", [keep_in_memory, keep_strided])
def test_what_the_host_has_changed_comes_from_memory(tmp_path: Path, change: Callable[[Transformer], None]) -> None:
    stored = Stored(tmp_path, change=change)
    assert any(spec.source is None for spec in stored.streamer.blocks.specs)
    for plan in (stored.streamer.plan_for(10**9), stored.half, stored.least):
        stored.streamer.load(plan)
        stored.check(2)
    stored.streamer.finish_building()
    stored.check(2)
    stored.close()


def test_what_the_file_lacks_is_zero(tmp_path: Path) -> None:
    def lack(model: Transformer) -> None:
        for block in model.blocks:
            place = "cpu" if lack.real else "meta"
            block.out.bias = torch.nn.Parameter(torch.zeros(32, device=place), requires_grad=False)
        lack.real = False

    lack.real = True  # The plain model comes first.
    stored = Stored(tmp_path, change=lack)
    assert stored.model.blocks[3].out.bias.is_meta
    for plan in (stored.streamer.plan_for(10**9), stored.half, stored.least):
        stored.streamer.load(plan)
        stored.check(2)
    stored.streamer.finish_building()
    stored.check(2)
    stored.close()


@pytest.mark.parametrize("chunk_bytes", [1, 511, 513, 5000, 1 << 20])
@pytest.mark.parametrize("chunks", [1, 2])
def test_any_ring_does(tmp_path: Path, chunk_bytes: int, chunks: int) -> None:
    stored = Stored(tmp_path, chunk_bytes=chunk_bytes, chunks=chunks, read_threads=3, pin_memory=False)
    stored.streamer.load(stored.half)
    stored.check()
    stored.close()


def test_steps_of_a_host_in_inference_mode_are_right(tmp_path: Path) -> None:
    stored = Stored(tmp_path)
    with torch.inference_mode():
        stored.streamer.load(stored.half)
        stored.check()
    stored.check()
    with torch.inference_mode():
        stored.streamer.finish_building()
        stored.check(2)
        stored.streamer.load(stored.least)
        stored.check(2)
    stored.close()


# -- master copies are built beside the steps ------------------------------------------------------------------------


def test_steps_are_right_before_while_and_after_masters_are_built(tmp_path: Path) -> None:
    backend = PinningBackend(permits=1)  # The ring.
    stored = Stored(tmp_path, backend)
    empty_mapping(stored)
    stored.streamer.load(stored.least)
    assert stored.streamer.building
    for _ in stored.streamer.blocks.units:
        backend.waits.acquire()
        assert torch.equal(stored.model(stored.x), stored.expected)
        backend.permits.release()
    stored.streamer.finish_building()
    snapshot = stored.streamer.snapshot()
    assert len(backend.registered) == len(stored.streamer.blocks.units) + 1
    assert torch.equal(stored.model(stored.x), stored.expected)
    assert (snapshot.note, snapshot.building) == ("", False)
    assert snapshot.ring_bytes > 0
    stored.streamer.load(stored.streamer.plan)
    snapshot = stored.streamer.snapshot()
    assert (snapshot.ring_bytes, snapshot.staged_bytes) == (0, 0)
    assert snapshot.explain.endswith("from page-locked memory")
    stored.close()


def test_the_ring_does_not_come_back_when_all_is_page_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the load, and no step, takes the master copies from the builder."""
    stored = Stored(tmp_path)
    stored.streamer.load(stored.least)
    stored.streamer.finish_building()
    stored.streamer.load(stored.streamer.plan)
    reads = Reads(monkeypatch)
    for _ in range(2):
        assert torch.equal(stored.model(stored.x), stored.expected)
        assert stored.streamer.reader.ring_bytes == 0
    assert reads.take() <= 2 * stored.streamer.plan.slot_bytes, "what was on its way before"
    stored.close()


def test_building_that_is_stopped_is_taken_up_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masters, "BUILD_BYTES", 512)
    stored = Stored(tmp_path)
    reads = Reads(monkeypatch)
    begun = threading.Semaphore(0)
    go_on = threading.Semaphore(0)
    read_range = masters.read_range

    def held(*arguments: object) -> None:
        begun.release()
        go_on.acquire()
        read_range(*arguments)

    monkeypatch.setattr(masters, "read_range", held)
    stored.streamer.prepare(stored.streamer.minimum_bytes)
    for _ in range(5):  # Amid the second unit at the least.
        begun.acquire()
        go_on.release()
    begun.acquire()
    halting = threading.Thread(target=stored.streamer._supply.halt)
    halting.start()
    while not stored.streamer._supply.builder._stopping.is_set():
        time.sleep(0)
    go_on.release(10_000)
    halting.join()
    assert reads.take() <= 6 * 512
    stored.streamer.prepare(stored.streamer.minimum_bytes)
    stored.streamer.finish_building()
    units = range(len(stored.streamer.blocks.units))
    assert reads.take() <= tensor_bytes(stored, list(units)) - 6 * 512 + 4 * 512
    stored.streamer.load(stored.least)
    stored.check(2)
    stored.close()


def test_a_patch_comes_while_a_master_is_half_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masters, "BUILD_BYTES", 512)
    stored = Stored(tmp_path)
    copies = stored.streamer._placement.copies(1)
    names = {spec.name for spec in copies.unit.layout.specs}
    for name in names:
        stored.plain.get_parameter(name).mul_(2)
    stopped = iter([False, False, True])
    assert copies.fill_master(stored.streamer._supply.arena, lambda: next(stopped), False)
    assert copies.master_bytes == copies.unit.nbytes
    stored.streamer.load(stored.least, Doubled(names))
    stored.streamer.finish_building()
    expected = stored.plain(stored.x)
    for _ in range(2):
        assert torch.equal(stored.model(stored.x), expected)
    units = stored.streamer.blocks.units
    assert stored.pins.used == sum(unit.nbytes for unit in units) + stored.streamer.reader.ring_bytes
    stored.close()


def test_preparing_twice_builds_once(tmp_path: Path) -> None:
    backend = PinningBackend(permits=0)
    stored = Stored(tmp_path, backend, build_threads=2)
    stored.streamer.prepare(stored.streamer.minimum_bytes)
    backend.waits.acquire()
    threading.Timer(0.05, backend.let_go_on).start()
    stored.streamer.prepare(stored.streamer.minimum_bytes)
    stored.streamer.finish_building()
    stored.streamer.prepare(stored.streamer.minimum_bytes)
    stored.streamer.finish_building()
    units = stored.streamer.blocks.units
    assert stored.pins.used == sum(backend.registered.values()) == sum(unit.nbytes for unit in units)
    assert stored.streamer.snapshot().pinned_bytes == stored.pins.used
    stored.streamer.load(stored.least)
    stored.check(2)
    stored.close()


def test_prepared_master_copies_are_used_by_the_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = Stored(tmp_path)
    stored.streamer.prepare(stored.streamer.minimum_bytes)
    stored.streamer.finish_building()
    reads = Reads(monkeypatch)
    stored.streamer.load(stored.least)
    assert torch.equal(stored.model(stored.x), stored.expected)
    assert reads.take() == tensor_bytes(stored, [])
    assert stored.streamer.snapshot().staged_bytes == 0
    stored.close()


def test_a_model_that_fits_needs_no_preparation(tmp_path: Path) -> None:
    stored = Stored(tmp_path)
    stored.streamer.prepare(10**9)
    assert not stored.streamer.building
    assert stored.pins.used == 0


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
    fill_master = UnitCopies.fill_master
    if stage == "building":
        monkeypatch.setattr(UnitCopies, "fill_master", lambda *args: go_on.wait(20) and fill_master(*args))
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


# -- page-locking fails, or is not allowed ---------------------------------------------------------------------------


@pytest.mark.parametrize("n", [*range(1, 6), 12, 20])
def test_a_refused_registration_is_no_error(tmp_path: Path, n: int) -> None:
    backend = PinningBackend(refused=[n])
    stored = Stored(tmp_path, backend)
    stored.streamer.load(stored.least)
    stored.streamer.finish_building()
    ceiling = stored.pins._ceiling
    assert stored.pins.failures == 1
    stored.check_plain()
    snapshot = stored.streamer.snapshot()
    assert "page-locking failed (error 2)" in snapshot.note
    assert snapshot.pinned_bytes == stored.pins.used == sum(backend.registered.values())
    if n > 1:
        assert ceiling is not None
        assert "staged from the file or pageable memory (page-locking failed (error 2))" in snapshot.explain
        assert snapshot.staged_bytes > 0
        assert backend.requests == n, "what was refused once is not asked for again"
    stored.close()
    stored.streamer.load(stored.least)
    stored.streamer.finish_building()
    stored.check_plain()
    snapshot = stored.streamer.snapshot()
    assert (snapshot.staged_bytes, snapshot.note) == (0, "")
    stored.close()


def test_every_registration_may_be_refused(tmp_path: Path) -> None:
    backend = PinningBackend(refused=range(10**9))
    stored = Stored(tmp_path, backend)
    for plan in (stored.half, stored.least):
        stored.streamer.load(plan)
        stored.check_plain()
        stored.streamer.finish_building()
        assert stored.streamer.snapshot().staged_bytes == plan.streamed_bytes
    stored.close()


class Broken(BaseException):
    """Something that nobody expects."""


def test_a_registration_that_is_cut_short_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def register(buffer: torch.Tensor) -> str | None:
        raise Broken

    stored = Stored(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(stored.backend, "register", register)
        with pytest.raises(Broken):
            stored.streamer.load(stored.half)
    stored.close()
    stored.streamer.load(stored.half)
    stored.check(2)
    stored.close()


@pytest.mark.parametrize("fails_at", [0, 1, 2])
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


def test_full_memory_is_told_and_all_is_staged(tmp_path: Path) -> None:
    stored = Stored(tmp_path, pins=PinBudget(spare=lambda: 0))
    stored.streamer.load(stored.least)
    stored.streamer.finish_building()
    stored.check(2)
    snapshot = stored.streamer.snapshot()
    assert snapshot.note == "host memory is nearly full"
    assert "(host memory is nearly full)" in snapshot.explain
    assert snapshot.staged_bytes == stored.streamer.plan.streamed_bytes
    assert snapshot.pinned_bytes == 0
    stored.close()


def test_what_fits_into_memory_is_page_locked(tmp_path: Path) -> None:
    pins = PinBudget(spare=lambda: 150_000 - pins.used)
    stored = Stored(tmp_path, pins=pins)
    stored.streamer.load(stored.least)
    stored.streamer.finish_building()
    stored.check(2)
    snapshot = stored.streamer.snapshot()
    assert snapshot.note == "host memory is nearly full"
    assert 0 < pins.used <= 150_000
    assert 0 < snapshot.staged_bytes < stored.streamer.plan.streamed_bytes
    stored.close()


def test_the_garbage_collector_may_free_page_locked_memory_while_it_is_counted(tmp_path: Path) -> None:
    """Asking for what is spare makes objects, so a model that nobody uses any more may be collected right there."""
    collecting = threading.Event()
    pins = PinBudget(spare=lambda: 10**9 + (gc.collect() * 0 if collecting.is_set() else 0))
    dropped = Stored(tmp_path, pins=pins)
    dropped.streamer.load(dropped.least)
    dropped.streamer.finish_building()
    dropped.itself = dropped
    gc.disable()
    try:
        del dropped
        collecting.set()
        assert pins.take(1000) is None
        pins.give(1000)
        join_threads()
        assert pins.used == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["limit", "spare"])
def test_the_least_recently_used_model_gives_way(tmp_path: Path, kind: str) -> None:
    size = sum(unit.nbytes for unit in Stored(tmp_path).streamer.blocks.units)
    limit = size * 9 // 4
    pins = PinBudget(limit=limit) if kind == "limit" else PinBudget(spare=lambda: limit - pins.used)
    models = [Stored(tmp_path, pins=pins, seed=seed) for seed in range(3)]
    for stored in models:
        stored.streamer.load(stored.least)
        stored.check(2)
        stored.streamer.finish_building()
        stored.check()
    first, second, third = (stored.streamer.snapshot() for stored in models)
    assert first.staged_bytes > 0
    assert models[0].streamer.state is State.REDUCED
    assert second.staged_bytes == third.staged_bytes == 0
    for turn in (0, 1, 2, 1, 0, 2):
        stored = models[turn]
        stored.check()
        stored.streamer.finish_building()
        stored.check()
        assert stored.streamer.snapshot().staged_bytes == 0, "it has taken its memory back"
        assert pins.used <= limit
    for stored in models:
        stored.streamer.close()
    assert pins.used == 0


def test_a_patched_model_that_gave_way_is_patched_again(tmp_path: Path) -> None:
    names = {f"blocks.{block}.mlp.0.weight" for block in range(6)}
    stored = Stored(tmp_path)
    for name in names:
        stored.plain.get_parameter(name).mul_(2)
    expected = stored.plain(stored.x)
    patches = Doubled(names)

    def run() -> torch.Tensor:
        return stored.streamer.run(
            lambda: stored.model(stored.x), reload=lambda plan: stored.streamer.load(plan, patches)
        )

    stored.streamer.load(stored.least, patches)
    assert torch.equal(run(), expected)
    for nbytes in (1, 40_000, 10**9):
        assert stored.streamer.give_up_masters(nbytes) > 0
        assert stored.streamer.state is State.REDUCED
        assert torch.equal(run(), expected)
    assert stored.streamer.give_up_masters(10**9) > 0
    stored.streamer.unload()
    assert stored.streamer.give_up_masters(10**9) == 0
    assert stored.pins.used == 0
    stored.streamer.load(stored.least)
    assert not torch.equal(stored.model(stored.x), expected)
    stored.close()


# -- cancelling ------------------------------------------------------------------------------------------------------


class Cancelled(BaseException):
    """As the host's interrupt: no ``Exception``."""


class Gate:
    """Reads wait at it while it is shut."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.open.set()
        self.begun = 0
        self._counting = threading.Lock()
        preadv = os.preadv

        def read(descriptor: int, buffers: list[memoryview], offset: int) -> int:
            with self._counting:
                self.begun += 1
            self.open.wait()
            return preadv(descriptor, buffers, offset)

        monkeypatch.setattr(os, "preadv", read)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


class CancelAt:
    """Cancels at the n-th call from :meth:`arm` on."""

    def __init__(self) -> None:
        self._left = 0

    def arm(self, n: int) -> None:
        self._left = n

    def __call__(self, progress: object) -> None:
        self._left -= 1
        if self._left == 0:
            raise Cancelled


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("stage", ["residents", "masters", "step"])
def test_who_cancels_waits_for_the_reads_under_way_alone(
    tmp_path: Path, gate: Gate, stage: str, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = CancelAt()
    stored = Stored(tmp_path, watch=watch, pin_memory=stage == "masters")
    streamer = stored.streamer
    names = {f"blocks.{block}.qkv.weight" for block in range(6)} if stage == "masters" else set()
    abandon = Reader.abandon

    def open_when_abandoned(reader: Reader) -> None:
        """The gate opens once nobody wants what waits behind it."""
        pending = list(reader._pending)
        if not pending:
            return abandon(reader)

        def wait() -> None:
            while not all(transfer.abandoned or transfer.queued.done() for transfer in pending):
                time.sleep(0.001)
            gate.open.set()

        waiting = threading.Thread(target=wait)
        waiting.start()
        abandon(reader)
        waiting.join()

    monkeypatch.setattr(Reader, "abandon", open_when_abandoned)
    if stage == "step":
        streamer.load(stored.least)
        stored.check()
        streamer.drain()
    gate.open.clear()
    before = gate.begun
    watch.arm(k)
    opener = threading.Timer(0.05 * k + 0.4, gate.open.set)
    if stage == "masters":
        opener.start()  # A pool of threads waits for its tasks under way: they go on when the rest was cancelled.
    try:
        with pytest.raises(Cancelled):
            if stage == "step":
                # What is prefetched already waits at the gate.
                stored.run()
                stored.run()
            else:
                streamer.load(stored.half, Doubled(names))
        begun = gate.begun - before
    finally:
        opener.cancel()
    if stage == "residents":
        assert begun <= streamer.config.read_threads
        assert streamer.state is State.UNLOADED
        assert stored.backend.allocated == 0
    elif stage == "masters":
        assert begun <= 2 * streamer.config.fill_threads, "two tensors in a unit"
        assert streamer.state is State.UNLOADED
        assert stored.backend.allocated == 0
    gate.open.set()
    streamer.unload()
    assert stored.backend.allocated == 0
    streamer.load(stored.half)
    stored.check(2)
    stored.close()


def test_a_cancelled_step_is_followed_by_a_right_one(tmp_path: Path, gate: Gate) -> None:
    watch = CancelAt()
    stored = Stored(tmp_path, watch=watch, pin_memory=False)
    stored.streamer.load(stored.least)
    stored.check(3)
    for k in (1, 2):
        stored.streamer.drain()
        gate.open.clear()
        watch.arm(k)
        with pytest.raises(Cancelled):
            for _ in range(3):
                stored.run()
        gate.open.set()
        stored.check(2)
    stored.close()


# -- loading again -----------------------------------------------------------------------------------------------------


def test_a_second_load_reads_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = Stored(tmp_path)
    streamer, model = stored.streamer, stored.model
    plan = stored.half
    streamer.load(plan)
    streamer.finish_building()
    assert torch.equal(model(stored.x), stored.expected)
    assert torch.equal(model(stored.x), stored.expected)
    streamer.load(plan)
    reads = Reads(monkeypatch)
    streamer.load(plan)
    assert torch.equal(model(stored.x), stored.expected)
    assert reads.take() == 0, "the same plan"
    names = {"blocks.0.qkv.weight", "blocks.5.qkv.weight", "input.weight"}
    streamer.load(plan, Doubled(names))
    assert reads.take() == 0, "patches are computed from the originals"
    assert not torch.equal(model(stored.x), stored.expected)
    streamer.load(plan, Doubled({"blocks.0.qkv.weight"}))
    gone = ("blocks.5.qkv.weight", "input.weight")
    assert reads.take() == sum(stored.plain.get_parameter(name).nbytes for name in gone), "of a clone, with other ones"
    streamer.load(plan)
    assert reads.take() == stored.plain.get_parameter("blocks.0.qkv.weight").nbytes
    assert torch.equal(model(stored.x), stored.expected)
    streamer.unload()
    streamer.load(plan)
    assert torch.equal(model(stored.x), stored.expected)
    assert reads.take() == tensor_bytes(stored, list(plan.resident)), "after unloading: the residents"
    stored.close()


# -- at any time -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["waiting", "free"])
def building(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stored]:
    """A loaded model, whose builder waits until it is told to stop, or is somewhere."""
    backend = PinningBackend(permits=3 if request.param == "waiting" else 10_000)
    stored = Stored(tmp_path, backend)
    stop = Builder.stop

    def let_go_on(builder: Builder) -> None:
        threading.Timer(0.02, backend.let_go_on).start()
        stop(builder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Builder, "stop", let_go_on)
        stored.streamer.load(stored.half)
        stored.streamer._supply.builder.release()  # As after the first step.
        if request.param == "waiting":
            for _ in range(4):
                backend.waits.acquire()
        yield stored
    backend.let_go_on()


def test_closing_while_building(building: Stored) -> None:
    building.check()
    building.close()
    building.streamer.load(building.least)
    building.check(2)
    building.close()


def test_loading_another_plan_while_building(building: Stored) -> None:
    for plan in (building.least, building.streamer.plan_for(10**9), building.half):
        building.streamer.load(plan)
        building.check(2)
    building.close()


def test_giving_masters_up_while_building(building: Stored) -> None:
    building.check()
    building.streamer.give_up_masters(1)
    building.check(2)
    building.streamer.give_up_masters(10**9)
    assert building.pins.used == 0
    building.check(2)
    building.close()


def test_giving_residents_up_while_building(building: Stored) -> None:
    building.check()
    assert building.streamer.give_way(10_000) >= 10_000
    building.check(2)
    building.close()


def test_writing_to_weights_while_building(building: Stored) -> None:
    """What somebody writes to a module goes into the next steps, and not into the file's weights."""
    streamer = building.streamer
    names = {"blocks.0.qkv.weight", "blocks.5.qkv.weight"}
    building.check()
    streamer.make_masters(names)
    for name in names:
        building.model.get_parameter(name).mul_(2)
        building.plain.get_parameter(name).mul_(2)
    streamer.invalidate()
    expected = building.plain(building.x)
    for _ in range(2):
        assert torch.equal(building.model(building.x), expected)
    building.backend.let_go_on()
    streamer.finish_building()
    for _ in range(2):
        assert torch.equal(building.model(building.x), expected)
    building.close()


def test_moving_while_building(building: Stored) -> None:
    building.check()
    before = building.backend
    building.streamer.move_to(PinningBackend())
    assert before.store.allocated == building.pins.used == 0
    assert before.registered == {}
    building.backend = building.streamer.backend
    building.streamer.load(building.least)
    building.check(2)
    building.close()


@pytest.mark.parametrize("collected", [True, False])
def test_a_model_is_dropped_while_building(tmp_path: Path, collected: bool) -> None:
    backend, pins = PinningBackend(permits=3), PinBudget()
    stored = Stored(tmp_path, backend, pins)
    stored.streamer.load(stored.half)
    stored.check()
    for _ in range(4):
        backend.waits.acquire()
    reference = weakref.ref(stored.streamer)
    gc.disable()
    try:
        if collected:
            stored.itself = stored
        del stored
        if collected:
            gc.collect()
        assert reference() is None
        assert backend.store.allocated == 0
        backend.let_go_on()
        join_threads()
        assert backend.registered == {}
        assert pins.used == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("collected", [True, False])
def test_a_model_is_dropped_with_transfers_under_way(tmp_path: Path, gate: Gate, collected: bool) -> None:
    backend, pins = PinningBackend(), PinBudget()
    stored = Stored(tmp_path, backend, pins, pin_memory=False)
    stored.streamer.load(stored.least)
    stored.check()
    stored.streamer.drain()
    gate.open.clear()
    stored.streamer.invalidate()
    assert not stored.streamer.reader.idle
    reference = weakref.ref(stored.streamer)
    gc.disable()
    try:
        if collected:
            stored.itself = stored
        del stored
        if collected:
            gc.collect()
        assert reference() is None
        assert backend.store.allocated == 0
        gate.open.set()
        join_threads()
        assert backend.registered == {}
        assert pins.used == 0
    finally:
        gc.enable()


def test_a_refusal_keeps_nothing_that_was_filled_before(tmp_path: Path) -> None:
    """The first step ends, and another plan is made, before anything that was filled has been page-locked."""
    backend, pins = PinningBackend(refused=range(2, 10**9)), PinBudget()
    stored = Stored(tmp_path, backend, pins)
    stored.streamer.load(stored.least)
    builder = stored.streamer._supply.builder
    while any(not future.done() for future in builder._futures):
        time.sleep(0.001)
    builder.stop()
    assert pins.used > stored.streamer.reader.ring_bytes
    stored.streamer._supply.build(stored.streamer._placement.unbuilt(stored.streamer.plan), stored.streamer)
    stored.streamer.finish_building()
    assert pins.used == pins.locked == stored.streamer.reader.ring_bytes
    stored.check(2)
    stored.close()
    assert pins.used == pins.locked == 0


def join_threads() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith(("weightstream-read", "weightstream-build")):
            thread.join(10)
            assert not thread.is_alive()
