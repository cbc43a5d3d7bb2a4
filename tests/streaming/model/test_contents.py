"""Weights come from the file, or from memory where the host has changed them, and nothing is read twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import Doubled, Stored, Transformer
from reads import Reads

pytestmark = pytest.mark.usefixtures("watched")


@pytest.mark.parametrize("pin_memory", [True, False])
@pytest.mark.parametrize("copy_streams", [0, 2])
def test_weights_come_from_the_file_and_not_from_its_mapping(
    tmp_path: Path, copy_streams: int, pin_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = Stored(tmp_path, copy_streams=copy_streams, pin_memory=pin_memory)
    assert all(spec.source is not None for spec in stored.streamer.blocks.specs)
    stored.empty_mapping()
    reads = Reads(monkeypatch)
    stored.streamer.load(stored.streamer.plan_for(10**9))
    assert reads.take() == stored.tensor_bytes()
    stored.check()
    for plan in (stored.half, stored.least):
        stored.streamer.load(plan)
        stored.check(3)
    if pin_memory:
        stored.streamer.finish_building()
        stored.check()
        reads.take()
    stored.check()
    assert (reads.take() == 0) is pin_memory
    stored.close()


@pytest.mark.slow
@pytest.mark.parametrize("stored_dtype", [torch.float8_e4m3fn, torch.float16, torch.float32])
def test_weights_are_cast_on_the_way(tmp_path: Path, stored_dtype: torch.dtype) -> None:
    for pin_memory in (True, False):
        stored = Stored(tmp_path, stored=stored_dtype, dtype=torch.bfloat16, pin_memory=pin_memory)
        check_every_placement(stored)


def check_every_placement(stored: Stored) -> None:
    """All resident, some, none; staged and page-locked."""
    for plan in (stored.streamer.plan_for(10**9), stored.half, stored.least):
        stored.streamer.load(plan)
        stored.check(2)
    stored.streamer.finish_building()
    stored.check(2)
    stored.close()


def keep_in_memory(model: Transformer) -> None:
    for block in model.blocks[::2]:
        block.qkv.weight = torch.nn.Parameter(block.qkv.weight * 2, requires_grad=False)


def keep_strided(model: Transformer) -> None:
    """One fills its memory in another order, one leaves gaps."""
    for block in model.blocks:
        block.qkv.weight = torch.nn.Parameter(block.qkv.weight.t().contiguous().t(), requires_grad=False)
        wide = torch.cat([block.out.weight, block.out.weight], 1)
        block.out.weight = torch.nn.Parameter(wide[:, :32], requires_grad=False)


@pytest.mark.parametrize("change", [keep_in_memory, keep_strided])
def test_what_the_host_has_changed_comes_from_memory(tmp_path: Path, change: Callable[[Transformer], None]) -> None:
    stored = Stored(tmp_path, change=change)
    assert any(spec.source is None for spec in stored.streamer.blocks.specs)
    check_every_placement(stored)


def test_what_the_file_lacks_is_zero(tmp_path: Path) -> None:
    def lack(model: Transformer) -> None:
        for block in model.blocks:
            place = "cpu" if lack.real else "meta"
            block.out.bias = torch.nn.Parameter(torch.zeros(32, device=place), requires_grad=False)
        lack.real = False

    lack.real = True  # The plain model comes first.
    stored = Stored(tmp_path, change=lack)
    assert torch.equal(stored.model.blocks[3].out.bias, torch.zeros(32))  # As it runs, also while nothing is loaded.
    check_every_placement(stored)


@pytest.mark.parametrize("chunk_bytes", [1, 511, 513, 5000, 1 << 20])
@pytest.mark.parametrize("chunks", [1, 2])
def test_any_ring_does(tmp_path: Path, chunk_bytes: int, chunks: int) -> None:
    stored = Stored(tmp_path, chunk_bytes=chunk_bytes, chunks=chunks, read_threads=3, pin_memory=False)
    stored.streamer.load(stored.half)
    stored.check()
    stored.close()


def test_steps_of_a_host_in_inference_mode_are_right(tmp_path: Path) -> None:
    stored = Stored(tmp_path)
    with torch.inference_mode():
        stored.streamer.load(stored.half)
        stored.check()
    stored.check()
    with torch.inference_mode():
        stored.streamer.finish_building()
        stored.check(2)
        stored.streamer.load(stored.least)
        stored.check(2)
    stored.close()


def test_a_second_load_reads_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = Stored(tmp_path)
    streamer, model = stored.streamer, stored.model
    plan = stored.half
    streamer.load(plan)
    streamer.finish_building()
    assert torch.equal(model(stored.x), stored.expected)
    assert torch.equal(model(stored.x), stored.expected)
    streamer.load(plan)
    reads = Reads(monkeypatch)
    streamer.load(plan)
    assert torch.equal(model(stored.x), stored.expected)
    assert reads.take() == 0, "the same plan"
    names = {"blocks.0.qkv.weight", "blocks.5.qkv.weight", "input.weight"}
    streamer.load(plan, Doubled(names))
    assert reads.take() == 0, "patches are computed from the copies that are there"
    assert not torch.equal(model(stored.x), stored.expected)
    streamer.load(plan, Doubled({"blocks.0.qkv.weight"}))
    units = {unit.name: unit.index for unit in streamer.blocks.units}
    assert reads.take() == stored.tensor_bytes([units["blocks.5.qkv"]]), "the units of a clone with other patches"
    streamer.load(plan)
    rest = stored.tensor_bytes([])
    assert reads.take() == stored.tensor_bytes([units["blocks.0.qkv"]]) - rest
    assert torch.equal(model(stored.x), stored.expected)
    streamer.unload()
    streamer.load(plan)
    assert torch.equal(model(stored.x), stored.expected)
    assert reads.take() == stored.tensor_bytes(list(plan.resident)), "after unloading: the residents"
    stored.close()
