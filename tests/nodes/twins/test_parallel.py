"""GPU Placement with split=parallel: the GPUs work on one step at the same time, and the latents are the host's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from placing import FIRST, SECOND, place
from prompts import conditioning, guided
from weightstream.nodes.twins.verified import verdicts

# Prompts so different in length that the host computes them one by one, on one device too. With batches of one and of
# two the kernels of a CPU give other bits.
LONG = 23


def apart(model: Any, **options: Any) -> torch.Tensor:
    return guided(model, negative=conditioning(2, LONG), **options)


@pytest.fixture(autouse=True)
def nothing_known() -> None:
    verdicts.clear()


def parallel(model: Any, **inputs: Any) -> Any:
    return place(model, split="parallel", **inputs)[0]


def steps_on(model: Any) -> list[int]:
    """How many steps ran on each device in the last run."""
    copies = [model, *model.get_additional_models_with_key("multigpu")]
    return [copy.streamer.snapshot().run.counters.steps for copy in copies]


def test_two_gpus_compute_a_prompt_each(loaded: Any, said: list[str], native: ModelPatcher) -> None:
    expected = apart(native)
    model = parallel(loaded)
    assert said == ["MODEL on gpu:0 and gpu:1 at the same time (parallel)"]
    (copy,) = model.get_additional_models_with_key("multigpu")
    assert (model.load_device, copy.load_device) == (FIRST, SECOND)
    for _ in range(3):
        assert torch.equal(apart(model), expected)
    assert (model.streamed.alone, model.streamed.together) == ("", 3)
    assert steps_on(model) == [3, 3]
    assert torch.equal(apart(loaded), expected)
