"""Weights that come over the links of several devices: the right ones, in order, and what remains when that fails."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from every_plan import run_every_plan
from fake_cuda import FakeCuda, cuda
from models import X, hand_plan, learn, make_transformer, units_of
from race import NumberedModel, RaceBackend
from virtual_time import Clock, TimedBackend
from weightstream.streaming import (
    Backend,
    CpuBackend,
    CudaBackend,
    Streamer,
    StreamingConfig,
    VirtualMemory,
    cut_model,
)
from weightstream.streaming.devices import backend as backends
from weightstream.streaming.devices import copies
from weightstream.streaming.devices.copies import cut
from weightstream.streaming.split import feeding
from weightstream.streaming.split.assignment import DeviceRoom
from weightstream.streaming.split.feeder import Feeder
from weightstream.streaming.split.feeding import feeding_is_faster, find_feeders
from weightstream.streaming.split.links import Links

__all__ = ["cuda"]

UNIT = 512


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of these models are small, and are cut up all the same."""
    monkeypatch.setattr(backends, "LEAST_FED_BYTES", 0)
    monkeypatch.setattr(copies, "ALIGNMENT", 128)


def feed(home: Backend, *helpers: Backend, chunks: int = 2) -> None:
    home.feeders += [Feeder(helper, chunk_bytes=192, chunks=chunks) for helper in helpers]


def make(
    model: torch.nn.Module, backend: Backend, slots: int, copy_streams: int = 2, segment_bytes: int = 3 * UNIT
) -> Streamer:
    config = StreamingConfig(copy_streams, slots, segment_bytes=segment_bytes, adaptive=False)
    return Streamer(model, cut_model(model), backend, config)


