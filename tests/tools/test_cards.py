"""docs/cards.md: the planner asked with the data of cards. Where it was measured, the answer is what was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from streaming.estimating.cards import KNOWN
from tools import cards, shapes

ROOT = Path(__file__).resolve().parents[2]
CARDS = {card.name: card for card in cards.CARDS}
FLUX, FLUX_FP8, QWEN = cards.MODELS[:3]
LEAST_VRAM = CARDS["RTX 4060"]
PLENTY = 1e15


@pytest.mark.parametrize(("model", "case"), cards.MEASURED, ids=[case for _, case in cards.MEASURED])
def test_with_the_data_of_an_h200_it_says_what_was_measured_there(model: cards.Model, case: str) -> None:
    assert cards.seconds_of(cards.on_h200(model, case)) == pytest.approx(cards.ours(case)["step_s"], rel=0.03)


@pytest.mark.parametrize(("model", "case"), cards.MEASURED, ids=[case for _, case in cards.MEASURED])
def test_the_plan_is_about_the_one_that_ran_there(model: cards.Model, case: str) -> None:
    ran = cards.ours(case)["status"]["streamed_block_bytes"]
    assert cards.on_h200(model, case).streamed_bytes == pytest.approx(ran, rel=0.03)


@pytest.mark.parametrize("document", cards.tables(), ids=lambda path: path.name)
def test_the_tables_are_what_the_planner_says(document: Path) -> None:
    assert cards.filled(document) == document.read_text("utf-8"), "run: python tools/cards.py"


def test_no_verdict_hangs_on_the_estimate_of_compute() -> None:
    """As the document says: with half the compute the bus is no limit either, not even in the closest case."""
    shares = {(card, model): cards.bus_share(card, model) for card in cards.CARDS for model in cards.MODELS}
    card, model = max(shares, key=shares.__getitem__)
    assert shares[card, model] < 0.3
    forecast = cards.on_card(card, model, 0.5).forecast
    assert forecast is not None
    assert forecast.limited_by == "compute"


def test_below_its_share_of_compute_the_bus_limits_a_step() -> None:
    share = cards.bus_share(LEAST_VRAM, FLUX)
    forecast = cards.on_card(LEAST_VRAM, FLUX, share * 0.9).forecast
    assert forecast is not None
    assert forecast.limited_by == "bus"


def test_what_fits_does_not_stream_and_what_streams_leaves_room() -> None:
    for card in cards.CARDS:
        plan = cards.on_card(card, FLUX_FP8)
        room = card.free_bytes - cards.reserved_bytes(FLUX_FP8)
        assert bool(plan.segments) == (FLUX_FP8.shape.outline.model_bytes > room)
        assert plan.device_bytes <= room


def test_with_enough_ram_no_disk_is_asked() -> None:
    step = cards.with_ram(LEAST_VRAM, QWEN, PLENTY, cards.DISKS[0])
    plan = cards.on_card(LEAST_VRAM, QWEN)
    assert step == cards.InRam(plan.streamed_bytes, 0, cards.seconds_of(plan))


def test_with_little_ram_a_step_takes_what_the_disk_takes() -> None:
    disk = 0.5e9
    step = cards.with_ram(LEAST_VRAM, QWEN, 8 * cards.GIB, disk)
    assert 7.5 * cards.GIB < step.pinned <= 8 * cards.GIB
    assert step.seconds == pytest.approx(step.from_disk / (disk * cards.DISK_SHARE), rel=0.1)
    # The planner keeps what it can where weights arrive slowly.
    hurried = cards.with_ram(LEAST_VRAM, QWEN, 8 * cards.GIB, 100 * disk)
    assert step.from_disk < hurried.from_disk


def test_windows_allows_less_to_be_page_locked_and_small_machines_are_full_first() -> None:
    assert cards.pinnable_bytes(64 * cards.GIB, "nt") == 0.4 * 64 * cards.GIB
    assert cards.pinnable_bytes(64 * cards.GIB, "posix") == 57 * cards.GIB
    assert cards.pinnable_bytes(16 * cards.GIB, "posix") == pytest.approx(9.4 * cards.GIB)


def test_the_shapes_are_what_the_host_builds_and_the_pack_cuts(tmp_path: Path) -> None:
    made = tmp_path / "shapes.json"
    command = [sys.executable, str(ROOT / "tools" / "shapes.py"), str(made)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    written = json.loads(shapes.FILE.read_text("utf-8"))
    for name, folded in json.loads(made.read_text("utf-8")).items():
        now, before = shapes.unfold(folded), shapes.unfold(written[name])
        assert now.outline == before.outline, f"{name}: run tools/shapes.py"
        assert now.operations == pytest.approx(before.operations, rel=0.01)
    assert written.keys() == {model.outline for model in cards.MODELS}


def test_a_profile_has_all_of_the_compute() -> None:
    shape = FLUX.shape
    profile = shape.profile(2.0, 25e9)
    assert profile.compute_seconds == pytest.approx(2.0)
    assert profile.unit_times is not None
    assert sum(time.work for time in profile.unit_times) == pytest.approx(sum(profile.block_seconds))
    assert all(time.hold <= time.work for time in profile.unit_times)
    # 74.4 TFLOP: 59.5 in matrices, 14.9 in attention, which follows the matrices for queries, keys and values.
    assert shape.operations == pytest.approx(74.4e12, rel=0.001)
    assert sum(shape.hold) == pytest.approx(59.5e12, rel=0.01)


@pytest.mark.parametrize("model", [model for model in cards.MODELS if not model.casts], ids=lambda model: model.name)
def test_the_command_knows_what_was_measured(model: cards.Model) -> None:
    """`plan --card` is in the pack, and these results are not."""
    (known,) = [known for known in KNOWN if model.name.startswith(known.name)]
    assert known.h200_seconds == pytest.approx(cards.resident_seconds(model), rel=0.01)
    assert known.size == model.size
    assert sum(known.blocks) == model.shape.outline.blocks
    assert known.weights == pytest.approx(model.shape.outline.model_bytes / 2, rel=0.01)


def test_what_a_card_gains_is_at_most_the_part_of_the_bus() -> None:
    """The RTX 4060 with FLUX, as README.md has it: 1.5 s of 7.2."""
    card, plan = LEAST_VRAM, cards.on_card(LEAST_VRAM, FLUX)
    theirs, bus = cards.one_after_the_other(card, FLUX), plan.streamed_weight_bytes / card.bandwidth
    assert theirs - cards.seconds_of(plan) == pytest.approx(bus)
    assert (round(theirs, 1), round(bus, 1)) == (7.2, 1.5)
    assert "ComfyUI at worst" in cards.README.read_text("utf-8")
