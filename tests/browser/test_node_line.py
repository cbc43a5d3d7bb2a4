"""The line on a node in ComfyUI's real page: what a step takes, with the plan folded away behind it."""

from __future__ import annotations

import copy
import importlib.resources
import re
from collections.abc import Iterator
from typing import Any

import pytest
from comfy_page import NO_HOST_TEXT, ComfyPage
from playwright.sync_api import expect
from servers import TINY
from workflow_files import node, subgraph, workflow

from tools import demo

SEED = 90
AXE = importlib.resources.files("axe_playwright_python") / "axe.min.js"
FAULTS = """async () => (await axe.run('.ws-line-holder', { resultTypes: ['violations'] })).violations
    .filter(({ impact }) => impact === 'serious' || impact === 'critical')
    .map(({ id, nodes }) => `${id}: ${nodes[0].html}`)"""
LINE = re.compile(r"^[\d.]+ s/step · .*gpu:0, gpu:1$")
PLACEMENT = "WeightStreamGPUPlacement"
REPORT = "WeightStreamReport"
# Where a node is drawn, and where the line on it is: left, top, right, bottom.
BOXES = """async type => {
    const frames = async count => { while (count--) await new Promise(requestAnimationFrame) }
    await frames(10)
    const node = app.graph.nodes.find(node => node.type === type)
    const canvas = app.canvas.canvas.getBoundingClientRect()
    const at = ([x, y]) => app.canvas.ds.convertOffsetToCanvas([x, y])
    const [left, top] = at(node.pos), [right, bottom] = at([node.pos[0] + node.size[0], node.pos[1] + node.size[1]])
    const drawn = document.querySelector(`[data-node-id="${node.id}"]`)?.getBoundingClientRect()
    const line = document.querySelector('.ws-line-holder').getBoundingClientRect()
    const outer = drawn ?? new DOMRect(canvas.x + left, canvas.y + top, right - left, bottom - top)
    return [outer, line].map(({ left, top, right, bottom }) => [left, top, right, bottom])
}"""
SEND_LINE = """line => app.api.dispatchEvent(new CustomEvent('weightstream.line', { detail: line }))"""
# As the server makes it, of a node 5, which is another's in the workflow of these tests.
STRAY = {
    "node": "5",
    "devices": ["gpu:0"],
    "seconds": 1.0,
    "waiting": None,
    "more_bytes": 0,
    "more_seconds": 0.0,
    "more_device": "",
    "kept_bytes": 1,
    "total_bytes": 2,
    "staged_bytes": 0,
    "synchronous": False,
    "text": "1 s/step",
    "details": [],
}
LOADER = "WeightStreamModelLoader"
GUI = "11111111-2222-3333-4444-777777777777"
# What a user does to a node, as a step of undo.
EDIT = """([ids, what]) => {
    const tracker = app.extensionManager.workflow.activeWorkflow.changeTracker
    const capture = () => (tracker.captureCanvasState ?? tracker.checkState).call(tracker)
    capture()
    let graph = app.rootGraph, node
    for (const id of ids.split(':')) {
        node = graph.nodes.find(node => String(node.id) === id)
        graph = node.subgraph
    }
    if (what === 'move') node.pos = [node.pos[0] + 40, node.pos[1]]
    else node.graph.remove(node)
    capture()
}"""
# Undo and redo load the workflow anew, and lines follow within some frames.
STEP = """async command => {
    const before = app.graph.nodes[0]
    await app.extensionManager.command.execute(`Comfy.${command}`)
    while (!app.graph.nodes.length || app.graph.nodes[0] === before) await new Promise(requestAnimationFrame)
}"""
BADGES_ARE = """texts => {
    const badges = app.rootGraph.nodes.find(node => node.subgraph).badges.map(badge => badge.call ? badge() : badge)
    return badges.map(({ text }) => text).filter(text => text.includes(' s/step')).join() === texts.join()
}"""
TABS = "[role=tab], .workflow-tab, .p-togglebutton"
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
    comfy.page.wait_for_function(NO_HOST_TEXT, arg=PLACEMENT)  # It is not said twice.
    expect(fold.locator("p").first).not_to_be_visible()
    comfy.bring_into_view(PLACEMENT)
    (left, top, right, bottom), line = comfy.page.evaluate(BOXES, PLACEMENT)
    assert left <= line[0] < line[2] <= right + 1
    assert top < line[1] < line[3] <= bottom + 1
    assert line[3] - line[1] < 80, "it is a line"
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


