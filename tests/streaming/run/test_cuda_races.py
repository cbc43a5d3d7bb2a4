"""The engine over cuda_backend.py, on a fake of torch.cuda: every access to memory is ordered, whatever the timing."""

from __future__ import annotations

import gc
import itertools
import random
import time
from typing import Any

import pytest
import torch
from every_plan import run_every_plan
from fake_cuda import FakeCuda, cuda
from models import hand_plan, learn, units_of
from page_drivers import RamPages
from race import NumberedModel
from weightstream.streaming import CudaBackend, Streamer, StreamingConfig, cut_model
from weightstream.streaming.memory.arena import Arena
from weightstream.streaming.memory.reader import Reader
from weightstream.streaming.memory.transfer import Move

__all__ = ["cuda"]

UNIT = 512
DEVICE = torch.device("cuda", 1)  # What is current is another.

pytestmark = pytest.mark.usefixtures("watched")


class Kernels:
    """What the model's units do on the device."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda

    def read(self, weight: torch.Tensor) -> None:
        self._cuda.kernel(reads=[weight])


def make(cuda: FakeCuda, blocks: int, slots: int, **settings: Any) -> tuple[NumberedModel, Streamer]:
    model = NumberedModel(blocks, Kernels(cuda))
    settings = {"segment_bytes": 0, "adaptive": False, "chunk_bytes": UNIT, **settings}
    backend = CudaBackend(DEVICE)
    backend.fine_bytes = UNIT // 2
    return model, Streamer(model, cut_model(model), backend, StreamingConfig(slots=slots, **settings))


@pytest.mark.slow
@pytest.mark.parametrize("copy_streams", range(4))
@pytest.mark.parametrize("slots", range(1, 4))
def test_page_locked_segments(cuda: FakeCuda, slots: int, copy_streams: int) -> None:
    everything = list(range(4))
    model, streamer = make(cuda, 4, slots, copy_streams=copy_streams)
    learn(streamer, lambda: model(everything))
    run_every_plan(cuda, model, streamer, slots)
    streamer.close()
    assert cuda.contexts == {1}


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("chunks", [1, 3])
def test_staged_segments_and_residents(
    cuda: FakeCuda, chunks: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunks == 3:
        cuda.give_pages(1)
    everything = list(range(4))
    cuda.accesses.watch_reader(monkeypatch)
    for pin, slots in itertools.product((False, True), (1, 2)):
        model, streamer = make(cuda, 4, slots, pin_memory=pin, read_threads=threads, chunks=chunks)
        for streamed in range(1, 2**4, 2):
            chosen = [index for index in everything if streamed >> index & 1]
            streamer.load(hand_plan(streamer, units_of(streamer, chosen), slots))
            for order in (everything, everything[::-1], everything):
                assert model(order) == order
            cuda.catch_up()
        streamer.close()
    assert cuda.accesses.host_writes > 100


@pytest.mark.parametrize("seed", range(4))
def test_page_locked_and_staged_segments_mixed(cuda: FakeCuda, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda.accesses.watch_reader(monkeypatch)
    settings = {"pinned_limit": 9 * UNIT, "chunks": 2, "read_threads": 2}
    model, streamer = make(cuda, 6, 3, copy_streams=2, **settings)
    streamer.load(hand_plan(streamer, range(18), 3))
    model([0, 1, 2, 3, 4, 5])
    streamer.finish_building()
    assert 0 < streamer.site.weight_copies.pinned_bytes(streamer.plan) < streamer.plan.streamed_bytes
    chance = random.Random(seed)
    for _ in range(20):
        order = [chance.randrange(6) for _ in range(chance.randint(1, 8))]
        assert model(order) == order
        if chance.random() < 0.3:
            cuda.catch_up()
    streamer.close()


def test_what_is_measured_is_measured_without_waiting(cuda: FakeCuda) -> None:
    model, streamer = make(cuda, 4, 2)
    streamer.load(hand_plan(streamer, range(12), 2))
    streamer.finish_building()
    for _ in range(4):
        assert streamer.run(lambda: model([0, 1, 2, 3])) == [0, 1, 2, 3]
        cuda.catch_up()
    assert streamer.profile.learned
    assert streamer.snapshot().step_seconds > 0
    streamer.close()


def test_the_ring_is_unlocked_when_no_copy_reads_it(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Residents have come through it, what streams has master copies already, and nobody has waited for the device."""
    cuda.accesses.watch_reader(monkeypatch)
    model, streamer = make(cuda, 4, 2)
    plan = hand_plan(streamer, units_of(streamer, [1, 3]), 2)
    streamer.site.prepare(plan, streamer)
    streamer.site.supply.builder.wait(lambda: None)
    streamer.load(plan)
    assert streamer.reader.ring_bytes > 0
    streamer.arrive_all()  # Their copies are queued.
    streamer.load(plan)
    assert streamer.reader.ring_bytes == 0
    assert model([0, 1, 2, 3]) == [0, 1, 2, 3]
    streamer.close()


