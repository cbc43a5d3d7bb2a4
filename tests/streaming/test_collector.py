"""The collector of reference cycles stays away while many objects are made, and comes back."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest
from models import make_transformer
from outlines import flux, flux_profile
from weightstream.streaming import StreamingConfig, cut_model, make_plan
from weightstream.streaming.collector import uncollected


@pytest.fixture
def collections() -> Iterator[list[int]]:
    """Generations that were collected, by themselves, while every hundredth new object asks for it."""
    found: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            found.append(info["generation"])

    before = gc.get_threshold()
    gc.set_threshold(100, 2, 2)
    gc.callbacks.append(note)
    try:
        yield found
    finally:
        gc.callbacks.remove(note)
        gc.set_threshold(*before)


def make_objects() -> list[list[int]]:
    return [[number] for number in range(5000)]


def test_nothing_is_collected_until_the_outermost_ends(collections: list[int]) -> None:
    make_objects()
    assert collections
    with uncollected():
        with uncollected():
            del collections[:]
            make_objects()
        make_objects()
        assert not collections
        gc.collect()
        assert collections == [2], "who asks for it gets it"
    make_objects()
    assert len(collections) > 1


def test_an_error_ends_it(collections: list[int]) -> None:
    @uncollected()
    def fail() -> None:
        assert not gc.isenabled()
        raise ValueError("failed")

    for _ in range(2):
        with pytest.raises(ValueError, match="failed"):
            fail()
        assert gc.isenabled()


def test_who_has_switched_it_off_keeps_it_so() -> None:
    gc.disable()
    try:
        with uncollected():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_threads_share_it() -> None:
    inside, leave = threading.Event(), threading.Event()

    def wait() -> None:
        with uncollected():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=wait)
    thread.start()
    inside.wait(10)
    with uncollected():
        assert not gc.isenabled()
    assert not gc.isenabled(), "the other one is not over"
    leave.set()
    thread.join()
    assert gc.isenabled()


def test_a_collection_may_end_what_pauses_it(collections: list[int]) -> None:
    """What it frees runs code, on the thread that was in the middle of something."""

    class Ends:
        def __del__(self) -> None:
            with uncollected():
                ended.append(gc.isenabled())

    ended: list[bool] = []
    for _ in range(200):
        cycle = Ends()
        cycle.itself = cycle
        del cycle
        with uncollected():
            make_objects()
    gc.collect()
    assert ended == [False] * 200
    assert gc.isenabled()


def test_cutting_and_planning_are_not_interrupted(collections: list[int]) -> None:
    outline, profile = flux(), flux_profile()
    model = make_transformer(depth=8)
    del collections[:]
    cut_model(model)
    make_plan(outline, profile, 10e9, StreamingConfig())
    assert len(collections) <= 2, "one behind each"
