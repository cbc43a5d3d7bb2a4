"""The pack in ComfyUI's real page: nodes that are found, workflows that are saved, loaded and run."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comfy_page import WIDTH, ComfyPage, saved_latent
from playwright.sync_api import expect
from servers import TINY, free

from tools import demo
from tools.host import HeadlessHost

SEED = 70
FOUR_GPUS = Path(__file__).parent / "four_gpus.json"
EXAMPLES = sorted(file.stem for file in (Path(__file__).resolve().parents[2] / "example_workflows").glob("*.json"))
NODES = {
    "WeightStreamModelLoader": "Streamed Model Loader",
    "WeightStreamOffloadSettings": "Async Offload Settings",
    "WeightStreamGPUPlacement": "GPU Placement",
    "WeightStreamReport": "Streaming Report",
}
ADD_NODE = """id => {
    const node = LiteGraph.createNode(id)
    node.pos = [300, 300]
    app.graph.add(node)
    return node.title
}"""
ADD_IN_A_ROW = """ids => {
    let x = 0
    let before = null
    return ids.map(id => {
        const node = LiteGraph.createNode(id)
        node.pos = [x, 0]
        app.graph.add(node)
        // Wide enough for its title, which is cut on a node without widgets.
        node.setSize([Math.max(node.size[0], 220), node.size[1]])
        before?.connect(0, node, 0)
        before = node
        x += node.size[0] + 40
        return [node.pos[0], node.pos[0] + node.size[0]]
    })
}"""
DRAWN = "() => (app.graph.nodes[0].widgets ?? []).every(widget => widget.last_y !== undefined)"
WHERE_IS_WIDGET = """name => {
    const [node] = app.graph.nodes
    const widget = node.widgets.find(widget => widget.name === name)
    const [x, y] = app.canvas.ds.convertOffsetToCanvas([node.pos[0] + 60, node.pos[1] + widget.last_y + 10])
    const canvas = app.canvas.canvas.getBoundingClientRect()
    return [canvas.x + x, canvas.y + y]
}"""


@pytest.fixture(scope="module")
def expected(host: HeadlessHost) -> demo.Latent:
    """ComfyUI's own loader, asked by an API prompt; its first sampling in a process is not compared with."""
    demo.sample(host, demo.api_prompt(TINY, demo.THEIRS, SEED - 1))
    return demo.sample(host, demo.api_prompt(TINY, demo.THEIRS, SEED)).latent


def test_the_page_loads_without_an_error_of_the_pack(comfy: ComfyPage) -> None:
    assert comfy.our_errors == []
    known = comfy.host.get("/object_info")
    ours = {name: info["display_name"] for name, info in known.items() if info["category"].startswith("weightstream")}
    assert ours == NODES


@pytest.mark.parametrize("node_id", NODES)
def test_a_node_is_found_and_added(comfy: ComfyPage, node_id: str) -> None:
    found = comfy.search(NODES[node_id])
    found.filter(has_text=NODES[node_id]).first.click()
    comfy.page.wait_for_function("() => app.graph.nodes.length === 1")
    (node,) = comfy.workflow()["nodes"]
    assert node["type"] == node_id
    comfy.page.keyboard.press("Escape")
    expect(found).to_have_count(0)


@pytest.mark.parametrize("node_id", NODES)
def test_a_node_shows_its_inputs_and_their_tooltips(comfy: ComfyPage, node_id: str) -> None:
    info = comfy.host.get(f"/object_info/{node_id}")[node_id]
    inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    assert comfy.page.evaluate(ADD_NODE, node_id) == info["display_name"] == NODES[node_id]
    (node,) = comfy.workflow()["nodes"]
    assert {shown["name"] for shown in node["inputs"]} == set(inputs)
    comfy.page.wait_for_function(DRAWN)
    for name in [shown["name"] for shown in node["inputs"] if "widget" in shown]:
        if not (tooltip := inputs[name][1].get("tooltip")):
            continue
        x, y = comfy.page.evaluate(WHERE_IS_WIDGET, name)
        # Two places: it shows once the mouse rests after it has moved.
        comfy.page.mouse.move(x - 5, y)
        comfy.page.mouse.move(x, y)
        expect(comfy.page.locator(".node-tooltip")).to_have_text(tooltip)


