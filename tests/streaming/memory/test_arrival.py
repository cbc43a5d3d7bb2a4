"""Residents that arrive while the first step runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from models import Doubled, Transformer, X, make_transformer, units_of
from weightstream.streaming import CpuBackend, State, Streamer, StreamingConfig, VirtualMemory, cut_model
from weightstream.streaming.memory import reader
from weightstream.streaming.model.layout import Layout


class Gate:
    """Reads of some units wait until it is opened, or fail; all take ``seconds`` more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.closed: set[int] = set()
        self.failing: set[int] = set()
        self.opened = threading.Event()
        self.seconds = 0.0
        self.read: list[int] = []
        original = reader.read_range

        def read_range(layout: Layout, *args: object) -> None:
            if id(layout) in self.failing:
                raise OSError("the disk is gone")
            if id(layout) in self.closed:
                assert self.opened.wait(20)
            time.sleep(self.seconds)
            self.read.append(id(layout))
            original(layout, *args)

        monkeypatch.setattr(reader, "read_range", read_range)

    def layouts(self, streamer: Streamer, blocks: list[int]) -> set[int]:
        return {id(streamer.blocks.units[unit].layout) for unit in units_of(streamer, blocks)}


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.opened.set()


def make(model: Transformer) -> Streamer:
    """Streams the last blocks whole or in part, and keeps the rest; nothing is page-locked."""
    config = StreamingConfig(pin_memory=False, slots=2, read_threads=1, chunks=2, headroom_bytes=0)
    return Streamer(model, cut_model(model), CpuBackend(VirtualMemory(10**9)), config)


def load(streamer: Streamer) -> None:
    block = streamer.outline.block_bytes(0)
    streamer.load(streamer.plan_for(streamer.minimum_bytes + 4 * block))
    assert streamer.plan.segments
    assert streamer.plan.resident


def blocks_with_residents(streamer: Streamer) -> list[int]:
    return sorted({streamer.outline.unit_block[unit] for unit in streamer.plan.resident})


def test_the_first_block_runs_early_and_what_streams_overtakes_residents(gate: Gate) -> None:
    """One thread reads: in one order for all, a slot would be filled after all residents."""
    model = make_transformer(depth=8)
    expected = model(X)
    streamer = make(model)
    load(streamer)
    residents = [id(streamer.blocks.units[unit].layout) for unit in streamer.plan.resident]
    blocks = blocks_with_residents(streamer)
    streamer.unload()
    gate.closed = gate.layouts(streamer, blocks[:1])
    gate.seconds = 0.01
    load(streamer)
    gate.read.clear()
    gate.opened.set()
    unread = []
    model.blocks[0].register_forward_hook(lambda *_: unread.extend(set(residents) - set(gate.read)))
    assert torch.equal(model(X), expected)
    assert len(unread) > len(residents) // 2
    assert set(residents) <= set(gate.read)
    streamed = gate.read.index(id(streamer.blocks.units[streamer.plan.segments[0].units[0]].layout))
    assert streamed < max(gate.read.index(layout) for layout in residents)
    assert streamed <= 1 + streamer.reader._threads
    streamer.close()
    assert streamer.backend.store.allocated == 0


def test_a_resident_that_is_read_before_its_block_runs_is_there_when_the_step_runs_again(gate: Gate) -> None:
    """A GPU refuses a tensor in host memory; a device in RAM would not, so the model itself does so here."""
    model = make_transformer(depth=8)
    expected = model(X)
    streamer = make(model)
    load(streamer)
    block = blocks_with_residents(streamer)[-1]
    streamer.unload()
    gate.closed = gate.layouts(streamer, [block])
    load(streamer)
    copies = [streamer.site.weight_copies.copies(unit) for unit in streamer.plan.resident]
    copies = [each for each in copies if each.unit.block == block]
    forward, tries = model.forward, []

    def read_ahead(x: torch.Tensor) -> torch.Tensor:
        tries.append([each.resident is not None for each in copies])
        gate.opened.set()
        if not all(tries[-1]):
            raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices")
        return forward(x)

    model.forward = read_ahead
    assert torch.equal(streamer.run(lambda: model(X)), expected)
    assert [all(there) for there in tries] == [False, True]
    streamer.close()


def test_residents_of_blocks_that_did_not_run_arrive_too(gate: Gate) -> None:
    model = make_transformer(depth=8)
    expected = model(X)
    skipped = model(X, [0, 1])
    streamer = make(model)
    load(streamer)
    assert torch.equal(model(X, [0, 1]), skipped)
    assert not streamer.site.weight_copies.arriving
    assert torch.equal(model(X), expected)


