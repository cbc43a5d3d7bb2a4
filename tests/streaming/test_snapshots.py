"""A status is asked for on one thread while another loads, runs and unloads the model.

Between any two lines of a snapshot the other thread may do anything. So a snapshot is taken once for each of its lines,
and before that line something is done to the streamer.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import weightstream.streaming
from models import X, make_streamer, make_transformer
from weightstream.streaming import Snapshot, Streamer

BLOCK = 35_840
ENGINE = str(Path(weightstream.streaming.__file__).parent)


class Model:
    """A streamed model, and what its own thread does to it: each deed can follow each other one."""

    def __init__(self) -> None:
        self.model = make_transformer(depth=3)
        self.expected = self.model(X)
        self.streamer = make_streamer(self.model)
        self._whole = self.streamer.blocks
        self._half = self._whole.part({0}, with_outside=True)
        self.load()

    def load(self) -> None:
        self.streamer.load(self.streamer.plan_for(self.streamer.minimum_bytes + BLOCK))

    def load_others(self) -> None:
        """Other blocks than those that it has."""
        self.streamer.unload()
        self.streamer.take_blocks(self._whole if self.streamer.blocks is self._half else self._half)
        self.load()

    def step(self) -> None:
        if self.streamer.standing.plan is None:
            self.load()
        assert torch.equal(self.streamer.run(lambda: self.model(X), shape=tuple(X.shape)), self.expected)

    def prompt(self) -> None:
        self.step()
        self.streamer.begin_run()
        self.step()


def snapshot_meanwhile(streamer: Streamer, deed: Callable[[], None], line: int) -> tuple[Snapshot, bool]:
    """A snapshot before whose ``line``-th line ``deed`` is done, and whether it has so many lines."""
    left = line

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(ENGINE):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                deed()  # Nothing is traced meanwhile.
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return streamer.snapshot(), left <= 0
    finally:
        sys.settrace(before)


def check(snapshot: Snapshot) -> None:
    """It is of one set of blocks, and nothing that was counted is less than nothing."""
    counted = snapshot.counters
    assert snapshot.as_dict()["counters"]["steps"] == counted.steps
    assert 0 <= snapshot.run.counters.steps <= counted.steps
    assert 0 <= snapshot.run.counters.streamed_bytes <= counted.streamed_bytes
    assert snapshot.mode == "off" or re.search(rf" {snapshot.blocks} blocks?\b", snapshot.explain)
    assert snapshot.staged_bytes >= 0
    assert snapshot.resident_bytes >= 0
    assert 0 <= snapshot.streamed_blocks <= snapshot.blocks


@pytest.mark.slow
@pytest.mark.parametrize("deed", ["load", "load_others", "unload", "step", "prompt"])
def test_anything_happens_before_any_line_of_a_snapshot(deed: str) -> None:
    model = Model()
    streamer = model.streamer
    do = getattr(streamer if deed == "unload" else model, deed)
    line, reached = 0, True
    while reached:
        line += 1
        if streamer.standing.plan is None:
            model.load()
        snapshot, reached = snapshot_meanwhile(streamer, do, line)
        check(snapshot)
    assert line > 50
    streamer.close()
