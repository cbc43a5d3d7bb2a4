"""What holds of every conversion, shown by workflows that are put together at random."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from random_workflows import as_prompt, by_sources, random_workflow
from weightstream.streaming.workflows.convert import Conversion, convert
from weightstream.streaming.workflows.kinds import CLIP, LOADER, MODEL, PLACEMENT, SETTINGS, VAE
from workflow_files import check_links

SEEDS = [range(start, start + 60) for start in range(0, 240, 60)]


def by_id(graph: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return {one["id"]: one for one in graph["nodes"]}


def fields(link: Any) -> list[Any]:
    return list(link.values()) if isinstance(link, dict) else link


def check_new(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Only our nodes are new, their ids and those of their links were nowhere, and the counters know them."""
    new = by_id(after).keys() - by_id(before).keys()
    assert {by_id(after)[number]["type"] for number in new} <= {SETTINGS.name, PLACEMENT.name}
    assert not new or (min(new) > max(by_id(before)) and max(new) == after["last_node_id"])
    old_links, links = ({fields(link)[0] for link in graph["links"]} for graph in (before, after))
    assert not links - old_links or min(links - old_links) > max(old_links, default=0)


def check_untouched(before: dict[str, Any], after: dict[str, Any]) -> None:
    """A node that gives no part of a model stays as it was, and so does what ours were not put behind."""
    there = by_id(after)
    for number, one in by_id(before).items():
        types = {slot["type"] for slot in one["outputs"]}
        if not types & {MODEL, CLIP, VAE, "COMBO", "CONTROL_NET"}:
            assert there[number] == one
        elif number in there and one["inputs"] and one["type"] != PLACEMENT.name and "MultiGPU" not in one["type"]:
            assert there[number] == one, "it takes what it gives"
        elif number not in there:
            assert one["type"] == "DeviceSelectorMultiGPU"


def check_links_stay(before: dict[str, Any], after: dict[str, Any]) -> None:
    """A link ends where it did, and begins where it did or at a node of ours; what is gone led to one that went."""
    ours = {number for number, one in by_id(after).items() if one["type"] in (SETTINGS.name, PLACEMENT.name)}
    now = {fields(link)[0]: fields(link) for link in after["links"]}
    for number, source, output, target, place, type_ in map(fields, before["links"]):
        if number not in now:
            assert by_id(before)[target]["inputs"][place]["name"] in ("device", "more")
            continue
        _, source_now, output_now, target_now, place_now, type_now = now[number]
        name = by_id(before)[target]["inputs"][place]["name"]
        assert (target_now, by_id(after)[target]["inputs"][place_now]["name"], type_now) == (target, name, type_)
        assert (source_now, output_now) == (source, output) or source_now in ours


def check_streams(after: dict[str, Any]) -> None:
    """No loader that runs gives a MODEL past our settings, but to what does not run."""
    sources = {fields(link)[0]: fields(link) for link in after["links"]}
    for one in after["nodes"]:
        for slot in one["inputs"]:
            if slot["type"] != MODEL or slot["link"] is None or one["type"] != "KSampler":
                continue
            kind = by_id(after)[sources[slot["link"]][1]]["type"]
            assert kind not in ("UNETLoader", "UnetLoaderGGUF", "CheckpointLoaderSimple"), one["id"]


def check_again(found: Conversion) -> None:
    again = convert(found.workflow)
    assert not again.changed
    assert again.workflow == found.workflow


@pytest.mark.parametrize("seeds", SEEDS, ids=str)
@pytest.mark.parametrize("only_in_page", [False, True])
def test_what_holds_of_every_workflow(seeds: range, only_in_page: bool) -> None:
    for seed in seeds:
        before = random_workflow(seed, only_in_page)
        check_links(before)
        kept = copy.deepcopy(before)
        found = convert(before)
        assert before == kept
        assert found.changed or found.workflow == before
        check_links(found.workflow)
        check_new(before, found.workflow)
        check_untouched(before, found.workflow)
        check_links_stay(before, found.workflow)
        check_streams(found.workflow)
        check_again(found)


@pytest.mark.parametrize("seeds", SEEDS, ids=str)
def test_a_prompt_becomes_what_its_workflow_becomes(seeds: range) -> None:
    for seed in seeds:
        page = random_workflow(seed, only_in_page=False)
        in_page, in_prompt = convert(page), convert(as_prompt(page))
        assert by_sources(in_prompt.workflow) == by_sources(as_prompt(in_page.workflow)), seed
        said = [[(note.code, note.node, note.values) for note in found.notes] for found in (in_page, in_prompt)]
        assert said[0] == said[1], seed
        check_again(in_prompt)


def test_there_is_something_to_convert() -> None:
    """Of these workflows most are changed, and all that is put in is among it."""
    found = [convert(random_workflow(seed, only_in_page=seed % 2 == 0)) for seed in range(240)]
    codes = {note.code for one in found for note in one.notes}
    assert sum(one.changed for one in found) > 120
    assert codes >= {"loader", "host", "settings", "settings-clip", "placement", "placement-used", "placement-stays"}
    assert codes >= {"selector-gone", "linked", "link-gone", "limit", "limit-left", "alone", "ratio", "donor"}
    assert LOADER.name in {one["type"] for conversion in found for one in conversion.workflow["nodes"]}
