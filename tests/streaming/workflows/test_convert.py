"""What is put into workflows and prompts, and what stays as it was."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from weightstream.streaming.errors import WorkflowError
from weightstream.streaming.workflows.convert import Conversion, convert
from weightstream.streaming.workflows.notes import TEXTS, Note, Weight, as_lines
from workflow_files import check_links, node, overlapping, subgraph, workflow

OURS, SETTINGS, PLACEMENT = "WeightStreamModelLoader", "WeightStreamOffloadSettings", "WeightStreamGPUPlacement"
GUI = "11111111-2222-3333-4444-555555555555"


def plain() -> dict[str, Any]:
    """Load Diffusion Model, a LoRA and a sampler."""
    return workflow(
        node(1, "UNETLoader", ["flux.safetensors", "fp8_e4m3fn"]),
        node(2, "LoraLoaderModelOnly", ["lora.safetensors", 0.8], model=(1, 0)),
        node(3, "CLIPLoader", ["clip.safetensors", "flux", "default"]),
        node(4, "CLIPTextEncode", ["a river"], clip=(3, 0)),
        node(5, "KSampler", [7, "fixed"], model=(2, 0), positive=(4, 0)),
    )


def checkpoint(kind: str = "CheckpointLoaderSimple", values: tuple[Any, ...] = ("sd.safetensors",)) -> dict[str, Any]:
    return workflow(
        node(1, kind, list(values)),
        node(2, "CLIPTextEncode", ["a river"], clip=(1, 1)),
        node(3, "KSampler", [7, "fixed"], model=(1, 0), positive=(2, 0)),
        node(4, "VAEDecode", [], samples=(3, 0), vae=(1, 2)),
    )


def kinds(graph: dict[str, Any]) -> list[str]:
    return [one["type"] for one in graph["nodes"]]


def find(graph: dict[str, Any], kind: str) -> dict[str, Any]:
    [found] = [one for one in graph["nodes"] if one["type"] == kind]
    return found


def source_of(graph: dict[str, Any], number: int, name: str) -> tuple[str, int] | None:
    """The class and the output that an input is connected to."""
    by_number = {one["id"]: one for one in graph["nodes"]}
    [slot] = [slot for slot in by_number[number]["inputs"] if slot["name"] == name]
    for link in graph["links"]:
        values = list(link.values()) if isinstance(link, dict) else link
        if values[0] == slot["link"]:
            return by_number[values[1]]["type"], values[2]
    return None


def codes(conversion: Conversion) -> list[str]:
    return [note.code for note in conversion.notes]


def check_twice(conversion: Conversion) -> None:
    """Nothing is put in again."""
    again = convert(conversion.workflow)
    assert not again.changed
    assert again.workflow == conversion.workflow


def test_the_loader_takes_the_place_of_load_diffusion_model() -> None:
    before = plain()
    kept = copy.deepcopy(before)
    found = convert(before)
    assert before == kept, "what comes in is not changed"
    loader = find(found.workflow, OURS)
    assert loader["id"] == 1
    assert loader["widgets_values"] == ["flux.safetensors", "fp8_e4m3fn", 0.0]
    assert [one["name"] for one in loader["outputs"]] == ["MODEL", "CLIP", "VAE"]
    assert loader["properties"] == {"cnr_id": "weightstream", "Node name for S&R": OURS}
    assert found.workflow["links"] == before["links"]
    assert found.workflow["nodes"][1:] == before["nodes"][1:]
    assert codes(found) == ["loader"]
    check_links(found.workflow)
    check_twice(found)


@pytest.mark.parametrize("kind", ["CheckpointLoaderSimple", "UnetLoaderGGUF", "SomebodysLoader"])
def test_settings_follow_every_other_loader(kind: str) -> None:
    graph = workflow(
        node(1, kind, ["file"]),
        node(2, "LoraLoaderModelOnly", ["lora", 1.0], model=(1, 0)),
        node(3, "KSampler", [7, "fixed"], model=(1, 0)),
    )
    found = convert(graph)
    assert kinds(found.workflow) == [kind, "LoraLoaderModelOnly", "KSampler", SETTINGS]
    settings = find(found.workflow, SETTINGS)
    assert settings["widgets_values"] == ["auto", 0, 0, 0.0, "auto", 0.0, 0.0, "auto"]
    assert source_of(found.workflow, settings["id"], "model") == (kind, 0)
    assert source_of(found.workflow, 2, "model") == source_of(found.workflow, 3, "model") == (SETTINGS, 0)
    assert found.workflow["last_node_id"] == settings["id"] == 4
    check_links(found.workflow)
    check_twice(found)


def test_text_encoder_and_vae_of_a_checkpoint_stay_where_they_are() -> None:
    found = convert(checkpoint()).workflow
    assert source_of(found, 2, "clip") == ("CheckpointLoaderSimple", 1)
    assert source_of(found, 4, "vae") == ("CheckpointLoaderSimple", 2)
    assert source_of(found, 3, "model") == (SETTINGS, 0)


def test_settings_that_stand_behind_our_placement_count() -> None:
    graph = workflow(
        node(1, "CheckpointLoaderSimple", ["file"]),
        node(2, PLACEMENT, [], model=(1, 0)),
        node(3, SETTINGS, [], model=(2, 0)),
    )
    assert not convert(graph).changed


def test_a_loader_that_leads_nowhere_gets_no_settings() -> None:
    assert not convert(workflow(node(1, "CheckpointLoaderSimple", ["file"]))).changed


def test_a_muted_loader_is_followed_by_muted_settings() -> None:
    graph = checkpoint()
    graph["nodes"][0]["mode"] = 2
    assert find(convert(graph).workflow, SETTINGS)["mode"] == 2


def test_links_of_other_versions_stay_objects() -> None:
    graph = workflow(
        node(1, "CheckpointLoaderSimple", ["file"]), node(2, "KSampler", [], model=(1, 0)), as_objects=True
    )
    found = convert(graph).workflow
    assert all(isinstance(link, dict) for link in found["links"])
    check_links(found)


def test_new_nodes_lie_over_no_other() -> None:
    """The canvas around the loader is full."""
    nodes = [node(1, "CheckpointLoaderSimple", ["file"]), node(2, "KSampler", [], model=(1, 0))]
    nodes[0]["pos"] = [0, 0]
    nodes[1]["pos"] = {"0": 400, "1": 0}
    for number, (x, y) in enumerate([(0, 180), (0, 400), (-400, -200), (0, -400), (400, 300)], 3):
        nodes.append({**node(number, "Note", ["text"]), "pos": [x, y], "size": [330, 190]})
    found = convert(workflow(*nodes)).workflow
    found["nodes"][1]["pos"] = [400, 0]
    assert not overlapping(found)


def test_a_new_node_lies_next_to_its_loader_where_there_is_room() -> None:
    """Above, below, and in the columns beside it others lie."""
    loader = {**node(1, "CheckpointLoaderSimple", ["file"]), "pos": [0, 0], "size": [340, 100]}
    sampler = {**node(2, "KSampler", [], model=(1, 0)), "pos": [400, 0], "size": [340, 100]}
    column = [{**node(3 + row, "Note", []), "pos": [0, 150 * row - 1500], "size": [340, 100]} for row in range(20)]
    column = [one for one in column if one["pos"][1]]
    found = convert(workflow(loader, sampler, *column)).workflow
    assert find(found, SETTINGS)["pos"] == [-380, 0]
    graph = workflow({**node(40, "Note", []), "pos": [-500, -2000], "size": [200, 4000]})
    graph["nodes"] += found["nodes"][:-1]
    graph["links"] = [[1, 1, 0, 2, 0, "MODEL"]]
    found = convert(graph).workflow
    assert find(found, SETTINGS)["pos"] == [380, 170], "below the sampler"


def in_subgraph(*nodes: dict[str, Any], inputs: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """A workflow of one node that stands for a subgraph with ``nodes``."""
    inner = workflow(*nodes, first_link=50, as_objects=True)
    for slot in inputs or []:
        slot["linkIds"] = [
            link["id"] for link in inner["links"] if (link["origin_id"], link["origin_slot"]) == (-10, 0)
        ]
    outer = {**node(40, GUI, []), "outputs": [{"name": "MODEL", "type": "MODEL", "links": []}]}
    outer["properties"]["proxyWidgets"] = [["20", "unet_name"], ["20", "device"]]
    graph = workflow(outer, node(41, "KSampler", [], model=(40, 0)))
    graph["definitions"] = {"subgraphs": [subgraph(GUI, "Loading", inner, inputs or [])]}
    return graph


def test_subgraphs_are_converted_and_ids_are_new_in_the_whole_file() -> None:
    graph = in_subgraph(node(20, "CheckpointLoaderSimple", ["file"]), node(21, "KSampler", [], model=(20, 0)))
    found = convert(graph)
    [inner] = found.workflow["definitions"]["subgraphs"]
    settings = find(inner, SETTINGS)
    assert settings["id"] == 42, "41 is the last in the workflow around it"
    assert inner["state"]["lastNodeId"] == found.workflow["last_node_id"] == 42
    assert kinds(found.workflow) == [GUI, "KSampler"], "a subgraph that gives a MODEL is no loader"
    assert [note.graph for note in found.notes] == ["Loading"]
    check_links(inner)
    check_twice(found)


def test_an_input_of_a_subgraph_that_chose_a_device_is_told() -> None:
    nodes = (node(20, "UNETLoaderMultiGPU", ["flux.safetensors", "default", "cuda:1"], device=(-10, 0)),)
    nodes += (node(21, "KSampler", [], model=(20, 0)),)
    found = convert(in_subgraph(*nodes, inputs=[{"name": "device", "type": "COMBO"}]))
    [inner] = found.workflow["definitions"]["subgraphs"]
    assert codes(found) == ["loader", "linked", "input-gone"]
    assert inner["inputs"][0]["linkIds"] == []
    assert found.workflow["nodes"][0]["properties"]["proxyWidgets"] == [["20", "unet_name"]]
    check_links(inner)


def prompt(kind: str, inputs: dict[str, Any], number: str = "4") -> dict[str, Any]:
    return {
        number: {"class_type": kind, "inputs": inputs, "_meta": {"title": "Load"}},
        "9": {"class_type": "KSampler", "inputs": {"model": [number, 0], "seed": 7}},
    }


def test_a_prompt_keeps_what_is_connected_to_the_loader() -> None:
    found = convert(prompt("UNETLoader", {"unet_name": ["8", 0], "weight_dtype": "default"}))
    loader = found.workflow["4"]
    assert loader["class_type"] == OURS
    assert loader["inputs"] == {"unet_name": ["8", 0], "weight_dtype": "default"}
    assert loader["_meta"] == {"title": "Streamed Model Loader"}
    check_twice(found)


@pytest.mark.parametrize("kind", ["CheckpointLoaderSimple", "SomebodysLoader"])
def test_a_prompt_gets_settings_behind_what_gives_a_model(kind: str) -> None:
    """Also behind a class that nobody knows here: a sampler takes its output as a MODEL."""
    found = convert(prompt(kind, {"file": "x"}))
    assert found.workflow["10"]["class_type"] == SETTINGS
    assert found.workflow["10"]["inputs"]["model"] == ["4", 0]
    assert found.workflow["9"]["inputs"]["model"] == ["10", 0]
    check_twice(found)


def test_what_takes_a_model_is_no_loader_in_a_prompt() -> None:
    chain = prompt("UNETLoader", {"unet_name": "x", "weight_dtype": "default"})
    chain["5"] = {"class_type": "SomebodysPatch", "inputs": {"model": ["4", 0]}}
    chain["9"]["inputs"]["model"] = ["5", 0]
    assert [one["class_type"] for one in convert(chain).workflow.values()] == [OURS, "KSampler", "SomebodysPatch"]
    assert not convert(prompt("ModelSamplingFlux", {"shift": 1.0})).changed, "also where none is connected"


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"nodes": 3},
        {"4": {"inputs": {}}},
        {"nodes": [{"id": 1}], "links": []},
        {"nodes": [node(1, "UNETLoader", ["x"])], "links": [[1, 2]]},
        json.loads('{"a": {"class_type": "UNETLoader", "inputs": 5}}'),
    ],
)
def test_what_is_no_workflow_is_refused(value: Any) -> None:
    with pytest.raises(WorkflowError):
        convert(value)


def test_each_note_has_a_text_and_what_is_left_comes_last() -> None:
    filled = {
        "name": "device", "value": "xpu:0", "inputs": "devices=gpu:0", "gib": "4", "donor": "gpu:1", "devices": "gpu:0",
        "ratio": "1:1", "instead": "Select VAE Device", "others": 3, "number": "5",
    }  # fmt: skip
    notes = [Note(code, "4", "Loader", "Loading", filled) for code in TEXTS]
    lines = as_lines(notes).splitlines()
    assert len(lines) == len(TEXTS)
    weights = [line.split()[0] for line in lines]
    assert weights == sorted(weights, key=[weight.value for weight in Weight].index)
    assert lines[0] == "changed  Loading, node 4 (Loader): is a Streamed Model Loader now"
    assert json.loads(json.dumps(notes[0].as_dict()))["text"] == "is a Streamed Model Loader now"
