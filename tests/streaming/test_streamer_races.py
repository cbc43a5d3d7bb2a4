"""Every access to staging memory is ordered (race.py proves it for all timings at once)."""

from __future__ import annotations

import itertools

import pytest
from race import NumberedModel, RaceBackend
from weightstream.streaming import (
    Streamer,
    StreamingConfig,
    split_model,
)
from weightstream.streaming.plan import Plan


def test_every_access_to_a_slot_is_ordered() -> None:
    """All sets of streamed blocks up to 5 blocks, many above, with blocks skipped, repeated and reordered."""
    checked = 0
    for blocks, slots, copy_streams in itertools.product(range(2, 10), range(1, 6), range(4)):
        everything = list(range(blocks))
        orders = [everything, everything[::2], everything[::-1], sorted(everything * 2), [0], everything]
        for streamed in range(1, 2**blocks, 1 if blocks < 6 else 7 * (blocks - 5)):
            chosen = tuple(index for index in everything if streamed >> index & 1)
            backend = RaceBackend()
            model = NumberedModel(blocks, backend)
            streamer = Streamer(model, split_model(model), backend, StreamingConfig(copy_streams, slots))
            streamer.load(Plan(streamer.blocks.sizes, 0, chosen, min(slots, len(chosen))))
            for order in orders:
                assert model(order) == order
            checked += backend.accesses
    assert checked > 50_000


def test_the_race_detector_sees_a_missing_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = RaceBackend()
    model = NumberedModel(4, backend)
    streamer = Streamer(model, split_model(model), backend, StreamingConfig())
    streamer.load(Plan(streamer.blocks.sizes, 0, (0, 1, 2, 3), 2))
    monkeypatch.setattr(backend, "wait", lambda event: lambda: 0.0)
    with pytest.raises(AssertionError, match="before the copy into it is done"):
        model([0, 1, 2, 3])


def test_the_race_detector_sees_a_slot_freed_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = RaceBackend()
    model = NumberedModel(4, backend)
    streamer = Streamer(model, split_model(model), backend, StreamingConfig())
    streamer.load(Plan(streamer.blocks.sizes, 0, (0, 1, 2, 3), 2))
    monkeypatch.setattr(backend, "mark", dict)
    with pytest.raises(AssertionError, match="may still be read"):
        model([0, 1, 2, 3])
