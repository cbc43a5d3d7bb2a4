"""A MODEL is followed through the nodes that give it on: what streams already gets no second settings."""

from __future__ import annotations

from typing import Any

import pytest
from weightstream.streaming.workflows.convert import convert
from workflow_files import check_links, node, passing, settings, workflow

SETTINGS = "WeightStreamOffloadSettings"
CHECKPOINT = "CheckpointLoaderSimple"
MUTED, BYPASSED = 2, 4


def origin(graph: dict[str, Any], number: int) -> str:
    """The class that the first input of a node comes from."""
    kinds = {one["id"]: one["type"] for one in graph["nodes"]}
    [found] = [kinds[link[1]] for link in graph["links"] if link[3:5] == [number, 0]]
    return found


def test_what_comes_out_of_a_pipe_is_settled_before_it() -> None:
    graph = workflow(
        node(1, CHECKPOINT, ["file"]),
        settings(2, (1, 0)),
        passing(3, "ToBasicPipe", (2, 0), "MODEL", "BASIC_PIPE"),
        passing(4, "FromBasicPipe", (3, 0), "BASIC_PIPE", "MODEL"),
        node(5, "KSampler", [], model=(4, 0)),
    )
    assert not convert(graph).changed


@pytest.mark.parametrize("kind", ["ImpactSwitch", "Any Switch (rgthree)"])
def test_a_switch_in_a_prompt_is_no_loader(kind: str) -> None:
    prompt = {
        "1": {"class_type": CHECKPOINT, "inputs": {"ckpt_name": "file"}},
        "2": {"class_type": SETTINGS, "inputs": {"model": ["1", 0], "mode": "off"}},
        "3": {"class_type": kind, "inputs": {"input1": ["2", 0]}},
        "4": {"class_type": "KSampler", "inputs": {"model": ["3", 0]}},
    }
    assert not convert(prompt).changed


@pytest.mark.parametrize(
    ("kind", "type_"), [("Reroute", "*"), ("LoraLoaderModelOnly", "MODEL"), ("SomebodysPatch", "MODEL")]
)
def test_settings_behind_what_gives_a_model_on_are_seen(kind: str, type_: str) -> None:
    graph = workflow(
        node(1, CHECKPOINT, ["file"]),
        passing(2, kind, (1, 0), type_, type_),
        settings(3, (2, 0)),
        node(4, "KSampler", [], model=(3, 0)),
    )
    assert not convert(graph).changed


def test_settings_behind_a_lora_in_a_prompt_are_seen() -> None:
    prompt = {
        "1": {"class_type": CHECKPOINT, "inputs": {"ckpt_name": "file"}},
        "2": {"class_type": "LoraLoader", "inputs": {"model": ["1", 0], "clip": ["1", 1]}},
        "3": {"class_type": SETTINGS, "inputs": {"model": ["2", 0]}},
        "4": {"class_type": "KSampler", "inputs": {"model": ["3", 0]}},
    }
    assert not convert(prompt).changed
    prompt["5"] = {"class_type": "KSampler", "inputs": {"model": ["1", 0]}}
    found = convert(prompt).workflow
    assert found["5"]["inputs"]["model"] == ["6", 0], "only this sampler has no settings before it"
    assert found["2"]["inputs"]["model"] == ["1", 0]
    assert not convert(found).changed


@pytest.mark.parametrize("mode", [MUTED, BYPASSED])
def test_settings_that_do_not_run_do_not_count(mode: int) -> None:
    graph = workflow(node(1, CHECKPOINT, ["file"]), settings(2, (1, 0), mode), node(3, "KSampler", [], model=(2, 0)))
    found = convert(graph).workflow
    assert [one["type"] for one in found["nodes"]].count(SETTINGS) == 2
    check_links(found)
    assert not convert(found).changed


@pytest.mark.parametrize("kind", ["LoraLoaderModelOnly", "Reroute"])
def test_a_muted_node_gives_no_model_on_unless_its_loader_is_muted_too(kind: str) -> None:
    for mode, count in ((0, 2), (MUTED, 1)):
        lora = passing(2, kind, (1, 0), "MODEL", "MODEL", MUTED)
        found = convert(workflow(node(1, CHECKPOINT, ["file"], mode), lora, settings(3, (2, 0), mode))).workflow
        assert [one["type"] for one in found["nodes"]].count(SETTINGS) == count


def test_what_has_no_settings_gets_them_alone() -> None:
    graph = workflow(
        node(1, CHECKPOINT, ["file"]),
        settings(2, (1, 0)),
        node(3, "KSampler", [], model=(2, 0)),
        node(4, "KSampler", [], model=(1, 0)),
    )
    found = convert(graph).workflow
    assert (origin(found, 2), origin(found, 4)) == (CHECKPOINT, SETTINGS)
    check_links(found)
    assert not convert(found).changed


def test_a_selector_of_a_text_encoder_goes_with_its_link() -> None:
    graph = workflow(
        node(1, "DeviceSelectorMultiGPU", ["cpu"]),
        node(2, "CLIPLoaderMultiGPU", ["c", "flux", "cuda:0"], device=(1, 0)),
        node(3, "CLIPTextEncode", [], clip=(2, 0)),
    )
    found = convert(graph).workflow
    assert [one["type"] for one in found["nodes"]] == ["CLIPLoader", "CLIPTextEncode"]
    assert found["nodes"][0]["widgets_values"] == ["c", "flux", "cpu"]
    assert found["nodes"][0]["inputs"][0]["link"] is None
    check_links(found)