def test_a_resident_that_cannot_be_read_fails_the_step_and_is_read_again(gate: Gate) -> None:
    model = make_transformer(depth=8)
    expected = model(X)
    streamer = make(model)
    load(streamer)
    blocks = blocks_with_residents(streamer)
    streamer.unload()
    gate.failing = gate.layouts(streamer, blocks[-1:])
    load(streamer)
    with pytest.raises(OSError, match="the disk is gone"):
        streamer.run(lambda: model(X))
    gate.failing = set()
    assert streamer.state is State.REDUCED
    assert torch.equal(streamer.run(lambda: model(X)), expected)
    gate.failing = gate.layouts(streamer, blocks[-1:])
    streamer.unload()
    load(streamer)
    with pytest.raises(OSError, match="the disk is gone"):
        streamer.run(lambda: model(X))
    gate.failing = set()
    load(streamer)  # As a host does with the next prompt.
    assert torch.equal(model(X), expected)
    streamer.close()
    assert streamer.backend.store.allocated == 0


def test_memory_is_given_at_once_while_residents_arrive(gate: Gate) -> None:
    model = make_transformer(depth=8)
    expected = model(X)
    streamer = make(model)
    load(streamer)
    blocks = blocks_with_residents(streamer)
    streamer.unload()
    gate.closed = gate.layouts(streamer, blocks[1:])
    load(streamer)
    before = streamer.device_bytes
    threading.Timer(0.1, gate.opened.set).start()  # The read that is under way must end.
    assert streamer.give_way(streamer.outline.block_bytes(0)) >= streamer.outline.block_bytes(0)
    assert streamer.device_bytes < before
    assert streamer.state is State.REDUCED
    assert torch.equal(streamer.run(lambda: model(X)), expected)


def test_masters_are_made_for_writers_when_everything_has_arrived() -> None:
    model = make_transformer(depth=8)
    streamer = make(model)
    load(streamer)
    names = {f"blocks.{index}.out.weight" for index in range(8)}
    streamer.make_masters(names)
    assert not streamer.site.weight_copies.arriving
    originals = {spec.name: spec.original for spec in streamer.blocks.specs}
    for index, block in enumerate(model.blocks):
        assert block.out.weight.data_ptr() != originals[f"blocks.{index}.out.weight"].data_ptr()


def test_patches_reach_residents_that_are_still_on_their_way(gate: Gate) -> None:
    """A first prompt that was cancelled while it was read, and a second one with a LoRA."""
    model = make_transformer(depth=8)
    streamer = make(model)
    load(streamer)
    plan, blocks = streamer.plan, blocks_with_residents(streamer)
    names = {spec.name for unit in plan.resident for spec in streamer.blocks.units[unit].layout.specs}
    streamer.unload()
    gate.closed = gate.layouts(streamer, blocks[1:])
    streamer.load(plan)
    assert streamer.site.weight_copies.arriving
    gate.opened.set()
    streamer.load(plan, Doubled(names))
    reference = make_transformer(depth=8)
    for name in names:
        reference.get_parameter(name).mul_(2)
    assert torch.equal(model(X), reference(X))


def test_a_unit_may_run_outside_of_its_block_before_everything_has_arrived(gate: Gate) -> None:
    model = make_transformer(depth=8)
    streamer = make(model)
    load(streamer)
    plan, last = streamer.plan, blocks_with_residents(streamer)[-1]
    mine = [unit for unit in plan.resident if streamer.outline.unit_block[unit] == last]
    unit = next(unit for unit in mine if isinstance(streamer.blocks.units[unit].module, torch.nn.Linear))
    streamer.unload()
    gate.seconds = 0.005
    streamer.load(plan)
    module = streamer.blocks.units[unit].module
    assert streamer.site.weight_copies.copies(unit).arriving is not None
    module(torch.zeros(1, module.in_features))
    assert streamer.site.weight_copies.copies(unit).resident is not None


def test_master_copies_stay_while_a_step_runs_and_while_somebody_has_written_to_them() -> None:
    model = make_transformer(depth=8)
    expected = model(X)
    streamer = Streamer(model, cut_model(model), CpuBackend(VirtualMemory(10**9)), StreamingConfig(slots=2))
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    streamer.finish_building()
    given = []

    def forward() -> torch.Tensor:
        given.append(streamer.give_up_masters(1))
        thread = threading.Thread(target=lambda: given.append(streamer.give_up_masters(1)))
        thread.start()
        thread.join()
        return model(X)

    assert torch.equal(streamer.run(forward), expected)
    streamer.lend_masters()
    given.append(streamer.give_up_masters(1))
    assert given == [0, 0, 0]
    streamer.take_masters_back()
    assert streamer.give_up_masters(1) > 0
    assert streamer.snapshot().device_bytes == streamer.backend.allocated
    assert streamer.standing.device_bytes == streamer.plan.device_bytes
    assert torch.equal(streamer.run(lambda: model(X)), expected)
