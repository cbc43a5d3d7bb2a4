"""A GPU Placement, or a Streamed Model Loader, that is there already: used where it has room, and else left alone."""

from __future__ import annotations

from typing import Any

import pytest
from weightstream.streaming.workflows.convert import Conversion, convert
from workflow_files import check_links, node, passing, workflow

OURS, PLACEMENT, CHECKPOINT = "WeightStreamModelLoader", "WeightStreamGPUPlacement", "CheckpointLoaderSimple"
BY_HAND = ["gpu:0,gpu:1", "auto", "", "default", "default", "error"]


def placement(number: int, values: Any = BY_HAND, source: tuple[int, int] = (1, 0)) -> dict[str, Any]:
    """As the page saves it; no input but the model's is connected."""
    there = {**node(number, PLACEMENT, values, model=source)}
    there["inputs"] += [{"name": name, "type": name.upper(), "link": None} for name in ("clip", "vae")]
    there["outputs"] = [{"name": name, "type": name, "links": []} for name in ("MODEL", "CLIP", "VAE")]
    return there


def loader(device: str = "cuda:0") -> dict[str, Any]:
    return node(1, "UNETLoaderMultiGPU", ["f", "default", device])


def encoder(number: int, device: str = "cuda:1") -> dict[str, Any]:
    return node(number, "CLIPLoaderMultiGPU", ["c", "flux", device])


def placed(conversion: Conversion) -> list[dict[str, Any]]:
    return [one for one in conversion.workflow["nodes"] if one["type"] == PLACEMENT]


def codes(conversion: Conversion) -> list[str]:
    return [note.code for note in conversion.notes]


def check(conversion: Conversion) -> None:
    check_links(conversion.workflow)
    again = convert(conversion.workflow)
    assert (again.changed, again.workflow) == (False, conversion.workflow)


def source(graph: dict[str, Any], slot: dict[str, Any]) -> tuple[int, int]:
    [found] = [(link[1], link[2]) for link in graph["links"] if link[0] == slot["link"]]
    return found


def with_companions(*, values: Any = BY_HAND, first: dict[str, Any] | None = None) -> dict[str, Any]:
    return workflow(
        first or loader(),
        placement(2, values),
        encoder(3),
        node(4, "VAELoaderMultiGPU", ["v", "cuda:1"]),
        node(5, "CLIPTextEncode", [], clip=(3, 0)),
        node(6, "KSampler", [], model=(2, 0), positive=(5, 0)),
        node(7, "VAEDecode", [], samples=(6, 0), vae=(4, 0)),
    )


@pytest.mark.parametrize("values", [BY_HAND, dict(zip(["devices", "on_missing"], BY_HAND[::5], strict=True))])
@pytest.mark.parametrize("kind", ["UNETLoaderMultiGPU", OURS])
def test_text_encoder_and_vae_go_through_the_placement_that_is_there(kind: str, values: Any) -> None:
    found = convert(with_companions(values=values, first={**loader(), "type": kind}))
    [there] = placed(found)
    saved = there["widgets_values"]
    if isinstance(values, list):
        assert saved == ["gpu:0,gpu:1", "auto", "", "gpu:1", "gpu:1", "error", "exact"], "an input is newer than it"
    else:
        assert saved == {**values, "clip_device": "gpu:1", "vae_device": "gpu:1"}
    assert [source(found.workflow, slot) for slot in there["inputs"]] == [(1, 0), (3, 0), (4, 0)]
    encode, decode = found.workflow["nodes"][4], found.workflow["nodes"][6]
    assert source(found.workflow, encode["inputs"][0]) == (2, 1)
    assert source(found.workflow, decode["inputs"][1]) == (2, 2)
    assert codes(found).count("placement-used") == 2
    assert "node 2" in found.notes[-1].text
    check(found)


def test_what_a_placement_says_stays_and_is_told() -> None:
    values = ["gpu:2", "parallel", "", "cpu", "default", "fallback", "close"]
    found = convert(with_companions(values=values, first=loader("cuda:1")))
    [there] = placed(found)
    assert there["widgets_values"] == [*values[:4], "gpu:1", *values[5:]]
    left = [note.values["inputs"] for note in found.notes if note.code == "placement-stays"]
    assert left == ["devices=gpu:1", "clip_device=gpu:1"]
    check(found)


def test_a_placement_that_says_the_same_needs_no_word() -> None:
    values = ["gpu:1", "auto", "", "default", "default", "fallback"]
    found = convert(workflow(loader("cuda:1"), placement(2, values), node(3, "KSampler", [], model=(2, 0))))
    assert codes(found) == ["loader"]
    assert len(placed(found)) == 1


