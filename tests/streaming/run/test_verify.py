"""Copies that go wrong are found, named and mended, and the result is that of the model as it is."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from damage import DAMAGE, SMALLEST_MATRIX, CorruptingBackend, flip_a_bit
from models import SETTINGS, Doubled, Stored, X, make_transformer
from weightstream.streaming import CorruptionError, State, Streamer, StreamingConfig, cut_model
from weightstream.streaming.devices import cpu_backend
from weightstream.streaming.run import checksums, verify
from weightstream.streaming.run.lane import Lane
from weightstream.streaming.run.verify import ChecksumVerifier


class Made:
    """A transformer, a plain one to compare it with, and a device that damages copies."""

    def __init__(self, **settings: int) -> None:
        self.backend = CorruptingBackend()
        self.model = make_transformer()
        self.plain = make_transformer()
        config = StreamingConfig(**{**SETTINGS, "adaptive": False, **settings})
        self.streamer = Streamer(self.model, cut_model(self.model), self.backend, config)

    def load(self, patches: Doubled | None = None) -> None:
        """Some blocks resident, some streamed."""
        budget = self.streamer.minimum_bytes + self.streamer.outline.block_bytes(0)
        self.streamer.load(self.streamer.plan_for(budget), patches)

    def step(self) -> torch.Tensor:
        return self.streamer.run(lambda: self.model(X))


def settled(**settings: int) -> Made:
    """It has run until its plan is settled, and every copy was right."""
    made = Made(verify=True, **settings)
    made.load()
    for _ in range(4):
        assert torch.equal(made.step(), made.plain(X))
    made.streamer.drain()
    assert made.streamer.plan.segments
    assert (made.streamer.counters.corrupted, made.streamer.snapshot().mode) == (0, "streamed")
    return made


def check_that_it_was_found(made: Made, caplog: pytest.LogCaptureFixture, times: int = 1) -> None:
    """As often as it happened; named, and copies are synchronous from then on."""
    assert made.streamer.counters.corrupted == made.backend.damaged == times
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == times
    for error in errors:
        assert "a copy of blocks." in error
        assert "pieces, from byte 0 on" in error
    now = made.streamer.snapshot()
    assert now.mode == "synchronous"
    for text in (now.explain, now.note, made.streamer.explain()):
        assert "copies are synchronous since one of blocks." in text
    assert now.as_dict()["counters"]["corrupted"] == times


@pytest.mark.slow
@pytest.mark.parametrize("damage", [*DAMAGE, None])
@pytest.mark.parametrize("pin_memory", [True, False], ids=["page-locked", "staged"])
@pytest.mark.parametrize("copy", [1, 4, 9])
def test_a_damaged_copy_is_found_and_mended(
    damage: Callable[[torch.Tensor], None] | None, pin_memory: bool, copy: int, caplog: pytest.LogCaptureFixture
) -> None:
    made = settled(pin_memory=pin_memory)
    made.backend.damage, made.backend.countdown = damage, copy
    for _ in range(4):
        assert torch.equal(made.step(), made.plain(X))
    check_that_it_was_found(made, caplog)
    made.streamer.close()
    assert made.backend.store.allocated == 0


def test_every_copy_is_damaged(caplog: pytest.LogCaptureFixture) -> None:
    made = settled()
    made.backend.countdown, made.backend.always = 1, True
    for _ in range(3):
        assert torch.equal(made.step(), made.plain(X))
    assert made.backend.damaged >= 2 * len(made.streamer.plan.segments)
    check_that_it_was_found(made, caplog, made.backend.damaged)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_patched_copy_is_found_and_mended(
    damage: Callable[[torch.Tensor], None], caplog: pytest.LogCaptureFixture
) -> None:
    names = {f"blocks.{index}.qkv.weight" for index in range(6)}
    made = settled()
    for name in names:
        made.plain.get_parameter(name).mul_(2)
    made.load(Doubled(names))
    for _ in range(2):
        assert torch.equal(made.model(X), made.plain(X))
    made.streamer.drain()
    made.backend.damage, made.backend.countdown = damage, 2
    for _ in range(2):
        assert torch.equal(made.model(X), made.plain(X))
    check_that_it_was_found(made, caplog)


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("copy", [1, 2, 4, 7, 11])
def test_what_comes_from_a_file_is_compared_with_the_file(
    tmp_path: Path, damage: Callable[[torch.Tensor], None], copy: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Segments and residents of a first step, some in the background and all through the reader's ring."""
    backend = CorruptingBackend()
    stored = Stored(tmp_path, backend, verify=True, chunk_bytes=1 << 20)
    backend.damage, backend.countdown = damage, copy
    stored.streamer.load(stored.half)
    stored.check(3)
    assert stored.streamer.counters.corrupted == backend.damaged == 1
    assert "was corrupted" in caplog.text
    assert stored.streamer.snapshot().mode == "synchronous"
    stored.close()


