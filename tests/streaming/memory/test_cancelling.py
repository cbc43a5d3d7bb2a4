# ruff: noqa: PT012
"""A load or a step is cancelled, or a model dropped, while weights are on their way: in the end nothing is left."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import Doubled, PinningBackend, Stored
from reads import join_threads
from weightstream.streaming import PinBudget, State
from weightstream.streaming.memory import master_copy as masters
from weightstream.streaming.memory.in_order import InOrder
from weightstream.streaming.memory.reader import Reader

pytestmark = pytest.mark.usefixtures("watched")


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


@pytest.mark.slow
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


@pytest.mark.parametrize("resident", [False, True])
def test_cancelling_while_patches_are_computed(tmp_path: Path, resident: bool) -> None:
    """The next tensor is not begun, and what was begun is computed anew."""
    cancelled = [False]

    def watch(progress: object) -> None:
        if cancelled[0]:
            raise Cancelled

    class Cancelling(Doubled):
        def compute(self, name: str, original: torch.Tensor) -> torch.Tensor:
            cancelled[0] = len(self.computed) == 2
            return super().compute(name, original)

    stored = Stored(tmp_path, watch=watch)
    plan = stored.streamer.plan_for(10**9) if resident else stored.least
    names = {f"blocks.{block}.qkv.weight" for block in range(6)}
    patches = Cancelling(names)
    with pytest.raises(Cancelled):
        stored.streamer.load(plan, patches)
    assert len(patches.computed) == 3
    assert stored.backend.allocated == 0
    cancelled[0] = False
    for name in names:
        stored.plain.get_parameter(name).mul_(2)
    stored.expected = stored.plain(stored.x)
    stored.streamer.load(plan, Doubled(names))
    stored.check_plain()
    stored.close()


def test_cancelling_while_masters_of_patched_units_are_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread goes on behind the range that it reads."""
    monkeypatch.setattr(masters, "BUILD_BYTES", 512)
    watch = CancelAt()
    stored = Stored(tmp_path, watch=watch, fill_threads=2)
    ranges: list[float] = []
    pause = 0.1  # For who cancels, on a machine that has other things to do.
    read_range = masters.read_range

    def counted(*args: object) -> None:
        ranges.append(time.monotonic())
        time.sleep(pause)
        read_range(*args)

    monkeypatch.setattr(masters, "read_range", counted)
    watch.arm(1)
    with pytest.raises(Cancelled):
        stored.streamer.load(stored.least, Doubled({f"blocks.{block}.qkv.weight" for block in range(6)}))
    ended = time.monotonic()
    time.sleep(0.1)
    assert ranges[-1] < ended
    unit = stored.streamer.blocks.units[0]
    assert len(ranges) < 6 * unit.nbytes // 512, "not all"
    pause = 0.0
    stored.streamer.load(stored.least)
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


@pytest.mark.slow
@pytest.mark.parametrize("collected", [True, False])
@pytest.mark.parametrize("under_way", ["master copies", "transfers", "transfers through a page-locked ring"])
def test_a_model_is_dropped(tmp_path: Path, gate: Gate, under_way: str, collected: bool) -> None:
    building = under_way == "master copies"
    backend, pins = PinningBackend(permits=3 if building else None), PinBudget()
    stored = Stored(tmp_path, backend, pins, pin_memory=under_way != "transfers")
    if building:
        stored.streamer.prepare(stored.streamer.minimum_bytes)
        for _ in range(4):
            backend.waits.acquire()
    else:
        stored.streamer.load(stored.least)
        stored.check()
        stored.streamer.drain()
        gate.open.clear()
        stored.streamer.invalidate()
        assert not stored.streamer.reader.idle
    go_on = backend.let_go_on if building else gate.open.set
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
        go_on()
        join_threads()
        assert backend.registered == {}
        assert pins.used == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("place", ["reads", "takes"])
def test_the_collector_takes_a_model_on_a_thread_that_reads_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: Gate, place: str
) -> None:
    """It may hold any lock at that moment."""
    backend, pins = PinningBackend(), PinBudget()
    stored = Stored(tmp_path, backend, pins, pin_memory=True)
    stored.streamer.load(stored.least)
    stored.check()
    stored.streamer.drain()
    collecting, collected = threading.Event(), threading.Event()

    def collect() -> None:
        if collecting.is_set() and not collected.is_set():
            collected.set()
            gc.collect()

    if place == "reads":
        preadv = os.preadv
        monkeypatch.setattr(os, "preadv", lambda *arguments: (preadv(*arguments), collect())[0])
    else:
        begin = InOrder.begin
        monkeypatch.setattr(InOrder, "begin", lambda order, item: (begin(order, item), collect())[0])
    reference = weakref.ref(stored.streamer)
    gc.disable()
    try:
        stored.itself = stored
        stored.streamer.site.supply.reader.close()
        gate.open.clear()
        stored.streamer.invalidate()
        del stored
        collecting.set()
        gate.open.set()
        assert collected.wait(10)
        join_threads()
        assert reference() is None
        assert backend.store.allocated == 0
        assert backend.registered == {}
        assert pins.used == 0
    finally:
        gc.enable()


PROGRAM = """
import sys, types
from pathlib import Path
pack = types.ModuleType("weightstream")
pack.__path__ = [sys.argv[1]]
sys.modules["weightstream"] = pack
sys.path.insert(0, sys.argv[1] + "/tests/streaming")
import torch
from models import CpuBackend, Stored, VirtualMemory
stored = Stored(Path(sys.argv[2]), CpuBackend(VirtualMemory(10**9)), dtype=torch.bfloat16, pin_memory=False,
                read_threads=8, chunks=16, chunk_bytes=512)
stored.streamer.load(stored.least)
for _ in range(3):
    stored.run()
stored.streamer.invalidate()
"""


BUILDING = """
import os, time
preadv = os.preadv
def slow(*args):
    time.sleep(0.2)
    return preadv(*args)
from models import Stored
stored = Stored(Path(sys.argv[2]))
os.preadv = slow
stored.streamer.prepare(stored.streamer.minimum_bytes)
started = time.monotonic()
import atexit
from weightstream.streaming import threads
atexit.unregister(threads._end_all)
atexit.register(lambda: print(time.monotonic() - started))
atexit.register(threads._end_all)
"""


@pytest.mark.slow
def test_a_process_does_not_wait_for_what_is_built_behind(tmp_path: Path) -> None:
    """A builder that has seconds of work left."""
    root = Path(__file__).parents[3]
    program = PROGRAM.partition("stored = ")[0] + BUILDING
    command = [sys.executable, "-c", program, str(root), str(tmp_path)]
    ended = subprocess.run(command, timeout=60, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert float(ended.stdout) < 2


@pytest.mark.slow
def test_a_process_may_end_while_weights_are_read(tmp_path: Path) -> None:
    """A thread that is inside of torch at that moment would abort it."""
    root = Path(__file__).parents[3]
    for _ in range(4):
        ended = subprocess.run([sys.executable, "-c", PROGRAM, str(root), str(tmp_path)], timeout=60, check=False)
        assert ended.returncode == 0
