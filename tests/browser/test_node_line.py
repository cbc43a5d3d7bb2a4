"""The line on a node in ComfyUI's real page: what a step takes, with the plan folded away behind it."""

from __future__ import annotations

import copy
import importlib.resources
import re
from collections.abc import Iterator
from typing import Any

import pytest
from comfy_page import ComfyPage
from playwright.sync_api import expect
from servers import TINY

from tools import demo

SEED = 90
AXE = importlib.resources.files("axe_playwright_python") / "axe.min.js"
FAULTS = """async () => (await axe.run('.ws-line-holder', { resultTypes: ['violations'] })).violations
    .filter(({ impact }) => impact === 'serious' || impact === 'critical')
    .map(({ id, nodes }) => `${id}: ${nodes[0].html}`)"""
LINE = re.compile(r"^[\d.]+ s/step · .*gpu:0, gpu:1$")
PLACEMENT = "WeightStreamGPUPlacement"
HOST_TEXT = "$$node-text-preview"
WIDGETS = "type => app.graph.nodes.find(node => node.type === type).widgets.map(({ name }) => name)"


def placed_prompt() -> dict[str, Any]:
    """A model on both devices."""
    result = copy.deepcopy(demo.api_prompt(TINY, demo.OURS, SEED))
    inputs = {"model": ["model", 0], "devices": "gpu:0,gpu:1"}
    result["placement"] = {"class_type": PLACEMENT, "inputs": inputs}
    result["lora"]["inputs"]["model"] = ["placement", 0]
    return result


@pytest.fixture(params=[False, True], ids=["canvas", "dom"])
def rendering(request: pytest.FixtureRequest, comfy: ComfyPage) -> Iterator[None]:
    """The page draws nodes on a canvas, or ("Nodes 2.0") makes them of elements."""
    comfy.set("Comfy.VueNodes.Enabled", request.param)
    yield
    comfy.set("Comfy.VueNodes.Enabled", False)


@pytest.fixture(params=["dark", "light"])
def theme(request: pytest.FixtureRequest, comfy: ComfyPage) -> Iterator[None]:
    comfy.set("Comfy.ColorPalette", request.param)
    yield
    comfy.set("Comfy.ColorPalette", "dark")


@pytest.mark.usefixtures("rendering", "theme")
def test_the_node_says_in_a_line_how_its_model_runs(comfy: ComfyPage) -> None:
    comfy.load_prompt(placed_prompt())
    before = comfy.workflow()
    comfy.sample()
    fold = comfy.page.locator("details.ws-line")
    expect(fold).to_have_count(1)
    summary = fold.locator("summary")
    expect(summary).to_have_text(LINE)
    assert HOST_TEXT not in comfy.page.evaluate(WIDGETS, PLACEMENT), "it is not said twice"
    expect(fold.locator("p").first).not_to_be_visible()
    summary.focus()
    summary.press("Enter")
    expect(fold.locator("p").first).to_be_visible()
    expect(fold.locator("p")).to_have_text(
        [re.compile("^gpu:0: .* on the device"), re.compile("^gpu:1: .* on the device")]
    )
    comfy.page.add_script_tag(path=str(AXE))
    assert comfy.page.evaluate(FAULTS) == []
    summary.press("Enter")
    expect(fold.locator("p").first).not_to_be_visible()
    # What is shown is no value of the node: nothing of it is saved.
    values = [[node["type"], node.get("widgets_values")] for node in comfy.workflow()["nodes"]]
    assert values == [[node["type"], node.get("widgets_values")] for node in before["nodes"]]
    assert comfy.our_errors == []


def test_the_line_has_the_language_of_the_page(comfy: ComfyPage) -> None:
    comfy.set("Comfy.Locale", "zh")
    try:
        comfy.load_prompt(placed_prompt())
        comfy.sample()
        expect(comfy.page.locator("details.ws-line summary")).to_have_text(
            re.compile(r"^每步 [\d.]+ s · .*gpu:0, gpu:1$")
        )
    finally:
        comfy.set("Comfy.Locale", "en")
