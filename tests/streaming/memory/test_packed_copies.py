"""Where packed copies find their room, and what else comes to the device while they are made."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import PinningBackend
from packed_models import BUDGET, PACKED_IN_BLOCK, X, learned, make, make_model, step
from weightstream.streaming import PinBudget, Streamer
from weightstream.streaming.memory import packing as packing_file
from weightstream.streaming.memory.reader import Reader
from weightstream.streaming.memory.transfer import Piece, Transfer

ALL = 4 * PACKED_IN_BLOCK
FAILURE = "the device has failed"


def test_another_model_gives_its_memory_up_for_packed_copies() -> None:
    """Also where there are no master copies yet, which would have asked for it."""
    pins = PinBudget()
    models = [make_model(seed) for seed in range(2)]
    expected = [model(X) for model in models]
    streamers = [make(model, PinningBackend(), pins, chunk_bytes=2048, chunks=3) for model in models]
    learned(streamers[0], models[0])
    pins.limit = int(1.5 * pins.used)
    learned(streamers[1], models[1])
    for number in (0, 1, 0):
        streamer = streamers[number]
        streamer.begin_run()
        streamer.load(streamer.plan_for(BUDGET))
        assert len(streamer.plan.packed) == ALL
        assert torch.equal(step(streamer, models[number]), expected[number])
        assert pins.used <= pins.limit
        assert streamers[1 - number].snapshot().pinned_bytes < streamer.snapshot().pinned_bytes


class Late(deque[Piece | None]):
    """Pieces that the reader takes up when somebody waits for their transfer, or has given it up.

    Attributes:
        awaited: transfers that somebody has waited for.
    """

    def __init__(self, awaited: list[Transfer]) -> None:
        super().__init__()
        self.awaited = awaited

    def __bool__(self) -> bool:
        piece = self[0] if len(self) else None
        return len(self) > 0 and (piece is None or piece.transfer.stopped or piece.transfer in self.awaited)


def read_late(patch: pytest.MonkeyPatch, reader: Reader) -> None:
    """Have ``reader``, which has no threads now, read nothing before somebody waits for it."""
    assert not reader.workers
    awaited: list[Transfer] = []
    wait = reader.wait

    def noted(transfer: Transfer, *rest: Any) -> Any:
        awaited.append(transfer)
        with reader._asked:
            reader._asked.notify_all()
        return wait(transfer, *rest)

    patch.setattr(reader, "wait", noted)
    for name in ("_urgent", "_background"):
        patch.setattr(reader, name, Late(awaited))


def without_copies(streamer: Streamer) -> None:
    """It was loaded, and is no more; what it has learned stays."""
    streamer.unload()
    streamer.site.weight_copies.clear_host()


def test_residents_that_are_on_their_way_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for to be packed would overtake them, and what is left when that is over is given up."""
    model = make_model()
    streamer = make(model, PinningBackend(), stream_all=False)
    learned(streamer, model)
    without_copies(streamer)
    plan = streamer.plan_for(1.5 * BUDGET)
    assert plan.packed
    assert plan.resident
    read_late(monkeypatch, streamer.reader)
    streamer.load(plan)
    for _ in range(2):
        assert torch.equal(step(streamer, model), make_model()(X))
    assert streamer.plan == plan


class Watched(PinningBackend):
    """Asks ``question`` whenever memory is freed.

    Attributes:
        answers: what it was answered.
    """

    def __init__(self) -> None:
        super().__init__()
        self.question: Callable[[], bool] | None = None
        self.answers: list[bool] = []

    def free(self, buffer: torch.Tensor) -> int:
        if self.question is not None:
            self.answers.append(self.question())
        return super().free(buffer)


def test_nothing_comes_to_memory_that_packing_has_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while one unit is packed and the next is read."""
    model = make_model()
    backend = Watched()
    streamer = make(model, backend, slots=8)
    learned(streamer, model)
    without_copies(streamer)
    reader = streamer.reader

    def fail(*args: object) -> None:
        assert not reader.idle, "the next unit is not asked for"
        backend.question = lambda: reader.idle
        raise RuntimeError(FAILURE)

    with monkeypatch.context() as patch:
        patch.setattr(packing_file, "measure_unit", fail)
        read_late(patch, reader)
        with pytest.raises(RuntimeError, match=FAILURE):
            streamer.load(streamer.plan_for(BUDGET))
        assert backend.answers
        assert all(backend.answers)
        reader.close()
    assert backend.allocated == 0
    streamer.load(streamer.plan_for(BUDGET))
    assert len(streamer.plan.packed) == ALL
    assert torch.equal(step(streamer, model), make_model()(X))
