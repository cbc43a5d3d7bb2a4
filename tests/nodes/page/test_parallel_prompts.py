"""GPU Placement with split=parallel in a real ComfyUI server, with API prompts: two virtual GPUs."""

from __future__ import annotations

from typing import Any

import pytest
from servers import TINY, free

from tools import demo
from tools.host import HeadlessHost, PromptRejected

BOTH = ["gpu:0", "gpu:1"]
# The second finds what was verified in the first. Figures are those of the run before the last one, the second here.
SEEDS = (71, 72, 73)


def prompt(seed: int, loader: str, apart: bool, **placement: Any) -> dict[str, Any]:
    """Guided by two prompts, where they are ``apart`` of lengths so different that ComfyUI computes one by one."""
    result = demo.api_prompt(TINY, loader, seed)
    other = {"clip": ["clip", 0], "text": "a desert at noon " * (80 if apart else 1)}
    result["other"] = {"class_type": "CLIPTextEncode", "inputs": other}
    result["sampler"]["inputs"] |= {"cfg": 2.5, "negative": ["other", 0]}
    if placement:
        inputs = {"model": ["model", 0], **placement}
        result["placement"] = {"class_type": "WeightStreamGPUPlacement", "inputs": inputs}
        result["lora"]["inputs"]["model"] = ["placement", 0]
    return result


@pytest.fixture(scope="module")
def host(two_gpus: HeadlessHost) -> HeadlessHost:
    free(two_gpus)
    demo.sample(two_gpus, prompt(70, demo.THEIRS, apart=True))
    return two_gpus


def parallel_models(host: HeadlessHost) -> list[dict[str, Any]]:
    return [model for model in demo.read_status(host)["models"] if model["parallel"] and model["mode"] != "off"]


@pytest.fixture(scope="module")
def expected(host: HeadlessHost) -> list[Any]:
    """The latents of ComfyUI's own loader on one GPU."""
    return [demo.sample(host, prompt(seed, demo.THEIRS, apart=True)).latent for seed in SEEDS]


@pytest.mark.parametrize("loader", [demo.OURS, demo.THEIRS])
def test_two_prompts_on_two_gpus(host: HeadlessHost, expected: list[Any], loader: str) -> None:
    free(host)
    before = len(host.log)
    found = [demo.sample(host, prompt(seed, loader, apart=True, split="parallel")).latent for seed in SEEDS]
    assert found == expected
    assert expected[0] != expected[1]
    models = parallel_models(host)
    assert [model["device"] for model in models] == BOTH
    assert len({model["id"] for model in models}) == 1
    for model in models:
        assert model["parallel"] == {"devices": BOTH, "alone": ""}
        assert model["last_run"]["steps"] == demo.STEPS
        assert model["counters"]["streamed_bytes"] > 0
    assert "GPU Placement: MODEL on gpu:0 and gpu:1 at the same time (parallel)" in host.log
    assert "Traceback" not in host.log[before:]


def test_where_bits_differ_the_server_says_so(host: HeadlessHost) -> None:
    """A CPU computes two prompts in one batch with other bits than in two, and so few tokens too."""

    def small(seed: int, loader: str, **placement: Any) -> dict[str, Any]:
        result = prompt(seed, loader, apart=False, **placement)
        (latent,) = (node for node in result.values() if node["class_type"] == "EmptySD3LatentImage")
        latent["inputs"] |= {"width": 32, "height": 32}
        return result

    expected = demo.sample(host, small(73, demo.THEIRS)).latent
    free(host)
    assert demo.sample(host, small(73, demo.OURS, split="parallel")).latent == expected
    model, _ = parallel_models(host)
    assert model["parallel"]["alone"].startswith("a step gave other bits than on one GPU (by ")
    notices = demo.read_status(host)["notices"]
    assert [notice["kind"] for notice in notices if "not in parallel" in notice["text"]] == ["fallback"]
    close = demo.sample(host, small(73, demo.OURS, split="parallel", parallel_bits="close"))
    assert close.latent != expected
    assert all(model["parallel"]["alone"] == "" for model in parallel_models(host))


def test_an_unknown_value_is_refused(host: HeadlessHost) -> None:
    with pytest.raises(PromptRejected) as caught:
        host.submit(prompt(75, demo.OURS, apart=True, split="parallel", parallel_bits="maybe"))
    (error,) = caught.value.node_errors["placement"]["errors"]
    assert error["type"] == "value_not_in_list"


def test_the_input_is_the_last_one(host: HeadlessHost) -> None:
    """Saved workflows have the values of widgets in their order, so that older ones fit."""
    inputs = host.get("/object_info/WeightStreamGPUPlacement")["WeightStreamGPUPlacement"]["input"]
    assert [*inputs["optional"]][-2:] == ["on_missing", "parallel_bits"]
    assert inputs["optional"]["split"][1]["options"] == ["auto", "equal", "ratio", "parallel"]
