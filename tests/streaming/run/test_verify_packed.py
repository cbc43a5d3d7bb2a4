"""Packed weights that go wrong anywhere between the file and a block are found, and never run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from damage import CorruptingBackend, flip_a_bit, move_words, swap_words, zero_the_tail
from models import Doubled
from packed_models import BUDGET, PACKED_IN_BLOCK, X, learned, make, make_model
from weightstream.streaming import CorruptionError
from weightstream.streaming.memory import packing as packing_file
from weightstream.streaming.memory import packing_place as place_file
from weightstream.streaming.memory import weight_copies as weight_copies_file
from weightstream.streaming.memory.unit_copies import UnitCopies
from weightstream.streaming.model.packed_units import MeasuredUnit
from weightstream.streaming.packing.unpackers import TorchUnpacker
from weightstream.streaming.run import checksums
from weightstream.streaming.run import lane as lane_file
from weightstream.streaming.run.lane import Lane

Harm = Callable[[torch.Tensor, Callable[[], None], torch.Tensor], None]
NOT_WHAT_WAS_PACKED = r"weights of blocks\.\d are not what was packed, .* switch packing off"


class Made:
    """A transformer that streams packed on a device that damages copies, and what it computes.

    Args:
        doubled: names of weights that a patch doubles, once they are packed.
    """

    def __init__(self, doubled: tuple[str, ...] = (), **settings: Any) -> None:
        self.backend = CorruptingBackend()
        self.model, reference = make_model(), make_model()
        for name in doubled:
            reference.get_parameter(name).mul_(2)
        self.expected = reference(X)
        self.patches = Doubled(set(doubled))
        self.streamer = make(self.model, self.backend, **{"verify": True, **settings})

    def learned(self) -> Made:
        """It streams packed, and every copy was right."""
        assert len(learned(self.streamer, self.model).packed) == 4 * PACKED_IN_BLOCK
        if self.patches.names:
            self.load()
        self.streamer.drain()
        assert self.streamer.counters.corrupted == 0
        return self

    def load(self) -> None:
        self.streamer.begin_run()
        self.streamer.begin_prompt()
        self.streamer.load(self.streamer.plan_for(BUDGET), self.patches)

    def step(self) -> torch.Tensor:
        reload = lambda plan: self.streamer.load(plan, self.patches)  # noqa: E731
        return self.streamer.run(lambda: self.model(X), shape="x", reload=reload)

    def damage(self, memory: torch.Tensor, damage: Callable[[torch.Tensor], None] = flip_a_bit) -> None:
        """Damage host memory, from which everything is copied anew."""
        self.streamer.drain()
        damage(memory)
        self.streamer.invalidate()

    def check(self, corrupted: int = 0, steps: int = 2, mode: str = "") -> None:
        """Steps are right, still packed; so many copies were found to be wrong by then."""
        for _ in range(steps):
            assert torch.equal(self.step(), self.expected)
        assert self.streamer.counters.corrupted == corrupted
        assert self.streamer.snapshot().mode == (mode or ("synchronous" if corrupted else "streamed"))
        assert len(self.streamer.plan.packed) == 4 * PACKED_IN_BLOCK

    def unit(self, name: str) -> UnitCopies:
        found = [unit.index for unit in self.streamer.blocks.units if unit.name == name]
        return self.streamer.site.weight_copies.copies(found[0])

    def close(self) -> None:
        self.streamer.close()
        assert self.backend.store.allocated == 0
        assert self.backend.registered == {}


def test_what_is_not_damaged_streams_as_ever() -> None:
    """The same copies in the same order, with and without, under one plan."""
    plan, seen = None, []
    for on in (False, True):
        made = Made(verify=on).learned()
        plan = plan or made.streamer.plan
        made.streamer.load(plan)
        before = replace(made.streamer.counters)
        made.check(steps=3)
        assert made.streamer.plan.segments == plan.segments
        since = made.streamer.counters.since(before)
        seen.append((since.copies, since.hits, since.misses, since.streamed_bytes))
        made.close()
    assert seen[0] == seen[1]
    assert seen[0][0] == 3 * len(plan.segments)


def test_what_is_packed_from_a_patched_master_copy_is_compared_with_that() -> None:
    made = Made(("blocks.0.qkv.weight", "blocks.2.out.weight"))
    made.load()
    for _ in range(3):
        made.step()
    made.check()
    made.close()


def test_without_it_nothing_is_summed_and_nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(memory: torch.Tensor) -> torch.Tensor:
        raise AssertionError("something was summed")

    monkeypatch.setattr(checksums, "checksums", unexpected)
    made = Made(verify=False).learned()
    assert type(made.streamer.site.lane) is Lane
    packed = [made.streamer.site.weight_copies.copies(unit).packed for unit in made.streamer.plan.packed]
    assert [(copy.sums, copy.packed_sums) for copy in packed] == [(None, None)] * len(packed)
    made.damage(made.unit("blocks.1.qkv").packed.buffer, zero_the_tail)
    assert not torch.equal(made.step(), made.expected), "damage must show, or nothing is tested"


@pytest.mark.parametrize("damage", [flip_a_bit, zero_the_tail, None])
@pytest.mark.parametrize("copy", [1, 7])
def test_a_damaged_copy_to_a_slot_is_mended(
    damage: Callable[[torch.Tensor], None] | None, copy: int, caplog: pytest.LogCaptureFixture
) -> None:
    made = Made().learned()
    made.backend.damage, made.backend.countdown = damage, copy
    made.check(corrupted=1, steps=3)
    assert made.backend.damaged == 1
    (error,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert "a copy of blocks." in error
    assert "(segment " in error
    assert "unpacked" not in error
    assert "copies are synchronous since one of blocks." in made.streamer.explain()
    made.close()


def tamper(monkeypatch: pytest.MonkeyPatch, harm: Harm, file: ModuleType = lane_file) -> None:
    """Have a file unpack by ``harm``, which is given what is packed, what unpacks it, and where it goes to."""

    class Tampered(TorchUnpacker):
        def prepare(self, packed: torch.Tensor, out: torch.Tensor) -> Callable[[], None]:
            run = super().prepare(packed, out)
            return lambda: harm(packed, run, out)

    monkeypatch.setattr(file, "unpacker_of", lambda device: Tampered(""))


@pytest.mark.parametrize("damage", [flip_a_bit, move_words])
@pytest.mark.parametrize("turn", [1, 10])
def test_weights_that_were_unpacked_wrongly_once_are_unpacked_again(
    damage: Callable[[torch.Tensor], None], turn: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runs = [10**6]

    def harm(packed: torch.Tensor, run: Callable[[], None], out: torch.Tensor) -> None:
        run()
        runs[0] -= 1
        if runs[0] == 0:
            damage(out.view(torch.uint8))

    tamper(monkeypatch, harm)
    made = Made().learned()
    runs[0] = turn
    made.check(corrupted=1)
    assert "unpacked: blocks." in caplog.text
    made.close()


def test_a_slot_that_is_overwritten_after_it_was_compared_is_mended(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runs = [10**6]

    def harm(packed: torch.Tensor, run: Callable[[], None], out: torch.Tensor) -> None:
        runs[0] -= 1
        if runs[0] == 0:
            flip_a_bit(packed)
        run()

    tamper(monkeypatch, harm)
    made = Made().learned()
    runs[0] = 3
    made.check(corrupted=2)
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert ["unpacked" in error for error in errors] == [True, False], "what is in the slot comes second"
    made.close()


def test_an_unpacker_that_is_always_wrong_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = [False]

    def harm(packed: torch.Tensor, run: Callable[[], None], out: torch.Tensor) -> None:
        run()
        if wrong[0]:
            flip_a_bit(out.view(torch.uint8))

    tamper(monkeypatch, harm)
    made = Made().learned()
    wrong[0] = True
    for times in (1, 2):
        with pytest.raises(CorruptionError, match=NOT_WHAT_WAS_PACKED):
            made.step()
        assert made.streamer.counters.corrupted == times
        made.load()
    wrong[0] = False
    made.check(corrupted=2)
    made.close()


@pytest.mark.parametrize("damage", [swap_words, zero_the_tail])
@pytest.mark.parametrize("doubled", [(), ("blocks.2.out.weight",)], ids=["as loaded", "patched"])
def test_a_packed_copy_that_was_damaged_in_ram_is_an_error_and_made_anew(
    damage: Callable[[torch.Tensor], None], doubled: tuple[str, ...], packed_units: list[str]
) -> None:
    """What arrives is what was sent, and still no block may run with it."""
    made = Made(doubled).learned()
    made.check()
    made.damage(made.unit("blocks.2.out").packed.buffer, damage)
    del packed_units[:]
    with pytest.raises(CorruptionError, match=r"copy of blocks\.2 in RAM was damaged \(segment \d: blocks\.2\.out"):
        made.step()
    assert packed_units == []
    made.load()
    assert packed_units == ["blocks.2.out"]
    made.check(corrupted=1, mode="streamed")
    made.close()


def test_damage_to_what_lies_in_a_packed_unit_as_it_is_is_found() -> None:
    made = Made().learned()
    packed = made.unit("blocks.1.qkv").packed
    (small,) = [part for part in packed.layout.parts if not part.packed]
    made.damage(small.bytes_in(packed.buffer))
    with pytest.raises(CorruptionError, match=r"in RAM was damaged .*blocks\.1\.qkv\.bias differs"):
        made.step()
    made.load()
    made.check(corrupted=1, mode="streamed")


@pytest.fixture
def packed_units(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of units that were packed."""
    found: list[str] = []
    own = packing_file.measure_unit

    def note(layout: Any, *rest: Any) -> object:
        found.append(layout.specs[0].name.rpartition(".")[0])
        return own(layout, *rest)

    monkeypatch.setattr(packing_file, "measure_unit", note)
    return found


