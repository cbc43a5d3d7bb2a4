"""What the status route tells of models, and the notices of what nodes could not do."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from placing import Machine
from sampling import MB, MODEL, sample, settle
from told import entry_of, parts_of
from weightstream.nodes.host.version import VERSION
from weightstream.nodes.loader import load_streamed
from weightstream.nodes.model.patcher import StreamedModelPatcher
from weightstream.nodes.page import runs
from weightstream.nodes.page.description import ladder_step
from weightstream.nodes.page.status import full_status, shorten
from weightstream.nodes.tell import messages
from weightstream.nodes.tell.names import shown_name, without_folders
from weightstream.nodes.tell.notices import keep_notice, withdraw_notice
from weightstream.nodes.twins.split import split_over
from weightstream.streaming import Snapshot, VramReader, format_bytes
from weightstream.streaming.machine.gpus import Nvml

ROOT = Path(messages.__file__).parents[2]
Load = Callable[..., StreamedModelPatcher]
READER = VramReader(Nvml(None))


def test_the_ladder(streamed: Load) -> None:
    model = streamed(24 * MB)
    assert entry_of(model)["ladder"] == "unloaded"
    settle(model)
    now = model.streamer.snapshot()
    kept, whole = (format_bytes(nbytes) for nbytes in (now.device_bytes - now.staging_bytes, model.model_size()))
    assert ladder_step(now) == ("pinned", f"{kept} of {whole} stay in VRAM")
    steps: list[tuple[Snapshot, tuple[str, str]]] = [
        (replace(now, streamed_block_bytes=5), ("pinned", f"{kept} of {whole} stay in VRAM")),
        (replace(now, staged_bytes=5, note="the limit is reached"), ("staged", "the limit is reached")),
        (replace(now, staged_bytes=5, building=True, locking=True), ("staged", "page-locked copies are made now")),
        (replace(now, staged_bytes=5, building=True), ("staged", "page-locked copies are made before the next step")),
        (replace(now, mode="synchronous"), ("synchronous", "its settings ask for it")),
        (replace(now, mode="synchronous", note="a copy was corrupted"), ("synchronous", "a copy was corrupted")),
        (replace(now, mode="resident"), ("resident", "")),
        (replace(now, mode="off", note="x"), ("unloaded", "")),
    ]
    assert [ladder_step(each) for each, _ in steps] == [expected for _, expected in steps]


def test_the_last_run_is_not_all_runs(streamed: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = streamed(24 * MB)
    assert entry_of(model)["last_run"] is None
    sample(model, steps=3)
    first = entry_of(model)
    sample(model, steps=2)
    running = entry_of(model)
    monkeypatch.setattr(runs, "RUNNING_SECONDS", 0)
    second = entry_of(model)
    assert (first["last_run"], running["running"], second["running"]) == (None, True, False)
    assert running["last_run"]["steps"] == 3, "of the run that has ended"
    assert second["last_run"]["steps"] == 2
    assert second["counters"]["steps"] == 5
    copied = second["counters"]["streamed_bytes"] - first["counters"]["streamed_bytes"]
    assert second["last_run"]["bytes"] == copied > 0


def test_a_run_of_one_step_has_times_of_its_own(streamed: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "RUNNING_SECONDS", 0)
    model = streamed(24 * MB)
    before = None
    for steps in (6, 1, 1):
        sample(model, steps=steps)
        entry = entry_of(model)
        run = entry["last_run"]
        if steps == 1:
            assert run["step_seconds"] == entry["step_seconds"] != before
            assert run["rate"] == pytest.approx(run["bytes"] / run["step_seconds"])
        before = entry["step_seconds"]


def test_parts_of_a_split_model_are_told_as_one_model(loaded: StreamedModelPatcher) -> None:
    ours = split_over(loaded, [torch.device("cpu", 0), torch.device("cpu", 1)], "equal", None, None).patcher
    sample(ours)
    entries = [each for each in full_status()["models"] if each["id"] == str(ours.streamed.number)]
    assert [each["device"] for each in entries] == ["gpu:0", "gpu:1"]
    assert {each["name"] for each in entries} == {MODEL}
    assert all(each["run"]["counters"]["steps"] == 3 for each in entries)
    assert all(parts_of(device) == device["total"] for device in full_status()["devices"])


def test_a_file_is_named_as_the_host_lists_it(models: Path, tmp_path: Path) -> None:
    (models / "flux").mkdir(exist_ok=True)
    assert shown_name(str(models / "flux" / "one.safetensors")) == str(Path("flux", "one.safetensors"))
    assert shown_name(str(models / "one.safetensors")) == "one.safetensors"
    assert shown_name(str(tmp_path / "elsewhere" / "one.safetensors")) == "one.safetensors"
    folder = folder_paths.get_folder_paths("diffusion_models")[0]
    assert not shown_name(str(Path(folder + "-too") / "one.safetensors")).startswith("..")


def test_texts_name_no_folder(models: Path, tmp_path: Path) -> None:
    text = f"{models / 'flux' / 'one.safetensors'}: truncated; {tmp_path / 'x.bin'} and /usr are left"
    assert without_folders(text).startswith(f"{Path('flux', 'one.safetensors')}: truncated; ")
    assert str(tmp_path.parent.parent) not in without_folders(text)


def test_everything_can_be_sent(streamed: Load) -> None:
    model = streamed(24 * MB)
    sample(model)
    now = full_status()
    assert json.loads(json.dumps(now)) == now
    assert (now["schema"], now["version"]) == (1, VERSION)
    assert f'version = "{VERSION}"' in (ROOT / "pyproject.toml").read_text("utf-8")


def test_the_revision_changes_with_what_events_leave_out(streamed: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "RUNNING_SECONDS", 0)
    model = streamed(24 * MB)
    model.streamer.finish_building()
    one = shorten(full_status(READER))["revision"]
    assert shorten(full_status(READER))["revision"] == one
    sample(model)
    two = shorten(full_status(READER))["revision"]
    assert two != one
    keep_notice("inactive", "x", "because", None, model.model)
    assert shorten(full_status(READER))["revision"] != two
    withdraw_notice("x", None)
    assert shorten(full_status(READER))["revision"] == two


def test_an_event_has_what_changes_of_a_fleet_and_the_revision_its_models() -> None:
    worker = {"name": "gpu-0", "host": "one", "pid": 7, "state": "running", "reason": "", "prompt_id": "a"}
    worker |= {"since": 1_764_320_000.3, "done": 1, "changes": 1, "loaded": ["x"]}
    alone = full_status(READER)

    def event(**changes: Any) -> dict[str, Any]:
        return shorten({**alone, "fleet": {"waiting": 2, "reruns": 1, "workers": [{**worker, **changes}]}})

    assert "fleet" not in shorten(alone)
    first = event()
    row = ["gpu-0", "running", "", 1_764_320_000, 1, 1]
    assert first["fleet"] == {"waiting": 2, "reruns": 1, "workers": [row]}
    assert event(since=None, done=2, prompt_id=None, state="free")["revision"] == first["revision"]
    assert event(loaded=["y"])["revision"] != first["revision"]


# -- notices -----------------------------------------------------------------------------------------------------------


def test_a_model_that_does_not_stream_is_told_of_for_as_long_as_it_lives(machine: Machine, models: Path) -> None:
    machine(0)
    with torch.inference_mode():
        model = load_streamed(str(models / MODEL), {}, node_id="4")
    assert [notice for notice in full_status()["notices"] if notice["node_id"] == "4"] == [
        {
            "node_id": "4",
            "name": MODEL,
            "kind": "inactive",
            "text": "not streamed, loaded ComfyUI's own way: there is no GPU, so there is nothing to stream to",
        }
    ]
    del model
    gc.collect()
    assert [notice for notice in full_status()["notices"] if notice["node_id"] == "4"] == []


def test_a_placement_that_is_another_is_told_of_until_it_is_not(
    loaded: StreamedModelPatcher, nodes_of_pack: dict[str, type]
) -> None:
    node = nodes_of_pack["WeightStreamGPUPlacement"]

    def told() -> list[tuple[str, str]]:
        """Other notices may be of models of other tests, which live until they are collected."""
        notices = [notice for notice in full_status()["notices"] if notice["name"] == "GPU Placement"]
        return [(notice["kind"], notice["text"]) for notice in notices]

    node.execute(loaded, devices="gpu:0,gpu:5")
    ((kind, text),) = told()
    assert kind == "fallback"
    assert "gpu:5 is not there" in text
    node.execute(loaded, devices="gpu:0")
    assert told() == []


def test_the_oldest_notices_are_forgotten(streamed: Load) -> None:
    about = streamed(24 * MB)
    for number in range(30):
        keep_notice("inactive", f"file {number}", "because", None, about.model)
    names = [notice["name"] for notice in full_status()["notices"]]
    assert names == [f"file {number}" for number in range(14, 30)]
    for name in names:
        withdraw_notice(name, None)
