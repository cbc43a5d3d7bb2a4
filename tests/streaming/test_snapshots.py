"""A status is asked for on one thread while another loads, runs and unloads the model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from models import X, make_streamer, make_transformer
from weightstream.streaming import Snapshot, Streamer

BLOCK = 35_840
ROUNDS = 12


@contextmanager
def asking(streamer: Streamer) -> Iterator[list[Snapshot]]:
    """Snapshots, as many as another thread can take meanwhile."""
    taken: list[Snapshot] = []
    failures: list[BaseException] = []
    stop = threading.Event()

    def ask() -> None:
        try:
            while not stop.is_set():
                taken.append(streamer.snapshot())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield taken
    finally:
        stop.set()
        thread.join()
    assert not failures, failures[0]


@pytest.mark.usefixtures("watched")
def test_snapshots_of_a_model_that_is_loaded_run_and_unloaded() -> None:
    model = make_transformer()
    expected = model(X)
    streamer = make_streamer(model)
    whole, half = streamer.blocks, streamer.blocks.part({0, 1}, with_outside=True)
    with asking(streamer) as taken:
        for number in range(ROUNDS):
            streamer.take_blocks(half if number % 2 else whole)
            streamer.begin_run()
            streamer.load(streamer.plan_for(streamer.minimum_bytes + BLOCK))
            for _ in range(3):
                assert torch.equal(streamer.run(lambda: model(X), shape=tuple(X.shape)), expected)
            streamer.unload()
    assert len(taken) > ROUNDS
    assert {snapshot.mode for snapshot in taken} >= {"off", "streamed"}
    assert all(0 <= snapshot.run.counters.steps <= snapshot.counters.steps for snapshot in taken)
    assert all(snapshot.staged_bytes >= 0 and snapshot.resident_bytes >= 0 for snapshot in taken)
    streamer.close()
