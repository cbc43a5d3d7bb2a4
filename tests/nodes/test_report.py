"""The node Streaming Report."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from sampling import MB, MODEL, sample
from weightstream.nodes.model.patcher import StreamedModelPatcher
from weightstream.nodes.twins.split import split_over
from weightstream.streaming.machine.server_status import STATE_WORDS

Load = Callable[..., StreamedModelPatcher]


@pytest.fixture
def node(nodes_of_pack: dict[str, type]) -> Any:
    return nodes_of_pack["WeightStreamReport"]


def test_it_tells_of_plan_and_last_run(node: Any, streamed: Load) -> None:
    model = streamed(24 * MB)
    sample(model, steps=3)
    result = node.execute(model)
    text, told = result.args[0], json.loads(result.args[1])
    (entry,) = told["models"]
    run = entry["last_run"]
    first, empty, *items = text.splitlines()
    assert first == f"**{MODEL}**: {told['line']}"
    assert re.fullmatch(r"[\d.]+ s/step · .+", told["line"])
    assert empty == "", "without it a list would not begin"
    assert items[0].startswith(f"- **gpu:0**: {STATE_WORDS.get(entry['ladder'], entry['ladder'])}")
    assert f"  - plan: {entry['plan']}" in items
    assert any(item.startswith(f"  - last run: {run['steps']} steps") for item in items)
    assert all(item.startswith(("- **", "  - ")) for item in items), "a list of Markdown"
    assert (run["steps"], run["misses"]) == (3, entry["counters"]["misses"])
    assert run["bytes"] == entry["counters"]["streamed_bytes"] > 0
    assert result.ui == {"text": [text], "weightstream": [told]}


def test_it_tells_of_a_step_that_ran_again(node: Any, streamed: Load) -> None:
    model = streamed(24 * MB)
    errors = iter([torch.OutOfMemoryError("no room")])

    def fail_once(*_: object) -> None:
        for error in errors:
            raise error

    model.model.diffusion_model.double_blocks[0].register_forward_pre_hook(fail_once)
    sample(model, steps=2)
    assert "last run: 2 steps (1 ran again)" in node.execute(model).args[0]


def test_before_a_run_it_says_so(node: Any, streamed: Load) -> None:
    assert "no run has ended yet" in node.execute(streamed(24 * MB)).args[0]


def test_of_a_split_model_it_tells_of_each_device(node: Any, loaded: StreamedModelPatcher) -> None:
    ours = split_over(loaded, [torch.device("cpu", 0), torch.device("cpu", 1)], "equal", None, None).patcher
    sample(ours)
    text, told = node.execute(ours).args
    devices = [line.split("**")[1] for line in text.splitlines() if line.startswith("- **")]
    assert devices[:2] == ["gpu:0", "gpu:1"]
    assert text.splitlines()[0].endswith("gpu:0, gpu:1")
    assert len(json.loads(told)["models"]) == 2


def test_a_model_that_does_not_stream(node: Any, foreign: ModelPatcher) -> None:
    text, told = node.execute(foreign).args
    assert text.startswith("**Flux**: does not stream: ComfyUI moves its weights")
    assert json.loads(told)["streams"] is False


def test_it_is_made_anew_each_time(node: Any) -> None:
    assert node.fingerprint_inputs() != node.fingerprint_inputs()