def packed_wrongly(patch: pytest.MonkeyPatch, name: str) -> None:
    own = MeasuredUnit.write

    def write(unit: MeasuredUnit, target: torch.Tensor) -> None:
        own(unit, target)
        if unit.layout.parts[0].spec.name.startswith(name):
            flip_a_bit(target)

    patch.setattr(MeasuredUnit, "write", write)


def brought_down_wrongly(patch: pytest.MonkeyPatch, name: str) -> None:
    own, count = packing_file._copy_down, [0]

    def copy_down(packed: torch.Tensor, target: torch.Tensor) -> None:
        own(packed, target)
        count[0] += 1
        if count[0] == 5:
            flip_a_bit(target)

    patch.setattr(packing_file, "_copy_down", copy_down)


@pytest.mark.parametrize(
    ("wrong", "text", "mode"),
    [
        (packed_wrongly, "are not what was packed", "synchronous"),
        (brought_down_wrongly, "in RAM was damaged", "streamed"),
    ],
)
def test_what_was_packed_wrongly_is_an_error_and_packed_anew(
    wrong: Callable[[pytest.MonkeyPatch, str], None], text: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made()
    with monkeypatch.context() as patch:
        wrong(patch, "blocks.1.qkv")
        with pytest.raises(CorruptionError, match=rf"of blocks\.1 {text}"):
            learned(made.streamer, made.model)
    made.load()
    made.check(corrupted=1, mode=mode)
    made.close()


@contextmanager
def damage_while_packing(made: Made, damage: Callable[[torch.Tensor], None] | None) -> Iterator[None]:
    """One of the copies to where units are packed is damaged."""
    own = weight_copies_file.pack_units

    def pack_units(*args: Any) -> Any:
        made.backend.damage, made.backend.countdown = damage, 3
        return own(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_copies_file, "pack_units", pack_units)
        yield


@pytest.mark.parametrize("damage", [flip_a_bit, None])
@pytest.mark.parametrize("has_masters", [True, False], ids=["from master copies", "as loaded"])
def test_a_copy_that_is_damaged_before_it_is_packed_is_mended(
    damage: Callable[[torch.Tensor], None] | None, has_masters: bool, caplog: pytest.LogCaptureFixture
) -> None:
    made = Made()
    if has_masters:
        with damage_while_packing(made, damage):
            learned(made.streamer, made.model)
    else:
        made.learned()
        made.streamer.unload()
        made.streamer.site.weight_copies.clear_host()
        with damage_while_packing(made, damage):
            made.load()
    made.check(corrupted=1)
    assert made.backend.damaged == 1
    assert "was corrupted (to be packed: blocks." in caplog.text
    made.close()


def test_a_master_copy_is_not_made_of_a_damaged_packed_copy() -> None:
    """Other code asks for one, to write to it."""
    made = Made().learned()
    name = "blocks.1.mlp.0.weight"
    made.streamer.drain()
    flip_a_bit(made.unit("blocks.1.mlp.0").packed.buffer)
    before = made.backend.store.allocated
    with pytest.raises(CorruptionError, match=r"in RAM was damaged \(to be written to: blocks\.1\.mlp\.0"):
        made.streamer.make_masters({name})
    assert made.backend.store.allocated < before, "there is no lane, and nothing else was left"
    made.load()
    made.check(corrupted=1, mode="streamed")
    made.streamer.make_masters({name})
    made.streamer.lend_masters()
    for _ in range(2):
        assert torch.equal(made.step(), made.expected)
    assert made.streamer.counters.corrupted == 1
    made.streamer.take_masters_back()
    made.close()


def test_a_master_copy_is_not_made_of_what_was_unpacked_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made().learned()

    def harm(packed: torch.Tensor, run: Callable[[], None], out: torch.Tensor) -> None:
        run()
        flip_a_bit(out.view(torch.uint8))

    with monkeypatch.context() as patch:
        tamper(patch, harm, place_file)
        with pytest.raises(CorruptionError, match=NOT_WHAT_WAS_PACKED):
            made.streamer.make_masters({"blocks.1.mlp.0.weight"})
    made.load()
    made.check(corrupted=1)
    made.close()


def test_a_segment_that_begins_while_another_runs_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    own_memory = [False]

    def harm(packed: torch.Tensor, run: Callable[[], None], out: torch.Tensor) -> None:
        run()
        lane = made.streamer.site.lane
        if own_memory[0] and lane is not None and lane._unpacking.memory.data_ptr() != out.data_ptr():
            own_memory[0] = False
            flip_a_bit(out.view(torch.uint8))

    tamper(monkeypatch, harm)
    made = Made(slots=4, segment_bytes=0)
    inner = made.model.blocks[3].out
    made.model.blocks[0].qkv.register_forward_pre_hook(lambda module, args: (args[0] + inner(args[0]),))
    made.expected = made.model(X)
    made.learned().check()
    own_memory[0] = True
    made.check(corrupted=1)
    assert not own_memory[0]
    made.close()
