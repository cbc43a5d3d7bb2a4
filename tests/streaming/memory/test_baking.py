"""Patches are written into weights, and every access to memory on the way is ordered (accesses.py)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda, cuda
from models import Doubled, hand_plan, units_of
from race import NumberedModel, RaceBackend
from weightstream.streaming import CudaBackend, Streamer, StreamingConfig, cut_model

__all__ = ["cuda"]

BLOCKS = 4
EVERYTHING = list(range(BLOCKS))
WEIGHTS = [f"blocks.{block}.part{part}.weight" for block in EVERYTHING for part in range(3)]


class Kernels:
    """What computes on a fake GPU, as :class:`RaceBackend` does by itself."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda

    def read(self, tensor: torch.Tensor) -> None:
        self._cuda.kernel(reads=[tensor])

    def write(self, tensor: torch.Tensor) -> None:
        self._cuda.kernel(writes=[tensor])


class DoubledOnDevice(Doubled):
    """Doubles weights by kernels, which read them and write them where they are."""

    def __init__(self, names: set[str], kernels: RaceBackend | Kernels) -> None:
        super().__init__(names)
        self._kernels = kernels

    def compute(self, name: str, original: torch.Tensor) -> torch.Tensor:
        self._kernels.read(original)
        self._kernels.write(original)
        return super().compute(name, original)


def numbered(model: NumberedModel, doubled: set[str]) -> None:
    """The model's units expect these weights to be doubled, and the others as they were."""
    for name in WEIGHTS:
        block, part = int(name.split(".")[1]), int(name.split(".")[2].removeprefix("part"))
        number = 10 * block + part
        model.get_submodule(name.removesuffix(".weight")).number = 2 * number if name in doubled else number


def change_patches(
    backend: Any, kernels: Any, streamed: list[int], slots: int, copy_streams: int, **settings: Any
) -> None:
    """Load with patches, others and none, with all of a block's units streamed or resident, and run steps between."""
    model = NumberedModel(BLOCKS, kernels)
    config = StreamingConfig(copy_streams, slots, segment_bytes=0, adaptive=False, **settings)
    streamer = Streamer(model, cut_model(model), backend, config)
    plan = hand_plan(streamer, units_of(streamer, streamed), slots)
    for doubled in (set(WEIGHTS), set(WEIGHTS[::2]), set(), set(WEIGHTS[1:5]), set(WEIGHTS)):
        numbered(model, doubled)
        streamer.load(plan, DoubledOnDevice(doubled, kernels))
        for order in (EVERYTHING, EVERYTHING[::-1]):
            assert model(order) == order
    streamer.close()


CASES = list(itertools.product(([0, 1, 2, 3], [1, 3], [0]), (1, 2, 3), (0, 1, 2, 3)))


@pytest.mark.parametrize("pin_memory", [True, False], ids=["page-locked", "pageable"])
def test_every_access_is_ordered(pin_memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for streamed, slots, copy_streams in CASES:
        backend = RaceBackend()
        with monkeypatch.context() as patch:
            backend.watch_chunks(patch)
            change_patches(backend, backend, streamed, slots, copy_streams, pin_memory=pin_memory)


@pytest.mark.parametrize("pin_memory", [True, False], ids=["page-locked", "pageable"])
def test_every_access_is_ordered_on_cuda(cuda: FakeCuda, pin_memory: bool) -> None:
    for streamed, slots, copy_streams in CASES[::2]:
        backend = CudaBackend(torch.device("cuda", 1))
        change_patches(backend, Kernels(cuda), streamed, slots, copy_streams, pin_memory=pin_memory)


class Broken(DoubledOnDevice):
    """Fails when some weights are patched, with copies of them and of others under way."""

    def __init__(self, names: set[str], kernels: RaceBackend, after: int) -> None:
        super().__init__(names, kernels)
        self._after = after

    def compute(self, name: str, original: torch.Tensor) -> torch.Tensor:
        if len(self.computed) == self._after:
            raise RuntimeError("no such adapter")
        return super().compute(name, original)


@pytest.mark.parametrize("after", range(6))
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_what_a_failure_leaves_under_way_is_waited_for(slots: int, after: int) -> None:
    backend = RaceBackend()
    model = NumberedModel(BLOCKS, backend)
    config = StreamingConfig(2, slots, segment_bytes=0, adaptive=False)
    streamer = Streamer(model, cut_model(model), backend, config)
    plan = hand_plan(streamer, range(3 * BLOCKS), slots)
    with pytest.raises(RuntimeError, match="no such adapter"):
        streamer.load(plan, Broken(set(WEIGHTS), backend, after))
    assert backend.allocated == 0
    numbered(model, set(WEIGHTS))
    streamer.load(plan, DoubledOnDevice(set(WEIGHTS), backend))
    assert model(EVERYTHING) == EVERYTHING
    streamer.close()


@pytest.mark.parametrize(
    ("method", "instead", "race"),
    [
        ("mark", dict, "overwrites|may be overtaken"),
        ("wait", lambda event: lambda: 0.0, "before the write into it is done"),
    ],
    ids=["mark", "wait"],
)
def test_the_race_detector_sees_what_is_missing(
    method: str, instead: Any, race: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = RaceBackend()
    monkeypatch.setattr(backend, method, instead)
    with pytest.raises(AssertionError, match=race):
        change_patches(backend, backend, EVERYTHING, 2, 2)
