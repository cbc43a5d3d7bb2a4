"""What lies on the canvas along a link that goes: reroutes, and links with one end."""

from __future__ import annotations

from typing import Any

import pytest
from weightstream.streaming.workflows.convert import convert
from workflow_files import check_links, node, workflow

UNET = "UNETLoaderMultiGPU"


def graph(reroutes: list[dict[str, Any]], parents: dict[int, int], as_objects: bool, **more: Any) -> dict[str, Any]:
    """Two nodes that one leads to (links 1 and 2), with reroutes on the way; the first is a loader."""
    found = workflow(
        node(1, "PrimitiveNode", ["cuda:0"]),
        node(2, UNET, ["f", "default", "cuda:0"], device=(1, 0)),
        node(3, "SomebodysNode", [], device=(1, 0)),
        as_objects=as_objects,
    )
    if as_objects:
        for link in found["links"]:
            link.update({"parentId": parents[link["id"]]} if link["id"] in parents else {})
        return {**found, "version": 1, "reroutes": reroutes, **more}
    extensions = [{"id": link, "parentId": parent} for link, parent in parents.items()]
    return {**found, "extra": {"reroutes": reroutes, "linkExtensions": extensions}, **more}


def left(converted: dict[str, Any], as_objects: bool) -> dict[int, list[int]]:
    holder = converted if as_objects else converted["extra"]
    return {one["id"]: one["linkIds"] for one in holder["reroutes"]}


def reroute(number: int, *links: Any, **more: Any) -> dict[str, Any]:
    return {"id": number, "pos": [0, 0], "linkIds": list(links), **more}


@pytest.mark.parametrize("as_objects", [False, True])
@pytest.mark.parametrize(
    ("reroutes", "parents", "stay"),
    [
        ([reroute(1, 1)], {1: 1}, {}),
        ([reroute(1, "1"), reroute(2, 1, parentId=1)], {1: 2}, {}),
        ([reroute(1, 1, 2), reroute(2, 1, parentId=1), reroute(3, 2, parentId=1)], {1: 2, 2: 3}, {1: [2], 3: [2]}),
        ([reroute(1, 1), reroute(2, 1, 2, parentId=1)], {1: 2, 2: 2}, {1: [], 2: [2]}),
        ([reroute(1, 1), reroute(2, 1, parentId=1), reroute(3, parentId=2)], {1: 2}, {1: [], 2: [], 3: []}),
        ([reroute(1, 1, floating={"slotType": "input"})], {1: 1}, {1: []}),
        ([reroute(1, 2)], {2: 1}, {1: [2]}),
    ],
)
def test_reroutes_that_led_only_what_is_cut_go(
    reroutes: list[dict[str, Any]], parents: dict[int, int], stay: dict[int, list[int]], as_objects: bool
) -> None:
    found = convert(graph(reroutes, parents, as_objects)).workflow
    assert left(found, as_objects) == stay
    check_links(found)
    if not as_objects:
        assert {one["id"] for one in found["extra"]["linkExtensions"]} == set(parents) - {1}


def test_a_floating_link_keeps_the_reroute_that_leads_it() -> None:
    floating = [{"id": 1, "origin_id": -1, "origin_slot": -1, "target_id": 3, "target_slot": 0, "parentId": 1}]
    found = convert(graph([reroute(1, 1)], {1: 1}, True, floatingLinks=floating)).workflow
    assert left(found, True) == {1: []}


@pytest.mark.parametrize("extra", [None, [], {"linkExtensions": None, "reroutes": None}, {"linkExtensions": [None]}])
def test_a_file_that_knows_nothing_of_reroutes(extra: Any) -> None:
    assert convert({**graph([], {}, False), "extra": extra}).changed


def test_floating_links_follow_their_inputs() -> None:
    unet = node(1, UNET, ["f", "default", "cuda:0"])
    unet["inputs"] = [{"name": name, "type": "COMBO", "link": None} for name in ("device", "unet_name")]
    before = workflow(unet, node(2, "SomebodysNode", []))
    ends = [(1, 0), (1, 1), (2, 1)]
    before["floatingLinks"] = [
        {"id": number, "origin_id": -1, "origin_slot": -1, "target_id": target, "target_slot": place, "type": "COMBO"}
        for number, (target, place) in enumerate(ends)
    ]
    found = convert(before).workflow["floatingLinks"]
    assert [(one["id"], one["target_id"], one["target_slot"]) for one in found] == [(1, 1, 0), (2, 2, 1)]