def test_master_copies_go_when_no_copy_reads_them(cuda: FakeCuda) -> None:
    """Another model needs page-locked memory behind a step, whose copies for the next one are under way."""
    model, streamer = make(cuda, 4, 2)
    learn(streamer, lambda: model([0, 1, 2, 3]))
    streamer.load(hand_plan(streamer, units_of(streamer, [0, 1, 2, 3]), 2))
    streamer.finish_building()
    assert streamer.run(lambda: model([0, 1, 2, 3])) == [0, 1, 2, 3]
    assert streamer.give_up_masters(1 << 40) > 0
    assert cuda.registered == {}
    streamer.close()


def test_a_reader_that_is_closed_waits_for_its_copies(cuda: FakeCuda) -> None:
    backend = CudaBackend(DEVICE)
    backend.open(1)
    reader = Reader(backend, Arena(backend), 1, UNIT, 2)
    target, source = backend.allocate(4 * UNIT), torch.ones(4 * UNIT, dtype=torch.uint8)
    reader.wait(reader.transfer([Move(source, target, False)], [backend.mark()]), lambda: None)
    reader.close()
    assert cuda.registered == {}
    assert target.tolist() == [1] * 4 * UNIT
    backend.close()


def mapped(driver: RamPages) -> int:
    return sum(driver.mapped.values())


def test_residents_come_and_go_in_pages(cuda: FakeCuda) -> None:
    """Behind kernels that nobody has waited for, of this plan and of the one before."""
    driver = cuda.give_pages(1)
    model, streamer = make(cuda, 4, 2)
    everything, chance = [0, 1, 2, 3], random.Random(5)
    learn(streamer, lambda: model(everything))
    for _ in range(30):
        streamed = chance.sample(everything, chance.randint(1, 4))
        streamer.load(hand_plan(streamer, units_of(streamer, streamed), 2))
        streamer.finish_building()
        for _ in range(2):
            assert model(everything) == everything
        resident = streamer.plan.resident_bytes + streamer.outline.rest_bytes
        assert resident <= mapped(driver) < resident + 2 * driver.page_bytes * 13
    streamer.load(hand_plan(streamer, units_of(streamer, [2])[:1], 2))
    assert model(everything) == everything
    before = mapped(driver)
    assert streamer.give_way(9 * UNIT) >= 9 * UNIT
    assert mapped(driver) < before, "another model may need it at once"
    streamer.unload()
    assert driver.mapped == {}, "nobody may ever ask again"
    streamer.close()


def test_a_model_that_is_dropped_leaves_no_page(cuda: FakeCuda) -> None:
    driver = cuda.give_pages(1)
    model, streamer = make(cuda, 4, 2)
    streamer.load(hand_plan(streamer, units_of(streamer, [1]), 2))
    assert model([0, 1, 2, 3]) == [0, 1, 2, 3]
    assert driver.mapped
    del model, streamer
    give_up = time.monotonic() + 10
    while (driver.mapped or cuda.registered) and time.monotonic() < give_up:
        gc.collect()
        time.sleep(0.01)  # Threads that read end by themselves, and with them what they hold.
    assert driver.mapped == {}