def test_a_placement_through_which_another_text_encoder_goes_has_no_room() -> None:
    graph = with_companions()
    nodes = [*graph["nodes"], node(8, "CLIPLoader", ["other", "flux"])]
    for one in nodes:
        for slot in (*one["inputs"], *one["outputs"]):
            slot.update({"links": []} if "links" in slot else {"link": ends(graph, slot["link"])})
    nodes[1]["inputs"][1]["link"] = (8, 0)
    found = convert(workflow(*nodes))
    assert [note.values["inputs"] for note in found.notes if note.code == "placement-stays"] == ["clip_device=gpu:1"]
    assert source(found.workflow, found.workflow["nodes"][4]["inputs"][0]) == (3, 0)
    check(found)


def ends(graph: dict[str, Any], number: int | None) -> tuple[int, int] | None:
    return next(((link[1], link[2]) for link in graph["links"] if link[0] == number), None)


def test_a_text_encoder_that_comes_before_the_placement_makes_no_circle() -> None:
    """A LoRA between loader and placement takes both."""
    lora = passing(2, "LoraLoader", (1, 0), "MODEL", "MODEL")
    lora["inputs"].append({"name": "clip", "type": "CLIP", "link": (4, 0)})
    graph = workflow(loader(), lora, placement(3, source=(2, 0)), encoder(4), node(5, "KSampler", [], model=(3, 0)))
    found = convert(graph)
    assert "placement-stays" in codes(found)
    assert placed(found)[0]["widgets_values"] == BY_HAND
    check(found)


def test_two_placements_stay_as_they_are() -> None:
    graph = workflow(
        loader("cuda:1"),
        placement(2),
        placement(3),
        node(4, "KSampler", [], model=(2, 0)),
        node(5, "KSampler", [], model=(3, 0)),
    )
    found = convert(graph)
    assert [one["widgets_values"] for one in placed(found)] == [BY_HAND, BY_HAND]
    assert "(node 2, 3)" in found.notes[-1].text
    check(found)


def test_what_does_not_go_through_the_placement_gets_one_of_its_own() -> None:
    graph = workflow(
        loader("cuda:1"), placement(2), node(3, "KSampler", [], model=(2, 0)), node(4, "KSampler", [], model=(1, 0))
    )
    found = convert(graph)
    assert [one["widgets_values"][0] for one in placed(found)] == ["gpu:0,gpu:1", "gpu:1"]
    sampler = found.workflow["nodes"][3]
    assert source(found.workflow, sampler["inputs"][0]) == (placed(found)[1]["id"], 0)
    check(found)


def test_a_text_encoder_goes_along_with_a_streamed_model_loader_that_is_there() -> None:
    graph = workflow(
        {**node(1, OURS, ["f", "default", 0.0]), "outputs": [{"name": "MODEL", "type": "MODEL", "links": []}]},
        encoder(2),
        node(3, "CLIPTextEncode", [], clip=(2, 0)),
        node(4, "KSampler", [], model=(1, 0), positive=(3, 0)),
    )
    found = convert(graph)
    assert codes(found) == ["host", "placement"]
    assert placed(found)[0]["widgets_values"][3] == "gpu:1"
    check(found)


def test_a_placement_in_a_prompt_is_used() -> None:
    prompt = {
        "1": {"class_type": "UNETLoaderMultiGPU", "inputs": {"unet_name": "f", "device": "cuda:0"}},
        "2": {"class_type": PLACEMENT, "inputs": {"model": ["1", 0], "devices": "gpu:0,gpu:1"}},
        "3": {"class_type": "CLIPLoaderMultiGPU", "inputs": {"clip_name": "c", "type": "flux", "device": "cuda:1"}},
        "4": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["3", 0]}},
        "5": {"class_type": "KSampler", "inputs": {"model": ["2", 0], "positive": ["4", 0]}},
    }
    found = convert(prompt).workflow
    assert found["2"]["inputs"] == {
        "model": ["1", 0],
        "clip": ["3", 0],
        "devices": "gpu:0,gpu:1",
        "clip_device": "gpu:1",
    }
    assert found["4"]["inputs"] == {"clip": ["2", 1]}
    assert not convert(found).changed


@pytest.mark.parametrize("other", [False, True])
def test_a_checkpoint_whose_model_leads_nowhere_takes_nothing_along(other: bool) -> None:
    """Its VAE goes along with another MODEL, if there is one that it meets."""
    nodes = [node(1, "CheckpointLoaderSimpleMultiGPU", ["c", "cuda:1"])]
    nodes += [node(2, "UNETLoader", ["f", "default"])] if other else []
    nodes += [node(3, "KSampler", [], **({"model": (2, 0)} if other else {}))]
    found = convert(workflow(*nodes, node(4, "VAEDecode", [], samples=(3, 0), vae=(1, 2))))
    assert [source(found.workflow, one["inputs"][0]) for one in placed(found)] == ([(2, 0)] if other else [])
    assert ("alone" in codes(found)) != other
    check(found)
