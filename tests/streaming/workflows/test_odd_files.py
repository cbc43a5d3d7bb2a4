"""Files that are written otherwise than most: nothing of them is lost, and what cannot be read is refused in words."""

from __future__ import annotations

import json
from typing import Any

import pytest
from weightstream.streaming.errors import WorkflowError
from weightstream.streaming.workflows.convert import convert
from workflow_files import check_links, node, subgraph, workflow

OURS, SETTINGS = "WeightStreamModelLoader", "WeightStreamOffloadSettings"
FIRST, SECOND = "11111111-2222-3333-4444-555555555555", "66666666-2222-3333-4444-555555555555"
LIMITED = ["c", "cuda:0", 4.0, "cpu", "cuda:0,3gb;cpu,*", True]


def plain() -> dict[str, Any]:
    return workflow(node(1, "UNETLoader", ["f", "default"]), node(2, "KSampler", [], model=(1, 0)))


def instances(proxy: Any, values: list[Any]) -> dict[str, Any]:
    """One node for each of two subgraphs; only the first has a loader of the archived pack."""
    first = workflow(node(1, "UNETLoaderMultiGPU", ["f", "default", "cuda:0"]))
    second = workflow(node(1, "SomebodysNode", ["x"]))
    outer = [node(10, FIRST, values), node(11, SECOND, list(values))]
    for one in outer:
        one["properties"]["proxyWidgets"] = proxy
    graph = json.loads(json.dumps(workflow(*outer)))
    graph["definitions"] = {"subgraphs": [subgraph(FIRST, "a", first, []), subgraph(SECOND, "b", second, [])]}
    return graph


@pytest.mark.parametrize("as_text", [False, True])
def test_widgets_go_from_their_own_subgraph_s_node_alone_with_their_values(as_text: bool) -> None:
    shown = [["1", "unet_name"], ["1", "device"], None]
    found = convert(instances(json.dumps(shown) if as_text else shown, ["f", "cuda:0", 3])).workflow["nodes"]
    proxies = [one["properties"]["proxyWidgets"] for one in found]
    proxies = [json.loads(one) if as_text else one for one in proxies]
    assert proxies == [[["1", "unet_name"], None], shown]
    assert [one["widgets_values"] for one in found] == [["f", 3], ["f", "cuda:0", 3]]


@pytest.mark.parametrize("settled", [False, True])
def test_a_limit_that_is_not_written_is_left_to_the_user(settled: bool) -> None:
    nodes = [node(1, "CheckpointLoaderSimpleDisTorch2MultiGPU", LIMITED)]
    nodes += [node(2, SETTINGS, [], model=(1, 0))] if settled else []
    codes = [note.code for note in convert(workflow(*nodes)).notes]
    assert codes == ["host", "limit-left"]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("links",), None),
        (("nodes", 0, "outputs"), None),
        (("nodes", 0, "pos"), None),
        (("nodes", 1, "pos"), [None] * 2),
    ],
)
def test_null_for_what_is_not_there(place: tuple[Any, ...], value: Any) -> None:
    graph = workflow(node(1, "UNETLoaderMultiGPU", ["f", "default", "cuda:1"]), node(2, "KSampler", [], model=(1, 0)))
    inner: Any = graph
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    if "outputs" in place:
        graph["links"] = []
    assert convert(graph).workflow["nodes"][0]["type"] == OURS


def test_null_among_the_links_and_for_meta() -> None:
    graph = plain()
    graph["links"].append(None)
    assert convert(graph).changed
    assert convert({"1": {"class_type": "UNETLoader", "inputs": {"unet_name": "f"}, "_meta": None}}).changed


def test_numbers_that_are_too_large_are_refused_in_words() -> None:
    graph = plain()
    graph["nodes"][0]["mode"] = float("inf")
    with pytest.raises(WorkflowError, match="cannot be read"):
        convert(graph)


def test_device_selectors_in_a_circle_say_nothing() -> None:
    found = convert(
        {
            "1": {"class_type": "UNETLoaderMultiGPU", "inputs": {"unet_name": "f", "device": ["2", 0]}},
            "2": {"class_type": "DeviceSelectorMultiGPU", "inputs": {"device": ["2", 0]}},
        }
    )
    assert [note.code for note in found.notes] == ["loader", "linked"]


@pytest.mark.parametrize("write", [str, float])
@pytest.mark.parametrize("where", ["nodes", "links", "slots"])
def test_ids_that_are_written_as_text_or_with_a_point(write: Any, where: str) -> None:
    graph = workflow(
        node(1, "DeviceSelectorMultiGPU", ["cuda:1"]),
        node(7, "UNETLoaderMultiGPU", ["f", "default", "cuda:0"], device=(1, 0)),
        node(9, "KSampler", [], model=(7, 0)),
    )
    plain_one = convert(graph).workflow
    if where == "nodes":
        for one in graph["nodes"]:
            one["id"] = write(one["id"])
    elif where == "links":
        graph["links"] = [[*map(write, link[:2]), link[2], write(link[3]), *link[4:]] for link in graph["links"]]
    else:
        for slot in [slot for one in graph["nodes"] for slot in one["inputs"] if slot["link"]]:
            slot["link"] = write(slot["link"])
    graph["last_node_id"] = graph["last_link_id"] = 0
    found = convert(graph).workflow
    assert [one["type"] for one in found["nodes"]] == [one["type"] for one in plain_one["nodes"]]
    assert [int(one["id"]) for one in found["nodes"]] == [one["id"] for one in plain_one["nodes"]]
    ends = [[int(link[1]), link[2], int(link[3]), link[4]] for link in found["links"]]
    assert ends == [[link[1], link[2], link[3], link[4]] for link in plain_one["links"]]
    assert len({int(link[0]) for link in found["links"]}) == len(ends)


