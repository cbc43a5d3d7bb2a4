"""example_workflows/ against a real host: node types, links, slots, widget values; and what it serves of the pack."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tools.examples import EXAMPLES, as_text
from tools.host import HeadlessHost
from tools.workflow import Node, widget_values

FOLDER = Path(__file__).resolve().parents[2] / "example_workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
# Nodes of the page that the host does not know.
PAGE_ONLY = {"MarkdownNote"}
# Combos of files: what is there differs between machines.
FILES = {"unet_name", "clip_name", "clip_name1", "clip_name2", "vae_name", "lora_name"}
CONTROLS = {"fixed", "increment", "decrement", "randomize"}


@pytest.fixture(scope="module")
def info(two_gpus: HeadlessHost) -> dict[str, Any]:
    return two_gpus.get("/object_info")


def read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text("utf-8"))


def host_nodes(workflow: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [node for node in workflow["nodes"] if node["type"] not in PAGE_ONLY]


def specs(info: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    return {**info["input"].get("required", {}), **info["input"].get("optional", {})}


def test_the_files_are_what_the_schemas_make(info: dict[str, Any]) -> None:
    assert sorted(example.name for example in EXAMPLES) == NAMES
    for example in EXAMPLES:
        assert (FOLDER / f"{example.name}.json").read_text("utf-8") == as_text(example, info), "run tools/examples.py"


@pytest.mark.parametrize("name", NAMES)
def test_links_fit_slots_and_types(name: str, info: dict[str, Any]) -> None:
    workflow = read(name)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"])
    assert max(nodes) == workflow["last_node_id"]
    links = {link[0]: link for link in workflow["links"]}
    assert len(links) == len(workflow["links"]) == workflow["last_link_id"]

    for link_id, source, output, target, place, kind in links.values():
        origin, end = nodes[source], nodes[target]
        assert info[origin["type"]]["output"][output] == kind
        assert specs(info[end["type"]])[end["inputs"][place]["name"]][0] in (kind, "*")
        assert link_id in origin["outputs"][output]["links"]
        assert end["inputs"][place]["link"] == link_id
    for node in host_nodes(workflow):
        wanted = info[node["type"]]
        assert [item["type"] for item in node["outputs"]] == list(wanted["output"])
        assert all(link in links for item in node["outputs"] for link in item["links"])
        linked = {item["name"] for item in node["inputs"] if item["link"] is not None}
        sockets = {item["name"] for item in node["inputs"]}
        assert all(item["link"] is None or item["link"] in links for item in node["inputs"])
        assert {key for key in wanted["input"].get("required", {}) if key in sockets} <= linked, node["type"]


@pytest.mark.parametrize("name", NAMES)
def test_widgets_have_values_that_the_host_takes(name: str, info: dict[str, Any]) -> None:
    for node in host_nodes(read(name)):
        sockets = {item["name"] for item in node["inputs"]}
        left = list(node["widgets_values"])
        for item, (kind, *rest) in specs(info[node["type"]]).items():
            options = rest[0] if rest else {}
            # A widget that is hidden is there for older workflows, which have a value for it.
            if item not in sockets and (left or not options.get("hidden")):
                check_value(node["type"], item, kind, options, left)
        assert left == [], f"{node['type']} has values for no widget"


def check_value(node: str, item: str, kind: Any, options: Mapping[str, Any], left: list[Any]) -> None:
    """Take the value of one widget from the beginning of ``left``."""
    value = left.pop(0)
    where = f"{node}.{item} = {value!r}"
    if item in FILES:
        assert value.endswith(".safetensors"), where
    elif kind == "COMFY_DYNAMICCOMBO_V3":
        [chosen] = [option for option in options["options"] if option["key"] == value]
        # What belongs to the choice comes next. Values that a workflow of an older host has not are the page's own.
        for inner, (inner_kind, *rest) in specs({"input": chosen["inputs"]}).items():
            if left:
                check_value(f"{node}.{item}", inner, inner_kind, rest[0] if rest else {}, left)
    elif isinstance(kind, list) or kind == "COMBO":
        assert value in (kind if isinstance(kind, list) else options["options"]), where
    elif kind in ("INT", "FLOAT"):
        assert isinstance(value, int if kind == "INT" else (int, float)), where
        assert options.get("min", value) <= value <= options.get("max", value), where
        if options.get("control_after_generate"):
            assert left.pop(0) in CONTROLS, where
    else:
        assert isinstance(value, {"STRING": str, "BOOLEAN": bool}[kind]), where


@pytest.mark.parametrize("name", NAMES)
def test_the_note_says_where_every_file_goes(name: str) -> None:
    workflow = read(name)
    [note] = [node["widgets_values"][0] for node in workflow["nodes"] if node["type"] in PAGE_ONLY]
    for node in host_nodes(workflow):
        models = {model["name"]: model for model in node["properties"].get("models", ())}
        named = {value for value in node["widgets_values"] if str(value).endswith(".safetensors")}
        assert models.keys() == named
        for model in models.values():
            assert f"`models/{model['directory']}`: [{model['name']}]({model['url']})" in note


def test_a_value_for_no_widget_is_refused(info: dict[str, Any]) -> None:
    with pytest.raises(KeyError, match="KSampler has no widget stepps"):
        widget_values(Node("KSampler", 0, {"stepps": 4}), info["KSampler"])


def test_the_host_lists_them_with_pictures(two_gpus: HeadlessHost) -> None:
    assert sorted(two_gpus.get("/workflow_templates")["weightstream"]) == NAMES
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for name in NAMES:
        # The page asks for a picture of this name and type, and for no other.
        with opener.open(f"{two_gpus.url}/api/workflow_templates/weightstream/{name}.jpg", timeout=30) as answer:
            assert answer.read(3) == b"\xff\xd8\xff", name


def test_the_host_serves_the_texts_of_all_languages(two_gpus: HeadlessHost) -> None:
    served = two_gpus.get("/i18n")
    for language in ("en", "zh"):
        assert "WeightStreamModelLoader" in served[language]["nodeDefs"]
        assert served[language]["nodeCategories"]["weightstream"]
