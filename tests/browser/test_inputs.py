"""The inputs of our nodes in ComfyUI's real page: presets, what 0 means, values as fine as a minimum, what is saved."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comfy_page import ComfyPage
from playwright.sync_api import expect

SETTINGS = "WeightStreamOffloadSettings"
# As a page saved it when the node had no preset, and a MODEL that it required.
BEFORE_PRESETS = Path(__file__).parent / "before_presets.json"
# With an id of its own: the page keeps values by id, also those of a graph that was cleared.
ADD = """type => {
    app.graph.state.lastNodeId = Math.floor(performance.now())
    const node = LiteGraph.createNode(type)
    node.pos = [300, 200]
    app.graph.add(node)
    return node.id
}"""
# As a user does: the value is set, and the widget told of it.
SET = """([id, name, value]) => {
    const node = app.graph.getNodeById(id)
    const widget = node.widgets.find(widget => widget.name === name)
    widget.value = value
    widget.callback?.(widget.value, app.canvas, node, app.canvas.graph_mouse)
}"""
VALUES = """id => Object.fromEntries(app.graph.getNodeById(id).widgets
    .filter(widget => widget.serialize !== false).map(({ name, value }) => [name, value]))"""
SHOWN = """([id, name]) => app.graph.getNodeById(id).widgets.find(widget => widget.name === name)._displayValue"""
FIRST = {
    "mode": "auto",
    "copy_streams": 0,
    "prefetch_depth": 0,
    "vram_limit_gb": 0,
    "pin_memory": "auto",
    "pinned_limit_gb": 0,
    "reserve_vram_gb": 0,
    "packing": "auto",
    "preset": "custom",
}


@pytest.fixture(params=[False, True], ids=["canvas", "dom"])
def node(request: pytest.FixtureRequest, comfy: ComfyPage) -> Iterator[Any]:
    """The node Async Offload Settings, drawn on a canvas or made of elements ("Nodes 2.0")."""
    comfy.set("Comfy.VueNodes.Enabled", request.param)
    yield comfy.page.evaluate(ADD, SETTINGS)
    comfy.set("Comfy.VueNodes.Enabled", False)


def test_a_preset_sets_the_others_and_one_by_hand_makes_it_custom(comfy: ComfyPage, node: Any) -> None:
    def values() -> dict[str, Any]:
        return comfy.page.evaluate(VALUES, node)

    assert values() == FIRST
    comfy.page.evaluate(SET, [node, "copy_streams", 3])
    comfy.page.evaluate(SET, [node, "preset", "debug"])
    assert values() == {**FIRST, "mode": "sync", "packing": "off", "preset": "debug"}
    shown = comfy.page.locator(f"[data-node-id='{node}']")
    if shown.count():  # What is made of elements follows.
        expect(shown).to_contain_text("sync")
        expect(shown).to_contain_text("debug")
    comfy.page.evaluate(SET, [node, "preset", "leave 2 GiB for others"])
    assert values() == {**FIRST, "reserve_vram_gb": 2, "preset": "leave 2 GiB for others"}
    comfy.page.evaluate(SET, [node, "vram_limit_gb", 6])
    assert values() == {**FIRST, "reserve_vram_gb": 2, "vram_limit_gb": 6, "preset": "custom"}
    assert comfy.our_errors == []


def test_0_is_shown_as_what_it_means(comfy: ComfyPage) -> None:
    node = comfy.page.evaluate(ADD, SETTINGS)
    shown = {name: comfy.page.evaluate(SHOWN, [node, name]) for name in FIRST}
    assert {name: text for name, text in shown.items() if text in ("auto", "no limit")} == {
        "mode": "auto",
        "copy_streams": "auto",
        "prefetch_depth": "auto",
        "vram_limit_gb": "auto",
        "pin_memory": "auto",
        "pinned_limit_gb": "no limit",
        "reserve_vram_gb": "auto",
        "packing": "auto",
    }
    comfy.page.evaluate(SET, [node, "vram_limit_gb", 0.784])
    assert comfy.page.evaluate(VALUES, node)["vram_limit_gb"] == pytest.approx(0.78)
    assert comfy.page.evaluate(SHOWN, [node, "vram_limit_gb"]) == "0.78"


def test_a_workflow_from_before_presets_opens_as_it_was(comfy: ComfyPage) -> None:
    """It has no value for the preset, and its MODEL was a required input then."""
    comfy.load_workflow(json.loads(BEFORE_PRESETS.read_text("utf-8")))
    (settings,) = [node for node in comfy.prompt().values() if node["class_type"] == SETTINGS]
    loader = next(key for key, node in comfy.prompt().items() if node["class_type"] == "UNETLoader")
    clip = next(key for key, node in comfy.prompt().items() if node["class_type"] == "CLIPLoader")
    assert settings["inputs"] == {
        **FIRST,
        "mode": "stream",
        "vram_limit_gb": 1.5,
        "pin_memory": "off",
        "reserve_vram_gb": 0.3,
        "packing": "on",
        "model": [loader, 0],
        "clip": [clip, 0],
    }
    assert comfy.our_errors == []