@pytest.mark.usefixtures("rendering")
def test_a_line_stays_with_its_workflow(comfy: ComfyPage) -> None:
    comfy.load_prompt(placed_prompt())
    placed = comfy.page.evaluate("() => app.extensionManager.workflow.activeWorkflow.filename")
    comfy.sample()
    fold = comfy.page.locator("details.ws-line")
    expect(fold.locator("summary")).to_have_text(LINE)
    before = comfy.page.evaluate(WIDGETS, "EmptySD3LatentImage")
    comfy.page.evaluate(SEND_LINE, STRAY)
    assert comfy.page.evaluate(WIDGETS, "EmptySD3LatentImage") == before, "a node of ComfyUI's has the id by chance"
    # Of the same nodes but one, with the same ids.
    comfy.load_prompt(demo.api_prompt(TINY, demo.OURS, SEED))
    expect(fold).to_have_count(0)
    comfy.page.locator(TABS).filter(has_text=placed).first.click()
    expect(fold.locator("summary")).to_have_text(LINE)
    comfy.page.wait_for_function(NO_HOST_TEXT, arg=PLACEMENT)
    assert comfy.our_errors == []


@pytest.mark.usefixtures("rendering")
def test_lines_return_after_undo_and_redo(comfy: ComfyPage) -> None:
    inner = workflow(node(20, LOADER, [demo.UNET]), node(21, LOADER, [demo.UNET]), first_link=50, as_objects=True)
    inner["nodes"][0]["title"] = "FLUX"
    graph = workflow(node(40, GUI, []), node(41, LOADER, [demo.UNET]))
    graph["definitions"] = {"subgraphs": [subgraph(GUI, "Loading", inner, [])]}
    comfy.load_workflow(graph)
    for there in ("40:20", "40:21", "41"):
        comfy.page.evaluate(SEND_LINE, {**STRAY, "node": there})
    shown = comfy.page.locator("details.ws-line:visible summary")
    said = "1 s/step · hardly any waiting for the bus"
    both = [f"FLUX: {said}", f"Streamed Model Loader: {said}"]
    comfy.page.evaluate(EDIT, ["41", "move"])
    for command in ("", "Undo", "Redo"):
        if command:
            comfy.page.evaluate(STEP, command)
        expect(shown).to_have_text([said])
        comfy.page.wait_for_function(BADGES_ARE, arg=both)
    comfy.page.evaluate(EDIT, ["40:21", "remove"])
    comfy.page.wait_for_function(BADGES_ARE, arg=[said])
    comfy.page.evaluate(STEP, "Undo")
    comfy.page.wait_for_function(BADGES_ARE, arg=both)
    expect(shown).to_have_text([said])
    # It is the line of the node that is there now.
    comfy.page.evaluate(SEND_LINE, {**STRAY, "node": "41", "seconds": 2.0})
    expect(shown).to_have_text([said.replace("1", "2")])
    assert comfy.our_errors == []


@pytest.mark.usefixtures("rendering")
def test_streaming_report_says_on_its_node_why_it_is_slow(comfy: ComfyPage) -> None:
    prompt = copy.deepcopy(demo.api_prompt(TINY, demo.OURS, SEED))
    prompt["report"] = {"class_type": REPORT, "inputs": {"model": ["lora", 0], "trigger": ["sampler", 0]}}
    try:
        comfy.load_prompt_in("zh", prompt)
        comfy.sample()
        report = comfy.page.locator(".ws-report-holder .ws-panel")
        expect(report.locator(".ws-headline")).to_have_text(re.compile(r"^每步 [\d.]+ s · 等待"))
        expect(report.locator(".ws-cause")).to_have_count(1)
        expect(report.locator(".ws-todo")).not_to_be_empty()
        comfy.page.wait_for_function(NO_HOST_TEXT, arg=REPORT)  # There is no Markdown beside it.
        comfy.page.add_script_tag(path=str(AXE))
        assert comfy.page.evaluate(FAULTS.replace(".ws-line-holder", ".ws-report-holder")) == []
        assert comfy.our_errors == []
    finally:
        comfy.set("Comfy.Locale", "en")


def test_the_line_has_the_language_of_the_page(comfy: ComfyPage) -> None:
    try:
        comfy.load_prompt_in("zh", placed_prompt())
        comfy.sample()
        expect(comfy.page.locator("details.ws-line summary")).to_have_text(
            re.compile(r"^每步 [\d.]+ s · .*gpu:0, gpu:1$")
        )
    finally:
        comfy.set("Comfy.Locale", "en")