def test_a_workflow_runs_as_built_as_saved_and_as_prompt(comfy: ComfyPage, expected: demo.Latent) -> None:
    comfy.load_prompt(demo.api_prompt(TINY, demo.OURS, SEED))
    workflow, prompt = comfy.workflow(), comfy.prompt()
    assert comfy.sample() == expected

    free(comfy.host)
    comfy.open()
    comfy.load_workflow(workflow)
    assert comfy.prompt() == prompt
    assert without_run(comfy.workflow()) == without_run(workflow)
    assert comfy.sample() == expected

    free(comfy.host)
    assert saved_latent(comfy.host, comfy.host.submit(prompt)) == expected
    assert comfy.our_errors == []


def without_run(workflow: dict[str, Any]) -> dict[str, Any]:
    """A saved workflow without what the page counts and measures itself."""
    return {key: value for key, value in workflow.items() if key not in ("id", "revision", "extra")}


def test_a_workflow_of_four_gpus_runs_on_two(comfy: ComfyPage, expected: demo.Latent) -> None:
    workflow = json.loads(FOUR_GPUS.read_text("utf-8"))
    comfy.load_workflow(workflow)
    (placement,) = [node for node in comfy.prompt().values() if node["class_type"] == "WeightStreamGPUPlacement"]
    assert placement["inputs"]["devices"] == "gpu:3,gpu:1,gpu:0,gpu:2"
    assert placement["inputs"]["clip_device"] == "gpu:7"
    assert placement["inputs"]["vae_device"] == "gpu:31"
    assert comfy.sample() == expected
    assert "gpu:3, gpu:2, gpu:7, gpu:31 are not there (this machine has gpu:0, gpu:1)" in comfy.host.log
    expect(comfy.page.get_by_role("dialog")).to_have_count(0)
    assert comfy.page.evaluate("() => app.lastNodeErrors") in (None, {})
    assert comfy.our_errors == []


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_workflow_opens(comfy: ComfyPage, name: str) -> None:
    workflow = comfy.page.evaluate(
        "async name => await (await fetch(`/api/workflow_templates/weightstream/${name}.json`)).json()", name
    )
    comfy.load_workflow(workflow)
    shown = comfy.workflow()["nodes"]
    assert sorted(node["type"] for node in shown) == sorted(node["type"] for node in workflow["nodes"])
    assert any(node["type"] in NODES for node in shown)
    known = {*comfy.host.get("/object_info"), "MarkdownNote", "Note"}
    assert {node["type"] for node in shown} <= known
    assert comfy.our_errors == []


def test_the_nodes_look_as_in_the_docs(comfy: ComfyPage, save_picture: Callable[..., None]) -> None:
    """All nodes of the pack in one picture, none on top of another."""
    boxes = comfy.page.evaluate(ADD_IN_A_ROW, list(NODES))
    for (_, right), (left, _) in itertools.pairwise(boxes):
        assert right < left
    panel = comfy.page.locator(".ws-embedded")
    expect(panel.locator(".ws-device")).to_have_count(2)
    give_up = time.monotonic() + 5
    while True:  # A node grows a moment later than what is in it.
        clip, inside = comfy.bring_into_view(*NODES), panel.bounding_box()
        assert inside is not None
        if inside["y"] + inside["height"] < clip["y"] + clip["height"] or time.monotonic() > give_up:
            break
        comfy.page.wait_for_timeout(50)
    save_picture(comfy.page, "nodes", clip=clip)
    assert clip["x"] + clip["width"] <= WIDTH
    assert clip["x"] < inside["x"] < inside["x"] + inside["width"] < clip["x"] + clip["width"]
    assert clip["y"] < inside["y"] < inside["y"] + inside["height"] < clip["y"] + clip["height"]
