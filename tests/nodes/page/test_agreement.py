"""All that tells of a run has the same figures: line, card, causes, table of steps, report and command line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sampling import MB, sample
from told import entry_of
from weightstream.nodes.model.patcher import StreamedModelPatcher
from weightstream.nodes.page import runs
from weightstream.nodes.page.description import facts_of
from weightstream.nodes.page.status import full_status
from weightstream.nodes.page.timeline import describe_runs
from weightstream.nodes.page.usage import DeviceUsage
from weightstream.nodes.tell import messages
from weightstream.nodes.twins.split import split_over
from weightstream.streaming.machine.server_status import as_text, describe_model

Load = Callable[..., StreamedModelPatcher]
NODE = "7"
DEVICE = DeviceUsage("gpu:0", "", True, 24 * MB, 1 * MB, 0, 0, 0, 0, 3 * MB)


@pytest.fixture(autouse=True)
def ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run has ended as soon as its last step has."""
    monkeypatch.setattr(runs, "RUNNING_SECONDS", 0)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The lines that pages were sent."""
    found: list[dict[str, Any]] = []
    server = SimpleNamespace(
        client_id=None, send_progress_text=lambda *_: None, send_sync=lambda _, data, __: found.append(data)
    )
    monkeypatch.setattr(messages, "find_server", lambda: server)
    return found


def means(values: dict[str, Any]) -> tuple[float, float, float]:
    """As the page's table has them (web/lib/plots.mjs)."""
    counted = slice(2, None) if len(values["steps"]) > 2 else slice(None)
    seconds, rate, waiting = (fmean(values[name][counted]) for name in ("seconds", "rate", "waiting"))
    return seconds, rate, waiting


@pytest.mark.parametrize("steps", [2, 3, 4, 6])
def test_everything_tells_the_same_of_a_run(
    streamed: Load, lines: list[dict[str, Any]], steps: int, nodes_of_pack: dict[str, Any]
) -> None:
    model = streamed(24 * MB, node_id=NODE)
    sample(model, steps=steps)
    entry, (table,), line = entry_of(model), describe_runs([model.streamed]), lines[-1]
    run = entry["last_run"]
    seconds, rate, waiting = means(table)
    assert table["steps"] == list(range(1, steps + 1))
    assert run["step_seconds"] == pytest.approx(seconds, abs=1e-6)
    assert run["rate"] == pytest.approx(rate, abs=1)
    assert run["waiting"] == pytest.approx(waiting, abs=1e-3)
    assert line["seconds"] == run["step_seconds"]
    assert line["waiting"] == (run["waiting"] if run["waiting"] >= 0.03 else None)
    facts = facts_of(model.streamed, model.streamer.snapshot(), DEVICE)
    assert facts.step == run["step_seconds"]
    assert facts.waited == run["waiting"] * run["step_seconds"]
    assert run["stall_ms_per_block"] == pytest.approx(1000 * facts.waited / entry["blocks"])
    said = "\n".join(describe_model(entry))
    assert f"{run['step_seconds']:.3f} s" in said
    assert f"{100 * run['waiting']:.0f} % waiting" in said
    text, told = nodes_of_pack["WeightStreamReport"].execute(model).args
    assert text.splitlines()[0].endswith(line["text"])
    assert json.loads(told)["models"][0]["last_run"] == run


def test_the_parts_of_a_model_tell_of_one_run(loaded: StreamedModelPatcher, lines: list[dict[str, Any]]) -> None:
    loaded.settings = replace(loaded.settings, vram_limit=14 * MB)
    devices = [torch.device("cpu", 0), torch.device("cpu", 1)]
    model = split_over(loaded, devices, "equal", None, NODE).patcher
    sample(model, steps=6)
    runs = [each.streamer.snapshot().run for each in (model.streamed, *(part.streamed for part in model.parts))]
    assert lines[-1]["seconds"] == max(run.step_seconds for run in runs)
    assert lines[-1]["waiting"] in (None, max(run.waiting for run in runs))


def test_while_it_runs_the_line_is_what_the_plan_expects(streamed: Load, lines: list[dict[str, Any]]) -> None:
    model = streamed(24 * MB, node_id=NODE)
    sample(model, steps=6)
    measured = lines[-1]["seconds"]
    model.streamed.announce()
    assert lines[-1]["seconds"] == measured, "it stays once the run has ended"
    model.streamed.begin_run()
    model.streamed.announce()
    assert lines[-1]["seconds"] == model.streamer.snapshot().predicted_step_seconds


@pytest.mark.parametrize("budget", [24, 64])
def test_people_read_one_word_for_one_thing(streamed: Load, budget: int, nodes_of_pack: dict[str, Any]) -> None:
    """Compute is waiting, memory is page-locked, weights stay, copies come late."""
    model = streamed(budget * MB)
    sample(model)
    model.streamer.finish_building()
    text = as_text(full_status()) + nodes_of_pack["WeightStreamReport"].execute(model).args[0]
    assert re.search(r"\b(stay|stays)\b", text)
    assert "waiting" in text
    assert re.findall(r"(?i)\b(?:stall\w*|waited|wait|pinned|resident\w*|miss(?:es)?)\b", text) == []
