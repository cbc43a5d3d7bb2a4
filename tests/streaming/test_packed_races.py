"""Every access to packed copies, to slots that they are copied to and to what they are unpacked to is ordered."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from inline import InlineExecutor
from models import learn
from race import NumberedModel, RaceBackend
from share_workers import LINUX, brokered
from weightstream.streaming import PinBudget, Plan, Streamer, StreamingConfig, cut_model
from weightstream.streaming.devices import backend as backend_file
from weightstream.streaming.memory import memory_ahead, packed_drafts, shared_packed
from weightstream.streaming.memory import packing as packing_file
from weightstream.streaming.memory import packing_place as place_file
from weightstream.streaming.memory.packed_copy import PackedCopy
from weightstream.streaming.model.identity import KEY_BYTES
from weightstream.streaming.model.layout import Layout
from weightstream.streaming.model.packed_units import MeasuredUnit
from weightstream.streaming.packing import codec
from weightstream.streaming.packing.codec import unpack
from weightstream.streaming.planning.packing import Packing, packed_outline
from weightstream.streaming.planning.segments import cut
from weightstream.streaming.run import lane as lane_file
from weightstream.streaming.sharing.share import Share
from weightstream.streaming.split.feeder import Feeder

# Fewer values than are packed otherwise, as many as fill several units of alignment.
VALUES = 4096
# Of a unit in bfloat16 a quarter. Packed it takes 5.9 KB or so: two pieces.
FINE_BYTES = VALUES // 2
LIKE = torch.ones(VALUES, dtype=torch.bfloat16)
PARTS = ("012", "210", "0", "0011", "0202", "012")


class WatchedUnpacker:
    """Unpacks on the compute stream."""

    reason = ""

    def __init__(self, backend: RaceBackend) -> None:
        self._backend = backend

    def prepare(self, packed: torch.Tensor, out: torch.Tensor) -> Callable[[], None]:
        def run() -> None:
            self._backend.read(packed)
            self._backend.write(out)
            unpack(packed, out)

        return run


class WatchedUnit:
    """Is packed on the compute stream."""

    def __init__(self, backend: RaceBackend, found: MeasuredUnit, unit: torch.Tensor) -> None:
        self.layout = found.layout
        self._backend, self._found, self._unit = backend, found, unit

    def write(self, target: torch.Tensor) -> None:
        self._backend.read(self._unit)
        self._backend.write(target[: self.layout.nbytes])
        self._found.write(target)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> RaceBackend:
    """Knows of what is packed and unpacked on it too."""
    backend = RaceBackend()
    backend.fine_bytes = FINE_BYTES
    measure_unit, copy_down = packing_file.measure_unit, packing_file._copy_down

    def watched_measure(layout: Any, unit: torch.Tensor, *rest: Any) -> Any:
        backend.read(unit)
        backend.finish(backend.mark())  # How large it is is known when that is done.
        found = measure_unit(layout, unit, *rest)
        return None if found is None else WatchedUnit(backend, found, unit)

    def watched_copy(packed: torch.Tensor, target: torch.Tensor) -> None:
        backend.read(packed)
        backend.write(target)
        copy_down(packed, target)

    monkeypatch.setattr(codec, "FEWEST_VALUES", VALUES)
    monkeypatch.setattr(packing_file, "measure_unit", watched_measure)
    monkeypatch.setattr(packing_file, "_copy_down", watched_copy)
    monkeypatch.setattr(memory_ahead, "ThreadPoolExecutor", InlineExecutor)
    for module in (lane_file, place_file):
        monkeypatch.setattr(module, "unpacker_of", lambda device: WatchedUnpacker(backend))
    return backend


class Same:
    """Patches that leave weights as they are."""

    def signature(self, name: str) -> object:
        return self

    def compute(self, name: str, original: torch.Tensor) -> torch.Tensor:
        return original


def packed_plan(streamer: Streamer, streamed: list[int], packed: list[int], slots: int) -> Plan:
    """A plan that streams exactly these units, some of them packed."""
    sizes = streamer.site.weight_copies.packed_sizes(lambda: None)
    outline = packed_outline(streamer.outline, Packing(sizes, 1e12), packed)
    segments = cut(outline, frozenset(streamed), streamer.profile, streamer.config.segment_bytes)
    return Plan.streaming(outline, segments, slots * max(segment.nbytes for segment in segments))


def feed(backend: RaceBackend, helpers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have ``helpers`` other devices bring parts of every copy, each through two chunks that are soon in use again."""
    monkeypatch.setattr(backend_file, "LEAST_FED_BYTES", 0)
    others = (RaceBackend(backend.memory_accesses) for _ in range(helpers))
    backend.feeders += [Feeder(other, chunk_bytes=1024, chunks=2) for other in others]


