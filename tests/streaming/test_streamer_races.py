"""Every access to staging memory is ordered (race.py proves it for all timings at once)."""

from __future__ import annotations

import itertools
import random
from contextlib import suppress

import pytest
from models import hand_plan, learn, units_of
from race import NumberedModel, RaceBackend
from weightstream.streaming import Streamer, StreamingConfig, cut_model
from weightstream.streaming.memory.reader import Reader

UNIT = 512

# Parts of a block that run, one time after another: some left out, repeated and reordered.
PARTS = ("012", "210", "0", "2", "0011", "0202", "012")


def make(
    blocks: int,
    slots: int,
    copy_streams: int = 2,
    segment_bytes: int = 0,
    reads_directly: bool = False,
    **settings: int,
):
    backend = RaceBackend()
    model = NumberedModel(blocks, backend, reads_directly)
    # Each load starts threads that read, and makes their ring.
    settings = {"read_threads": 1, "chunks": 2, "chunk_bytes": 8 * UNIT, **settings}
    settings = {"segment_bytes": segment_bytes, "adaptive": False, **settings}
    config = StreamingConfig(copy_streams, slots, **settings)
    return backend, model, Streamer(model, cut_model(model), backend, config)


@pytest.mark.slow
def test_every_access_to_a_slot_of_whole_blocks_is_ordered() -> None:
    """All sets of streamed blocks up to 5 blocks, many above, with blocks skipped, repeated and reordered.

    Each set is loaded while kernels and copies of the one before may be under way.
    """
    checked = 0
    for blocks, slots, copy_streams in itertools.product(range(2, 8), range(1, 6), range(4)):
        everything = list(range(blocks))
        orders = [everything, everything[::2], everything[::-1], sorted(everything * 2), [0], everything]
        backend, model, streamer = make(blocks, slots, copy_streams)
        for streamed in range(1, 2**blocks, 1 if blocks < 6 else 7 * (blocks - 5)):
            chosen = [index for index in everything if streamed >> index & 1]
            streamer.load(hand_plan(streamer, units_of(streamer, chosen), slots))
            for order in orders:
                assert model(order) == order
        checked += backend.accesses
    assert checked > 50_000


@pytest.mark.slow
@pytest.mark.parametrize("segment_bytes", [0, 2 * UNIT, 3 * UNIT], ids=["one unit", "two units", "three units"])
def test_every_access_to_a_slot_of_parts_is_ordered(segment_bytes: int) -> None:
    """All sets of streamed units of two blocks, a sample of four; units left out, repeated and reordered. Three copy
    streams, on which other copies follow each other, where segments have one unit."""
    checked = 0
    for blocks, slots, copy_streams in itertools.product((2, 4), range(1, 5), range(3 if segment_bytes else 4)):
        everything = list(range(blocks))
        runs = [(everything, parts) for parts in PARTS]
        runs += [(everything[::-1], parts) for parts in ("012", "0202", "2")]
        runs += [([0, 0], parts) for parts in ("210", "0", "0011", "012")]
        backend, model, streamer = make(blocks, slots, copy_streams, segment_bytes)
        learn(streamer, lambda model=model, everything=everything: model(everything))
        for streamed in range(1, 2 ** (3 * blocks), 1 if blocks == 2 else 157):
            chosen = [unit for unit in range(3 * blocks) if streamed >> unit & 1]
            streamer.load(hand_plan(streamer, chosen, slots))
            for order, parts in runs:
                assert model(order, parts) == order
        checked += backend.accesses
    assert checked > 50_000


