"""What a node shows while its model runs: one line for all devices, as text and as values, the details behind it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sampling import MB, MODEL, sample
from weightstream.nodes.tell import messages
from weightstream.nodes.twins.split import split_over

NODE = "7"


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What the host sends to pages: the texts of the node, and our events."""
    found: list[tuple[str, Any]] = []
    server = SimpleNamespace(
        client_id=None,
        send_progress_text=lambda text, node_id, sid: found.append(("text", text)),
        send_sync=lambda event, data, sid: found.append((event, data)),
    )
    monkeypatch.setattr(messages, "find_server", lambda: server)
    return found


def lines_in(sent: list[tuple[str, Any]]) -> list[dict[str, Any]]:
    return [data for event, data in sent if event == messages.LINE_EVENT]


def test_the_node_has_one_line_and_the_plan_behind_it(streamed: Any, sent: list[tuple[str, Any]]) -> None:
    model = streamed(24 * MB, node_id=NODE)
    sample(model, steps=4)
    line = lines_in(sent)[-1]
    assert (line["node"], line["devices"]) == (NODE, ("gpu:0",))
    assert line["seconds"] > 0
    assert 0 < line["kept_bytes"] < line["total_bytes"] == model.model_size()
    assert line["details"] == [f"gpu:0: {model.streamer.explain()}"]
    # A page without our script shows this.
    assert sent[-2] == ("text", line["text"])
    assert line["text"].startswith(f"{line['seconds']:.2g} s/step · ")
    assert "\n" not in line["text"]


def test_a_split_model_has_the_line_of_all_its_devices(loaded: Any, sent: list[tuple[str, Any]]) -> None:
    devices = [torch.device("cpu", 0), torch.device("cpu", 1)]
    loaded.settings = replace(loaded.settings, vram_limit=14 * MB)
    model = split_over(loaded, devices, "equal", None, NODE).patcher
    sample(model, steps=3)
    line = lines_in(sent)[-1]
    assert line["devices"] == ("gpu:0", "gpu:1")
    assert line["text"].endswith("gpu:0, gpu:1")
    assert line["seconds"] > 0
    assert [part.streamed.node_id for part in model.parts] == [NODE], "who is measured last tells of it"
    assert [detail.partition(": ")[0] for detail in line["details"]] == ["gpu:0", "gpu:1"]
    parts = [part.streamer.snapshot() for part in (model.streamed, *(part.streamed for part in model.parts))]
    assert line["total_bytes"] == sum(p.resident_bytes + p.rest_bytes + p.streamed_weight_bytes for p in parts)
    assert {data["node"] for data in lines_in(sent)} == {NODE}


def test_the_log_names_the_device_of_each_part(loaded: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    model = split_over(loaded, [torch.device("cpu", 0), torch.device("cpu", 1)], "equal", None, None).patcher
    sample(model)
    plans = [record.getMessage() for record in caplog.records if "on the device" in record.getMessage()]
    assert {plan.partition(": ")[0] for plan in plans} == {f"[WeightStream] {MODEL} on gpu:{part}" for part in (0, 1)}


def test_without_a_node_nothing_is_sent(streamed: Any, sent: list[tuple[str, Any]]) -> None:
    sample(streamed(24 * MB))
    assert sent == []


@pytest.mark.parametrize(("client", "goes_to"), [("page", "page"), (None, None), ("", None)])
def test_a_line_goes_to_the_page_whose_prompt_runs_and_else_to_all(
    client: str | None, goes_to: str | None, streamed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    to: set[str | None] = set()
    server = SimpleNamespace(
        client_id=client,
        send_progress_text=lambda text, node_id, sid: to.add(sid),
        send_sync=lambda event, data, sid: to.add(sid),
    )
    monkeypatch.setattr(messages, "find_server", lambda: server)
    sample(streamed(24 * MB, node_id=NODE))
    assert to == {goes_to}