def run_plans(
    backend: RaceBackend,
    slots: int,
    copy_streams: int,
    segment_bytes: int,
    runs: Sequence[str],
    pins: PinBudget | None = None,
) -> int:
    """All streamed units of three blocks are packed, every second one, and only those of the second block."""
    model = NumberedModel(3, backend, like=LIKE)
    settings = {"segment_bytes": segment_bytes, "adaptive": False, "read_threads": 1, "chunks": 2}
    config = StreamingConfig(copy_streams, slots, chunk_bytes=8192, **settings)
    streamer = Streamer(model, cut_model(model), backend, config, pins)
    everything = [0, 1, 2]
    learn(streamer, lambda: model(everything))
    before = backend.accesses
    for streamed in (list(range(9)), [0, 1, 2, 3, 5, 8], [4, 5, 6]):
        for packed in (streamed, streamed[::2], [unit for unit in streamed if unit in (3, 4, 5)]):
            streamer.load(packed_plan(streamer, streamed, [], slots))
            streamer.finish_building()
            assert all(streamer.site.weight_copies.copies(unit).pinned for unit in streamed)
            streamer.load(packed_plan(streamer, streamed, packed, slots))
            assert streamer.plan.packed == set(packed)
            assert backend.links == 1 + len(backend.feeders)
            assert model(everything) == everything
            streamer.load(streamer.plan, Same())
            for order, parts in itertools.product((everything, everything[::-1], [0, 0, 2]), runs):
                assert model(order, parts) == order
    checked = backend.accesses - before
    streamer.close()
    return checked


@pytest.mark.slow
@pytest.mark.parametrize("segment_bytes", [0, 3 * VALUES], ids=["one unit", "two units"])
@pytest.mark.parametrize(("slots", "copy_streams"), [(1, 2), (2, 1), (2, 2), (3, 2)])
def test_every_access_is_ordered(backend: RaceBackend, slots: int, copy_streams: int, segment_bytes: int) -> None:
    assert run_plans(backend, slots, copy_streams, segment_bytes, PARTS) > 9000


def test_every_access_is_ordered_without_copy_streams(backend: RaceBackend) -> None:
    """Copies become synchronous when one was corrupted (verify.py)."""
    assert run_plans(backend, 2, 0, 3 * VALUES, PARTS[:3]) > 4000


@pytest.mark.slow
@pytest.mark.parametrize(("helpers", "slots"), [(1, 1), (2, 2)])
def test_every_access_is_ordered_over_several_links(
    backend: RaceBackend, helpers: int, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed(backend, helpers, monkeypatch)
    assert run_plans(backend, slots, 2, 3 * VALUES, PARTS[:3]) > 14000


@LINUX
@pytest.mark.parametrize("segment_bytes", [0, 3 * VALUES], ids=["one unit", "two units"])
def test_every_access_to_what_is_shared_is_ordered(
    backend: RaceBackend, segment_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On its way down too: a thread reads what has arrived, and nothing comes there before that is written."""
    written, own = [], packed_drafts._write

    def write(arena: Any, packed: PackedCopy, content: torch.Tensor, unchanged: bool) -> Any:
        backend.memory_accesses.read(threading.current_thread(), content)
        written.append(packed)
        return own(arena, packed, content, unchanged)

    def known(layout: Layout, signatures: Mapping[str, object]) -> bytes:
        return repr((layout.values[0].name, bool(signatures))).encode().ljust(KEY_BYTES)[:KEY_BYTES]

    monkeypatch.setattr(packed_drafts, "_write", write)
    for module in (packing_file, shared_packed):
        monkeypatch.setattr(module, "packed_key_of", known)
    with brokered() as broker:
        share = Share(broker.address)
        assert run_plans(backend, 2, 2, segment_bytes, PARTS[:3], PinBudget(share=share)) > 4000
        assert len(written) > 50
        assert share.built == len(written)
        share.give_up("it is over")


def packed_streamer(backend: RaceBackend) -> tuple[NumberedModel, Streamer]:
    """It streams all of its units packed from the next step on."""
    model = NumberedModel(3, backend, like=LIKE)
    config = StreamingConfig(2, 2, segment_bytes=0, adaptive=False)
    streamer = Streamer(model, cut_model(model), backend, config)
    learn(streamer, lambda: model([0, 1, 2]))
    streamer.load(packed_plan(streamer, list(range(9)), list(range(9)), 2))
    return model, streamer


def test_without_a_wait_for_the_copy_the_unpacking_is_a_race(
    backend: RaceBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So this file would tell."""
    model, streamer = packed_streamer(backend)
    monkeypatch.setattr(backend, "wait", lambda event: lambda: 0.0)
    with pytest.raises(AssertionError, match="compute reads memory before the write into it is done"):
        model([0, 1, 2])
    assert streamer.plan.packed


def test_after_an_error_no_memory_is_freed_that_a_copy_writes_to(
    backend: RaceBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = NumberedModel(3, backend, like=LIKE)
    streamer = Streamer(model, cut_model(model), backend, StreamingConfig(2, 2, adaptive=False))
    learn(streamer, lambda: model([0, 1, 2]))
    plan = packed_plan(streamer, list(range(9)), list(range(9)), 2)

    def fail(*args: object) -> None:
        streamer.reader.flush()  # The next unit is on its way.
        raise RuntimeError("no kernel could be launched")

    monkeypatch.setattr(packing_file, "measure_unit", fail)
    with pytest.raises(RuntimeError, match="no kernel"):
        streamer.load(plan)
    assert backend.allocated == 0


def test_without_a_wait_for_all_links_the_unpacking_is_a_race(
    backend: RaceBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy is taken for done when the home's own part of it is."""
    feed(backend, 1, monkeypatch)
    model, streamer = packed_streamer(backend)
    streamer.drain()
    monkeypatch.setattr(backend, "_all_over", lambda stream, events: events[0])
    with pytest.raises(AssertionError, match="compute reads memory before the write into it is done"):
        model([0, 1, 2])