@pytest.mark.slow
@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_every_access_to_a_slot_and_a_chunk_of_staged_segments_is_ordered(
    chunks: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = 0
    everything = list(range(4))
    for slots, copy_streams in itertools.product(range(1, 4), range(1, 3)):
        staged = {"pin_memory": False, "read_threads": threads, "chunks": chunks, "chunk_bytes": UNIT}
        backend, model, streamer = make(4, slots, copy_streams, **staged)
        with monkeypatch.context() as patch:
            backend.watch_chunks(patch)
            for streamed in range(1, 2**4, 2):
                chosen = [index for index in everything if streamed >> index & 1]
                streamer.load(hand_plan(streamer, units_of(streamer, chosen), slots))
                for order in (everything, everything[::2], everything[::-1], sorted(everything * 2), everything):
                    assert model(order) == order
            streamer.close()
        checked += backend.chunk_accesses
    assert checked > 1000


@pytest.mark.slow
@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("seed", range(6))
def test_page_locked_and_staged_segments_mixed_in_any_order_are_ordered(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = {"pinned_limit": 9 * UNIT, "chunk_bytes": UNIT, "chunks": 2, "read_threads": 2}
    backend, model, streamer = make(6, 3, **mixed)
    backend.watch_chunks(monkeypatch)
    streamer.load(hand_plan(streamer, range(18), 3))
    model([0, 1, 2, 3, 4, 5])
    streamer.finish_building()
    assert 0 < streamer.site.weight_copies.pinned_bytes(streamer.plan) < streamer.plan.streamed_bytes
    chance = random.Random(seed)
    for _ in range(60):
        order = [chance.randrange(6) for _ in range(chance.randint(1, 8))]
        assert model(order) == order
    streamer.close()


def test_a_weight_that_is_read_without_running_its_module_is_there() -> None:
    _, model, streamer = make(4, 2, reads_directly=True)
    learn(streamer, lambda: model([0, 1, 2, 3]))
    streamer.load(streamer.plan_for(streamer.minimum_bytes + 3 * UNIT))
    plan = streamer.plan
    assert plan is not None
    assert plan.learned
    # A block is streamed in parts where only what runs by itself is streamed.
    for streamed in range(1, 2**4):
        streamer.load(hand_plan(streamer, [unit for unit in range(4) if streamed >> unit & 1], 2))
        for _ in range(2):
            assert model([0, 1, 2, 3]) == [0, 1, 2, 3]


def test_the_race_detector_sees_a_missing_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, model, streamer = make(4, 2)
    streamer.load(hand_plan(streamer, range(12), 2))
    monkeypatch.setattr(backend, "wait", lambda event: lambda: 0.0)
    with pytest.raises(AssertionError, match="before the write into it is done"):
        model([0, 1, 2, 3])


def test_the_race_detector_sees_a_slot_freed_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, model, streamer = make(4, 2)
    streamer.load(hand_plan(streamer, range(12), 2))
    monkeypatch.setattr(backend, "mark", dict)
    with pytest.raises(AssertionError, match="may still be read"):
        model([0, 1, 2, 3])


@pytest.mark.slow
def test_a_copy_that_could_not_be_read_leaves_its_waits_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read fails once, ahead of time or when it is needed; kernels that were there before are waited for still."""
    everything = list(range(3))
    checked = 0
    for slots, copy_streams in itertools.product((1, 2, 3), (1, 2)):
        for failing in range(1, 10):
            backend, model, streamer = make(3, slots, copy_streams, UNIT, pin_memory=False, read_threads=1, chunks=1)
            learn(streamer, lambda model=model: model(everything))
            streamer.load(hand_plan(streamer, range(9), slots))
            reads, read = itertools.count(1), Reader._read

            def fail(reader: Reader, *what: object, reads=reads, read=read, failing=failing) -> None:
                if next(reads) == failing:
                    raise OSError("cannot be read")
                read(reader, *what)

            with monkeypatch.context() as patch:
                patch.setattr(Reader, "_read", fail)
                for _ in range(4):
                    with suppress(OSError):
                        assert model(everything) == everything
                    streamer.settle()
            for _ in range(2):
                assert model(everything) == everything
            checked += backend.accesses
            streamer.close()
    assert checked > 5000