def encoder(number: int, device: str = "cuda:1") -> dict[str, Any]:
    return node(number, "CLIPLoaderMultiGPU", ["c", "flux", device])


def companions(graph: dict[str, Any]) -> list[tuple[list[str], list[str]]]:
    """The files of the MODEL and of the CLIP of each placement."""
    nodes = {one["id"]: one for one in graph["nodes"]}
    sources = {(link[3], link[4]): nodes[link[1]]["widgets_values"][:1] for link in graph["links"]}
    placed = [one["id"] for one in graph["nodes"] if one["type"] == "WeightStreamGPUPlacement"]
    return [(sources[number, 0], sources[number, 1]) for number in placed]


def test_each_text_encoder_goes_along_with_the_model_that_it_meets() -> None:
    graph = workflow(
        node(1, "UNETLoader", ["unused", "default"]),
        node(2, "UNETLoader", ["first", "default"]),
        node(3, "UNETLoader", ["second", "default"]),
        encoder(4),
        node(5, "CLIPTextEncode", [], clip=(4, 0)),
        node(6, "KSampler", [], model=(3, 0), positive=(5, 0)),
        node(7, "KSampler", [], model=(2, 0)),
    )
    found = convert(graph).workflow
    assert companions(found) == [(["second"], ["c"])]
    check_links(found)


def test_a_text_encoder_that_the_model_waits_for_makes_no_cycle() -> None:
    graph = workflow(
        encoder(1),
        node(2, "CLIPTextEncode", [], clip=(1, 0)),
        node(3, "CheckpointLoaderSimple", ["file"], ckpt_name=(2, 0)),
        node(4, "KSampler", [], model=(3, 0), positive=(2, 0)),
    )
    conversion = convert(graph)
    assert companions(conversion.workflow) == []
    assert "alone" in {note.code for note in conversion.notes}


def test_models_that_come_together_again_and_again_are_followed_once() -> None:
    prompt: dict[str, Any] = {"0": {"class_type": CHECKPOINT, "inputs": {"ckpt_name": "file"}}}
    for number in range(60):
        links = {"model1": [str(number), 0], "model2": [str(number), 0]}
        prompt[str(number + 1)] = {"class_type": "ModelMergeSimple", "inputs": links}
    prompt["settings"] = {"class_type": SETTINGS, "inputs": {"model": ["60", 0]}}
    prompt["sampler"] = {"class_type": "KSampler", "inputs": {"model": ["settings", 0]}}
    assert not convert(prompt).changed


@pytest.mark.parametrize(("type_", "loads"), [("COMBO", True), (["a", "b"], True), ("STRING", True), ("PIPE", False)])
def test_a_node_that_takes_no_plain_value_is_no_loader(type_: Any, loads: bool) -> None:
    graph = workflow(
        node(1, "PrimitiveNode", ["a"]),
        passing(2, "SomebodysLoader", (1, 0), "COMBO", "MODEL"),
        node(3, "KSampler", [], model=(2, 0)),
    )
    graph["nodes"][1]["inputs"][0]["type"] = type_
    assert convert(graph).changed == loads


def test_a_model_that_goes_through_very_many_nodes_is_followed_to_the_end() -> None:
    nodes = [node(1, CHECKPOINT, ["file"])]
    nodes += [passing(number, "LoraLoaderModelOnly", (number - 1, 0), "MODEL", "MODEL") for number in range(2, 3000)]
    graph = workflow(*nodes, settings(3000, (2999, 0)))
    assert not convert(graph).changed


@pytest.mark.parametrize("kind", ["WanHighAndLow", CHECKPOINT])
def test_each_model_that_a_loader_gives_gets_settings(kind: str) -> None:
    loader = {**node(1, kind, ["file"]), "outputs": [{"name": "MODEL", "type": "MODEL", "links": []} for _ in range(2)]}
    conversion = convert(workflow(loader, node(2, "KSampler", [], model=(1, 0)), node(3, "KSampler", [], model=(1, 1))))
    found = conversion.workflow
    assert (origin(found, 2), origin(found, 3)) == (SETTINGS, SETTINGS)
    assert [note.code for note in conversion.notes] == ["settings", "settings"]
    check_links(found)
    assert not convert(found).changed


@pytest.mark.parametrize("kind", ["WanHighAndLow", CHECKPOINT])
def test_each_model_that_a_loader_gives_in_a_prompt_gets_settings(kind: str) -> None:
    found = convert(
        {
            "1": {"class_type": kind, "inputs": {"file": "x"}},
            "2": {"class_type": "KSampler", "inputs": {"model": ["1", 0]}},
            "3": {"class_type": "KSampler", "inputs": {"model": ["1", 1]}},
        }
    ).workflow
    between = [found[number]["inputs"]["model"][0] for number in "23"]
    assert [found[number]["inputs"]["model"] for number in between] == [["1", 0], ["1", 1]]
    assert not convert(found).changed