# -- what goes where ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", range(1, 5))
def test_copies_are_cut_into_like_parts(parts: int) -> None:
    for sizes in itertools.product((128, 256, 384, 1024), repeat=3):
        targets = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
        sources = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]
        found = cut(list(zip(targets, sources, strict=True)), parts)
        assert len(found) <= parts
        given = [sum(target.nbytes for target, _ in part) for part in found]
        assert sum(given) == sum(sizes)
        assert max(given) <= -(-sum(sizes) // parts) + 2 * 128 * parts
        for target, source in itertools.chain.from_iterable(found):
            assert target.storage_offset() % 128 == 0
            target.copy_(source)
        assert all(map(torch.equal, targets, sources))


@pytest.mark.slow
@pytest.mark.parametrize("helpers", [1, 2, 3])
@pytest.mark.parametrize("copy_streams", [0, 1, 2])
def test_output_is_the_same(copy_streams: int, helpers: int) -> None:
    model = make_transformer(depth=5)
    expected = model(X)
    store = VirtualMemory(10**9)
    backend = CpuBackend(store)
    others = [VirtualMemory(10**6, f"gpu:{number}") for number in range(1, helpers + 1)]
    feed(backend, *(CpuBackend(memory) for memory in others))
    streamer = make(model, backend, 2, copy_streams, 10_000)
    learn(streamer, lambda: model(X))
    for _ in range(2):
        streamer.load(streamer.plan_for(streamer.minimum_bytes + streamer.outline.block_bytes(0)))
        assert all(memory.allocated == (384 if copy_streams else 0) for memory in others)
        for _ in range(3):
            assert torch.equal(model(X), expected)
        streamer.unload()
        assert all(memory.allocated == 0 for memory in others)
    streamer.close()
    assert store.allocated == 0


# -- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("helpers", [1, 2])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_every_access_is_ordered(slots: int, helpers: int) -> None:
    everything = list(range(4))
    checked = 0
    for copy_streams, chunks, segment_bytes in itertools.product((1, 2), (1, 2), (2 * UNIT, 3 * UNIT)):
        backend = RaceBackend()
        others = [RaceBackend(backend.memory_accesses) for _ in range(helpers)]
        feed(backend, *others, chunks=chunks)
        model = NumberedModel(4, backend, False)
        streamer = make(model, backend, slots, copy_streams, segment_bytes)
        learn(streamer, lambda model=model: model(everything))
        for streamed in range(1, 2**4, 2):
            chosen = [index for index in everything if streamed >> index & 1]
            streamer.load(hand_plan(streamer, units_of(streamer, chosen), slots))
            for order, parts in itertools.product((everything, everything[::-1], [0, 0]), ("012", "210", "0011")):
                assert model(order, parts) == order
        checked += backend.accesses
        streamer.close()
    assert checked > 3000


@pytest.mark.parametrize("slots", [1, 2])
def test_every_access_is_ordered_on_cuda(cuda: FakeCuda, slots: int) -> None:
    everything = list(range(4))

    class Kernels:
        def read(self, weight: torch.Tensor) -> None:
            cuda.kernel(reads=[weight])

    model = NumberedModel(4, Kernels(), False)
    backend = CudaBackend(torch.device("cuda", 1))
    feed(backend, CudaBackend(torch.device("cuda", 0)))
    streamer = make(model, backend, slots)
    learn(streamer, lambda: model(everything))
    run_every_plan(cuda, model, streamer, slots)
    streamer.close()
    assert cuda.contexts == {0, 1}
    assert cuda.faults == []


# -- speed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("helpers", [1, 3])
def test_links_add_up(helpers: int) -> None:
    """In virtual time: a segment is there in its part of the time, and is known to be."""
    clock = Clock()
    backend = TimedBackend(clock, 0, 1000.0)
    feed(backend, *(TimedBackend(clock, number, 1000.0) for number in range(1, helpers + 1)), chunks=16)
    backend.passes_on_at = 1e9
    backend.open(2)
    source, target = torch.ones(65536, dtype=torch.uint8), torch.zeros(65536, dtype=torch.uint8)
    for _ in range(3):
        begin = backend.link_free
        end = backend.bring([(target, source)])
    assert end - begin == pytest.approx(65.536 / (1 + helpers), rel=0.05)
    assert torch.equal(target, source)


# -- what goes wrong ------------------------------------------------------------------------------------------------


def test_a_helper_without_room_is_left_out() -> None:
    model = make_transformer(depth=3)
    expected = model(X)
    backend = CpuBackend(VirtualMemory(10**9))
    full = VirtualMemory(200, "gpu:1")
    feed(backend, CpuBackend(full), CpuBackend(VirtualMemory(10**6, "gpu:2")))
    streamer = make(model, backend, 2, segment_bytes=0)
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    assert [feeder.is_open for feeder in backend.feeders] == [False, True]
    assert backend.links == 2
    assert full.allocated == 0
    assert torch.equal(model(X), expected)
    full.budget = 10**6
    streamer.unload()
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    assert backend.links == 3, "there is room now"
    assert torch.equal(model(X), expected)
    streamer.close()


@pytest.mark.slow
@pytest.mark.parametrize("of_helper", [True, False])
def test_a_copy_that_fails_anywhere_is_made_again(of_helper: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_transformer(depth=4)
    expected = model(X)
    backend, helper = CpuBackend(VirtualMemory(10**9)), CpuBackend(VirtualMemory(10**6, "gpu:1"))
    feed(backend, helper)
    streamer = make(model, backend, 2, segment_bytes=0)
    learn(streamer, lambda: model(X))
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    streamer.finish_building()
    chance = random.Random(1)
    broken = helper if of_helper else backend
    copy_now = broken._copy_now

    def break_down(*args: object) -> object:
        if chance.random() < 0.001:
            raise OSError("the link is broken")
        return copy_now(*args)

    failed = 0
    with monkeypatch.context() as patch:
        patch.setattr(broken, "_copy_now", break_down)
        for _ in range(60):
            try:
                assert torch.equal(model(X), expected)
            except OSError:
                failed += 1
                streamer.settle()
    assert 0 < failed < 60
    for _ in range(2):
        assert torch.equal(model(X), expected)
    streamer.close()


# -- whether it is worth it --------------------------------------------------------------------------------------------


def found_by(
    monkeypatch: pytest.MonkeyPatch, rates: list[float], sound: tuple[bool, ...], room: int = 10**9, last: float = 0.0
) -> tuple[list[str], float]:
    """The helpers that are taken where so many links together bring so many bytes per second.

    Args:
        last: what the first link brings when it is tried once more.
    """
    home, *helpers = (
        CpuBackend(VirtualMemory(room, f"gpu:{number}"), torch.device("cpu", number))
        for number in range(len(sound) + 1)
    )
    tries = []

    def bytes_per_second(home: Backend, source: torch.Tensor) -> float:
        tries.append(home.links)
        return max(rates[home.links - 1], last if len(tries) > 1 and home.links == 1 else 0.0)

    monkeypatch.setattr(feeding, "_bytes_per_second", bytes_per_second)
    links = Links()
    for helper, is_sound in zip(helpers, sound, strict=True):
        links._sound[helper.device, home.device] = is_sound
    found = find_feeders(home, helpers, links)
    assert home.feeders == []
    assert home.store.allocated == 0
    assert all(helper.store.allocated == 0 for helper in helpers)
    assert found.for_ever is (room > 10**8)
    return [helper.name for helper in found.helpers], found.factor


def test_who_adds_bandwidth_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found_by(monkeypatch, [50, 100, 150], (True, True)) == (["gpu:1", "gpu:2"], 3.0)
    assert found_by(monkeypatch, [50, 55, 60], (True, True)) == ([], 1.0)
    assert found_by(monkeypatch, [50, 100, 110], (True, True)) == (["gpu:1"], 2.0)
    assert found_by(monkeypatch, [50, 100, 150], (False, True)) == (["gpu:2"], 2.0)
    assert found_by(monkeypatch, [25, 50], (True,), last=50) == ([], 1.0), "its link was slow at first"
    assert found_by(monkeypatch, [50, 100], (True,), room=10**8) == ([], 1.0), "they have no room for their rings"


def test_a_device_without_room_for_the_trial_is_not_fed(monkeypatch: pytest.MonkeyPatch) -> None:
    home, helper = CpuBackend(VirtualMemory(100)), CpuBackend(VirtualMemory(10**9, "gpu:1"))
    found = find_feeders(home, [helper], Links())
    assert (found.helpers, found.for_ever) == ([], False)


def test_a_trial_copies_what_it_says() -> None:
    backend = CpuBackend(VirtualMemory(10**9))
    feed(backend, CpuBackend(VirtualMemory(10**6)))
    backend.open(2)
    assert feeding._bytes_per_second(backend, torch.ones(10_000, dtype=torch.uint8)) > 0
    assert backend.allocated == 0


GB = 10**9
FLUX = [680_000_000] * 19 + [283_000_000] * 38


@pytest.mark.parametrize(
    ("rooms", "factor", "faster"),
    [
        ([0.8, 0.8], 2.0, True),
        ([0.8, 0.8, 0.8, 0.8], 4.0, True),
        # It would be faster if blocks took long, and much slower if they did not.
        ([8, 8], 2.0, False),
        ([4, 4, 4, 4], 3.0, False),
        ([5, 5, 5, 5], 3.0, False),
        ([14, 14], 2.0, False),
        ([11, 11], 2.0, False),
        ([0.5, 22], 2.0, False),
        ([2, 20], 1.2, False),
    ],
)
def test_one_device_computes_where_that_is_faster(rooms: list[float], factor: float, faster: bool) -> None:
    found = [DeviceRoom(room * GB, 50 * GB) for room in rooms]
    assert feeding_is_faster(FLUX, found, factor) is faster


def test_by_measured_times_one_device_computes_where_that_is_faster() -> None:
    for seconds, faster in ((0.05, False), (0.3, True)):
        found = [DeviceRoom(4 * GB, 50 * GB, seconds / sum(FLUX))] * 2
        assert feeding_is_faster(FLUX, found, 2.0) is faster
