"""A MODEL is followed where no link shows the way: by names of Set and Get nodes, into subgraphs and out of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from weightstream.streaming.workflows.convert import convert
from workflow_files import FRAME_IN, FRAME_OUT, check_links, node, passing, settings, subgraph, workflow

SETTINGS, PLACEMENT = "WeightStreamOffloadSettings", "WeightStreamGPUPlacement"
CHECKPOINT = "CheckpointLoaderSimple"
MUTED, BYPASSED = 2, 4
OUTER, INNER = "11111111-2222-3333-4444-555555555555", "66666666-2222-3333-4444-555555555555"
PAIRS = [("SetNode", "GetNode"), ("easy setNode", "easy getNode")]


def setter(number: int, source: tuple[int, int], name: str = "m", kind: str = "SetNode") -> dict[str, Any]:
    return {**passing(number, kind, source, "MODEL", "MODEL"), "widgets_values": [name]}


def getter(number: int, name: str = "m", kind: str = "GetNode", type_: str = "MODEL") -> dict[str, Any]:
    outputs = [{"name": type_, "type": type_, "links": []}]
    return {**node(number, kind, [name]), "outputs": outputs}


def kinds(graph: dict[str, Any]) -> list[str]:
    return [one["type"] for one in graph["nodes"]]


@pytest.mark.parametrize(("sets", "gets"), PAIRS)
def test_settings_behind_a_get_node_are_seen(sets: str, gets: str) -> None:
    graph = workflow(
        node(1, CHECKPOINT, ["file"]),
        setter(2, (1, 0), kind=sets),
        getter(3, kind=gets),
        settings(4, (3, 0)),
        node(5, "KSampler", [], model=(4, 0)),
    )
    assert not convert(graph).changed


@pytest.mark.parametrize("name", ["other", None])
def test_a_get_node_of_another_name_gives_something_else(name: Any) -> None:
    graph = workflow(
        node(1, CHECKPOINT, ["file"]),
        setter(2, (1, 0), name),
        getter(3, "m"),
        settings(4, (3, 0)),
    )
    found = convert(graph).workflow
    assert kinds(found).count(SETTINGS) == 2, "where it goes on to is not known"
    check_links(found)


def test_one_get_node_without_settings_is_enough_for_settings_before_the_set_node() -> None:
    graph = workflow(
        node(1, CHECKPOINT, ["file"]),
        setter(2, (1, 0)),
        getter(3),
        settings(4, (3, 0)),
        getter(5),
        node(6, "KSampler", [], model=(5, 0)),
    )
    found = convert(graph).workflow
    assert kinds(found).count(SETTINGS) == 2
    check_links(found)
    assert not convert(found).changed


def test_a_text_encoder_meets_its_model_by_the_names() -> None:
    graph = workflow(
        node(1, "UNETLoader", ["first", "default"]),
        node(2, "KSampler", [], model=(1, 0)),
        node(3, "UNETLoader", ["second", "default"]),
        setter(4, (3, 0)),
        getter(5),
        node(6, "CLIPLoaderMultiGPU", ["c", "flux", "cuda:1"]),
        {**passing(7, "SetNode", (6, 0), "CLIP", "CLIP"), "widgets_values": ["c"]},
        getter(8, "c", type_="CLIP"),
        node(9, "CLIPTextEncode", [], clip=(8, 0)),
        node(10, "KSampler", [], model=(5, 0), positive=(9, 0)),
    )
    found = convert(graph).workflow
    [placed] = [one for one in found["nodes"] if one["type"] == PLACEMENT]
    sources = {link[0]: link[1] for link in found["links"]}
    assert [sources[slot["link"]] for slot in placed["inputs"] if slot["link"]] == [3, 6]
    check_links(found)


def test_a_text_encoder_makes_no_circle_through_names() -> None:
    """The name of the checkpoint comes out of what the text encoder gives."""
    graph = workflow(
        node(1, "CLIPLoaderMultiGPU", ["c", "flux", "cuda:1"]),
        {**passing(2, "SetNode", (1, 0), "CLIP", "CLIP"), "widgets_values": ["c"]},
        getter(3, "c", type_="CLIP"),
        node(4, "CLIPTextEncode", [], clip=(3, 0)),
        node(5, CHECKPOINT, ["file"], ckpt_name=(4, 0)),
        node(6, "KSampler", [], model=(5, 0), positive=(4, 0)),
    )
    conversion = convert(graph)
    assert PLACEMENT not in kinds(conversion.workflow)
    assert "alone" in {note.code for note in conversion.notes}


def instance(number: int, source: tuple[int, int], definition: str = OUTER, mode: int = 0) -> dict[str, Any]:
    """A node for a subgraph that takes a MODEL and gives one."""
    return passing(number, definition, source, "MODEL", "MODEL", mode)


def definition(number: str, *nodes: dict[str, Any], first_link: int = 50) -> dict[str, Any]:
    """A subgraph whose first node takes the MODEL that comes in, and whose last one gives one out."""
    graph = workflow(*nodes, first_link=first_link, as_objects=True)
    found = subgraph(number, number[:3], graph, [{"name": "model", "type": "MODEL"}])
    last = first_link + 40
    ends = {"origin_id": nodes[-1]["id"], "origin_slot": 0, "target_id": FRAME_OUT, "target_slot": 0}
    graph["links"].append({"id": last, **ends, "type": "MODEL"})
    nodes[-1]["outputs"][0]["links"].append(last)
    incoming = [link["id"] for link in graph["links"] if link["origin_id"] == FRAME_IN]
    found["inputs"][0]["linkIds"] = incoming
    found["outputs"] = [{"name": "MODEL", "type": "MODEL", "linkIds": [last]}]
    return found


def around(*nodes: dict[str, Any], inner: list[dict[str, Any]]) -> dict[str, Any]:
    graph = workflow(*copy.deepcopy(nodes))
    graph["definitions"] = {"subgraphs": inner}
    return graph


def lora(number: int, source: tuple[int, int]) -> dict[str, Any]:
    return passing(number, "LoraLoaderModelOnly", source, "MODEL", "MODEL")


OUTSIDE = (node(1, CHECKPOINT, ["file"]), instance(2, (1, 0)), node(3, "KSampler", [], model=(2, 0)))


def test_settings_inside_a_subgraph_that_takes_the_model_are_seen() -> None:
    inner = definition(OUTER, lora(20, (FRAME_IN, 0)), settings(21, (20, 0)))
    assert not convert(around(*OUTSIDE, inner=[inner])).changed


def test_settings_inside_a_subgraph_of_a_subgraph_are_seen() -> None:
    middle = definition(OUTER, lora(20, (FRAME_IN, 0)), instance(21, (20, 0), INNER))
    innermost = definition(INNER, settings(30, (FRAME_IN, 0)), first_link=150)
    assert not convert(around(*OUTSIDE, inner=[middle, innermost])).changed


def test_settings_behind_a_subgraph_that_gives_the_model_on_are_seen() -> None:
    inner = definition(OUTER, lora(20, (FRAME_IN, 0)))
    graph = around(*OUTSIDE[:2], settings(3, (2, 0)), inner=[inner])
    assert not convert(graph).changed


@pytest.mark.parametrize("mode", [MUTED, BYPASSED])
def test_settings_inside_a_subgraph_that_does_not_run_do_not_count(mode: int) -> None:
    inner = definition(OUTER, settings(20, (FRAME_IN, 0)))
    graph = around(OUTSIDE[0], instance(2, (1, 0), mode=mode), OUTSIDE[2], inner=[inner])
    found = convert(graph).workflow
    assert SETTINGS in kinds(found)
    assert not convert(found).changed


def test_a_subgraph_of_which_one_way_has_no_settings() -> None:
    first = lora(20, (FRAME_IN, 0))
    inner = definition(OUTER, first, node(22, "KSampler", [], model=(20, 0)), settings(21, (20, 0)))
    found = convert(around(*OUTSIDE, inner=[inner])).workflow
    assert kinds(found).count(SETTINGS) == 1
    check_links(found)
    assert not convert(found).changed


def test_the_inputs_of_a_subgraph_are_known_by_their_names() -> None:
    inner = definition(OUTER, settings(20, (FRAME_IN, 1)))
    inner["inputs"].insert(0, {"name": "seed", "type": "INT", "linkIds": []})
    assert not convert(around(*OUTSIDE, inner=[inner])).changed


def loading(*outer: dict[str, Any]) -> dict[str, Any]:
    """A subgraph with the loader in it, whose MODEL the nodes outside take."""
    inner = definition(OUTER, node(20, CHECKPOINT, ["file"]))
    return around({**instance(1, (1, 0)), "inputs": []}, {**instance(2, (1, 0)), "inputs": []}, *outer, inner=[inner])


def test_settings_outside_of_the_subgraph_with_the_loader_are_seen() -> None:
    assert not convert(loading(settings(3, (1, 0)), settings(4, (2, 0)))).changed


def test_settings_behind_only_one_of_two_subgraph_nodes_are_not_enough() -> None:
    found = convert(loading(settings(3, (1, 0)), node(4, "KSampler", [], model=(2, 0)))).workflow
    [inner] = found["definitions"]["subgraphs"]
    assert kinds(inner) == [CHECKPOINT, SETTINGS]
    assert [link["target_id"] for link in inner["links"] if link["id"] in inner["outputs"][0]["linkIds"]] == [FRAME_OUT]
    assert not convert(found).changed


def test_subgraphs_that_hold_each_other_are_no_endless_way() -> None:
    """No page makes such a file."""
    one = definition(OUTER, instance(20, (FRAME_IN, 0), INNER))
    other = definition(INNER, instance(30, (FRAME_IN, 0), OUTER), first_link=150)
    found = convert(around(*OUTSIDE, inner=[one, other])).workflow
    assert SETTINGS in kinds(found)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_widget_that_is_gone_is_hidden_on_all_nodes_around(depth: int) -> None:
    deepest = workflow(node(30, "UNETLoaderMultiGPU", ["f", "default", "cuda:0"]))
    innermost = subgraph(INNER, "inner", deepest, [])
    middle = node(20, INNER, ["f", "cuda:0"])
    middle["properties"]["proxyWidgets"] = [["30", "unet_name"], ["30", "device"]]
    outer = node(1, OUTER, ["f", "cuda:0"])
    outer["properties"]["proxyWidgets"] = [["20", "unet_name"], ["20", "device"]]
    graph = workflow(outer if depth == 2 else {**middle, "id": 1})
    around_it = [subgraph(OUTER, "outer", workflow(copy.deepcopy(middle)), [])] if depth == 2 else []
    graph["definitions"] = {"subgraphs": [*around_it, innermost]}
    found = convert(graph).workflow
    graphs = [found, *found["definitions"]["subgraphs"]]
    nodes = [one for inner in graphs for one in inner["nodes"] if one["type"] in (OUTER, INNER)]
    assert [[name for _, name in one["properties"]["proxyWidgets"]] for one in nodes] == [["unet_name"]] * depth
    assert [one["widgets_values"] for one in nodes] == [["f"]] * depth