def test_null_among_the_nodes() -> None:
    graph = plain()
    graph["nodes"].insert(0, None)
    graph["definitions"] = {"subgraphs": [subgraph(FIRST, "a", {**plain(), "nodes": [None]}, [])]}
    assert [one["type"] for one in convert(graph).workflow["nodes"]] == [OURS, "KSampler"]
    prompt = {"1": None, "2": {"class_type": "UNETLoader", "inputs": {"unet_name": "f"}}}
    assert [one["class_type"] for one in convert(prompt).workflow.values()] == [OURS]


def test_ids_of_what_is_not_there_are_not_given_out() -> None:
    """Else what led nowhere would lead to the new node."""
    graph = workflow(node(1, "CheckpointLoaderSimple", ["c"]), node(2, "KSampler", [], model=(1, 0), positive=(3, 0)))
    graph["nodes"][0]["outputs"][1]["links"] = [3]
    graph["last_link_id"] = 2
    found = convert(graph).workflow
    assert [one["id"] for one in found["nodes"]] == [1, 2, 4]
    assert [link[0] for link in found["links"]] == [1, 2, 4]
    prompt = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "c"}},
        "2": {"class_type": "KSampler", "inputs": {"model": ["1", 0], "positive": ["3", 0]}},
    }
    assert list(convert(prompt).workflow) == ["1", "2", "4"]


@pytest.mark.parametrize("kind", ["UNETLoader", "UNETLoaderMultiGPU", "UNETLoaderDisTorch2MultiGPU"])
def test_a_link_to_an_input_that_goes_is_told(kind: str) -> None:
    values = ["f", "default", "cuda:0", 0, "cpu", "", True]
    links = {"unet_name": (1, 0), "trigger": (1, 0), "eject_models": (1, 0)}
    graph = workflow(node(1, "PrimitiveNode", ["f"]), node(2, kind, values, **links))
    conversion = convert(graph)
    assert [note.values["name"] for note in conversion.notes if note.code == "link-gone"] == ["trigger", "eject_models"]
    check_links(conversion.workflow)
    inputs = {"unet_name": ["1", 0], "trigger": ["1", 0], "eject_models": ["1", 0], "other": 5}
    notes = convert({"2": {"class_type": kind, "inputs": inputs}}).notes
    assert [note.values["name"] for note in notes if note.code == "link-gone"] == ["trigger", "eject_models"]


def test_a_link_that_is_told_of_already_is_told_of_once() -> None:
    links = {"device": (1, 0), "virtual_vram_gb": (1, 0), "donor_device": (1, 0)}
    values = ["c", "flux", "cuda:0", 0, "cpu", "", True]
    graph = workflow(node(1, "PrimitiveNode", ["f"]), node(2, "CLIPLoaderDisTorch2MultiGPU", values, **links))
    assert [note.code for note in convert(graph).notes] == ["host", "linked", "linked", "no-device"]


def test_a_link_from_a_node_that_is_not_there_is_cut() -> None:
    graph = workflow(node(2, "UNETLoaderMultiGPU", ["f", "default", "cuda:0"], device=(7, 0)))
    found = convert(graph)
    assert found.workflow["links"] == []
    assert [note.code for note in found.notes] == ["loader", "linked"]


@pytest.mark.parametrize("place", ["0", 0.0])
def test_the_place_of_an_output_that_is_written_otherwise(place: Any) -> None:
    graph = plain()
    graph["nodes"][0]["type"] = "CheckpointLoaderSimple"
    graph["links"][0][2] = place
    assert [one["type"] for one in convert(graph).workflow["nodes"]][-1] == SETTINGS


@pytest.mark.parametrize("number", [1, "1", 1.0])
def test_two_nodes_of_one_id_are_refused(number: Any) -> None:
    """A link names only one of them, and nobody can tell which."""
    graph = plain()
    graph["nodes"][1]["id"] = number
    with pytest.raises(WorkflowError, match="two nodes have the same id"):
        convert(graph)


def test_an_input_that_names_a_link_of_another_node_has_none() -> None:
    graph = workflow(
        node(1, "DeviceSelectorMultiGPU", ["cuda:1"]),
        node(2, "SomebodysNode", [], device=(1, 0)),
        node(3, "UNETLoaderMultiGPU", ["f", "default", "cuda:2"]),
        node(4, "KSampler", [], model=(3, 0)),
    )
    graph["nodes"][2]["inputs"] = [{"name": "device", "type": "COMBO", "link": 1}]
    found = convert(graph)
    assert found.workflow["links"][0] == graph["links"][0]
    assert found.workflow["nodes"][:2] == graph["nodes"][:2]
    assert [note.values for note in found.notes if note.code == "placement"] == [{"inputs": "devices=gpu:2"}]


def test_an_output_s_place_in_a_prompt_may_be_written_with_a_point() -> None:
    prompt = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "f"}},
        "2": {"class_type": "KSampler", "inputs": {"model": ["1", 0.0]}},
    }
    assert convert(prompt).workflow["2"]["inputs"]["model"] == ["3", 0]