def test_residents_are_compared_when_they_arrive(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backend = CorruptingBackend()
    stored = Stored(tmp_path, backend, verify=True, chunk_bytes=1 << 20)
    backend.countdown, backend.always = 1, True
    stored.streamer.load(stored.streamer.plan_for(10**9))
    for _ in range(2):
        stored.check()
    blocks = stored.streamer.blocks
    matrices = [unit for unit in (*blocks.units, blocks.rest) if unit.nbytes >= SMALLEST_MATRIX]
    assert stored.streamer.counters.corrupted == backend.damaged == len(matrices)
    assert "a copy of what is outside of blocks was corrupted (resident: " in caplog.text
    assert "a copy of blocks.5 was corrupted (resident: blocks.5." in caplog.text
    stored.close()


def test_residents_that_nobody_waited_for_are_read_anew(tmp_path: Path) -> None:
    """What has arrived when a load is given up was not compared, so it is not kept."""
    backend = CorruptingBackend()
    stored = Stored(tmp_path, backend, verify=True, chunk_bytes=1 << 20)
    stored.streamer.load(stored.half)
    assert stored.streamer.arriving
    backend.countdown = 1
    backend.always = True
    stored.streamer.reader.flush()
    backend.always = False
    stored.streamer.give_way(1)
    assert stored.streamer.state is State.REDUCED
    stored.check(3)
    stored.close()


def test_a_resident_made_from_a_damaged_copy_of_its_master(monkeypatch: pytest.MonkeyPatch) -> None:
    made = settled()
    write_from = verify.UnitCopies.copy_resident

    def damaged(copies: verify.UnitCopies, buffer: torch.Tensor) -> None:
        write_from(copies, buffer)
        flip_a_bit(buffer)
        made.backend.damaged += 1

    monkeypatch.setattr(verify.UnitCopies, "copy_resident", damaged)
    made.streamer.load(made.streamer.plan_for(10**9))
    assert torch.equal(made.model(X), made.plain(X))
    assert made.streamer.counters.corrupted == made.backend.damaged > 0


def test_what_cannot_be_mended_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    made = settled()
    compare = verify._compare

    def damaged(parts: list[verify._Part]) -> list[str]:
        flip_a_bit(parts[0].copy)
        return compare(parts)

    with monkeypatch.context() as patch:
        patch.setattr(verify, "_compare", damaged)
        with pytest.raises(CorruptionError, match=r"a copy of blocks\.\d differs .* and again when it was copied anew"):
            made.step()
    assert torch.equal(made.step(), made.plain(X))


def test_a_resident_that_cannot_be_mended_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = Stored(tmp_path, CorruptingBackend(), verify=True)
    stored.streamer.load(stored.streamer.plan_for(stored.streamer.model_bytes - 1))
    compare = verify._compare

    def damaged(parts: list[verify._Part]) -> list[str]:
        if parts[0].name.startswith("blocks.1.qkv"):
            flip_a_bit(parts[0].copy)
        return compare(parts)

    with monkeypatch.context() as patch:
        patch.setattr(verify, "_compare", damaged)
        for _ in range(2):
            with pytest.raises(CorruptionError, match=r"a copy of blocks\.1 differs .*\(resident: blocks\.1\.qkv"):
                stored.run()
    stored.check(2)
    stored.close()


def test_synchronous_copies_stay_until_the_model_is_loaded_anew() -> None:
    made = settled()
    wished = made.streamer.config
    made.backend.countdown = 1
    for _ in range(2):
        made.step()
    assert made.streamer.plan.staging_bytes == max(segment.nbytes for segment in made.streamer.plan.segments)
    hits, misses = made.streamer.counters.hits, made.streamer.counters.misses
    assert torch.equal(made.step(), made.plain(X))
    segments = len(made.streamer.plan.segments)
    assert (made.streamer.counters.hits, made.streamer.counters.misses) == (hits, misses + segments)
    made.streamer.unload()
    made.streamer.configure(wished)
    assert "copies are synchronous" in made.streamer.explain()
    made.load()
    assert torch.equal(made.step(), made.plain(X))
    assert made.streamer.snapshot().mode == "synchronous"
    made.streamer.move_to(CorruptingBackend())
    made.load()
    assert torch.equal(made.step(), made.plain(X))
    assert "copies are synchronous" in made.streamer.explain()


def test_an_undamaged_model_streams_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same copies in the same order, with and without: only the sums come on top.

    Time stands still, because what a step has measured decides what is streamed from then on.
    """
    monkeypatch.setattr(cpu_backend, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    seen = []
    for on in (False, True):
        made = Made(verify=on)
        made.load()
        for _ in range(5):
            assert torch.equal(made.step(), made.plain(X))
        counters = made.streamer.counters
        seen.append((counters.copies, counters.hits, counters.misses, counters.streamed_bytes, counters.corrupted))
    assert seen[0] == seen[1]


def test_without_it_a_lane_is_a_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*_: object) -> None:
        raise AssertionError("something was compared")

    monkeypatch.setattr(checksums, "checksums", unexpected)
    monkeypatch.setattr(ChecksumVerifier, "check", unexpected)
    made = Made()
    made.load()
    for _ in range(3):
        made.step()
    assert type(made.streamer.site.lane) is Lane
    made.backend.countdown = 1
    outputs = [made.step() for _ in range(2)]
    assert not all(torch.equal(output, made.plain(X)) for output in outputs), "damage must show, or nothing is tested"


def test_it_can_be_switched_on_and_off() -> None:
    made = Made()
    for on in (True, False, True):
        made.streamer.configure(replace(made.streamer.config, verify=on))
        made.load()
        assert isinstance(made.streamer._verifier, ChecksumVerifier) is on
        assert (type(made.streamer.site.lane) is not Lane) is on
        assert torch.equal(made.step(), made.plain(X))


def test_a_streamer_that_verifies_is_freed_with_its_model() -> None:
    made = settled()
    backend = made.backend
    assert backend.store.allocated > 0
    del made  # No garbage collector: nothing refers to itself.
    assert backend.store.allocated == 0
