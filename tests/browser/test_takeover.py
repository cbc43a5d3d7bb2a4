""" "Stream this workflow's models" in ComfyUI's real page: what it does to the open workflow, and one step of undo."""

from __future__ import annotations

from typing import Any

import pytest
from comfy_page import ComfyPage
from panel_page import AXE, FAULTS
from playwright.sync_api import expect
from servers import TINY
from workflow_files import node, subgraph, workflow

from tools import demo
from tools.host import HeadlessHost

SEED = 60
COMMAND = "WeightStream.StreamModels"
LABEL = "WeightStream: stream this workflow's models"
OURS, SETTINGS, PLACEMENT = "WeightStreamModelLoader", "WeightStreamOffloadSettings", "WeightStreamGPUPlacement"
# Of the canvas, below all nodes.
EMPTY = (800, 800)
# In the page that ComfyUI brings, and in the newest.
TOAST = ".p-toast-message, [role=region] [role=alert], [role=region] [role=status], [role=region] li"
GUI = "11111111-2222-3333-4444-555555555555"
STEPS_OF_UNDO = "() => app.extensionManager.workflow.activeWorkflow.changeTracker.undoQueue.length"
SAME_KINDS = "kinds => app.graph.nodes.map(node => node.type).sort().join() === kinds.join()"
# Whatever the page does once it has drawn.
FRAMES = "async () => { for (let frame = 0; frame < 20; frame++) await new Promise(requestAnimationFrame) }"
KINDS = "() => app.graph.nodes.map(node => node.type)"
# As for a line that a run's end shows on a node while the server converts.
GROW_MEANWHILE = """type => {
    const { fetchApi } = app.api
    app.api.fetchApi = async (...values) => {
        app.api.fetchApi = fetchApi
        const node = app.graph.nodes.find(node => node.type === type)
        node.setSize([node.size[0], node.size[1] + 50])
        return await fetchApi.apply(app.api, values)
    }
}"""


@pytest.fixture(scope="module")
def expected(host: HeadlessHost) -> demo.Latent:
    """ComfyUI's own loader, asked by an API prompt; its first sampling in a process is not compared with."""
    demo.sample(host, demo.api_prompt(TINY, demo.THEIRS, SEED - 1))
    return demo.sample(host, demo.api_prompt(TINY, demo.THEIRS, SEED)).latent


@pytest.fixture
def page(comfy: ComfyPage) -> ComfyPage:
    """The page with a FLUX by ComfyUI's own loader in it."""
    comfy.page.evaluate("() => app.extensionManager.toast.removeAll?.()")
    comfy.load_prompt(demo.api_prompt(TINY, demo.THEIRS, SEED))
    return comfy


def stream(comfy: ComfyPage, says: str) -> None:
    """Give the command, and wait for what it says."""
    comfy.page.evaluate("id => app.extensionManager.command.execute(id)", COMMAND)
    check_said(comfy, says)


def check_said(comfy: ComfyPage, text: str) -> None:
    expect(comfy.page.locator(TOAST).get_by_text(text).last).to_be_visible()


def check_axe(comfy: ComfyPage) -> None:
    """Nothing in the messages keeps anybody from reading or closing them, in either theme."""
    assert comfy.page.locator(TOAST).count() > 0
    comfy.page.add_script_tag(path=str(AXE))
    try:
        for theme in ("light", "dark"):
            comfy.set("Comfy.ColorPalette", theme)
            assert comfy.page.evaluate(FAULTS, TOAST) == []
    finally:
        comfy.set("Comfy.ColorPalette", "dark")


def kinds(comfy: ComfyPage) -> list[str]:
    return sorted(comfy.page.evaluate(KINDS))


def test_the_open_workflow_streams_and_one_undo_takes_it_back(page: ComfyPage, expected: demo.Latent) -> None:
    before = kinds(page)
    stream(page, "1 model streams now")
    streamed = sorted(OURS if kind == demo.THEIRS else kind for kind in before)
    assert kinds(page) == streamed
    check_slots(page.workflow())
    steps = page.page.evaluate(STEPS_OF_UNDO)
    page.page.mouse.click(*EMPTY)
    page.page.evaluate(FRAMES)
    assert page.page.evaluate(STEPS_OF_UNDO) == steps, "what the page makes of it is no step of its own"

    page.page.keyboard.press("Control+z")
    page.page.wait_for_function(SAME_KINDS, arg=before)
    page.page.keyboard.press("Control+y")
    page.page.wait_for_function(SAME_KINDS, arg=streamed)
    assert page.sample() == expected
    page.page.evaluate(GROW_MEANWHILE, OURS)
    stream(page, "Nothing to change")
    assert page.our_errors == []


def check_slots(graph: dict[str, Any]) -> None:
    """Links that both of their ends know."""
    nodes = {one["id"]: one for one in graph["nodes"]}
    for number, source, output, target, place, _ in graph["links"]:
        assert number in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][place]["link"] == number


def test_a_loader_in_a_subgraph_streams_too(comfy: ComfyPage) -> None:
    inner = workflow(
        node(20, "UNETLoader", [demo.UNET, "default"]),
        node(21, "LoraLoaderModelOnly", [demo.LORA, 0.8], model=(20, 0)),
        first_link=50,
        as_objects=True,
    )
    graph = workflow(node(40, GUI, []))
    graph["definitions"] = {"subgraphs": [subgraph(GUI, "Loading", inner, [])]}
    comfy.load_workflow(graph)
    stream(comfy, "Load Diffusion Model (in Loading) is a Streamed Model Loader now")
    [definition] = comfy.workflow()["definitions"]["subgraphs"]
    assert sorted(one["type"] for one in definition["nodes"]) == ["LoraLoaderModelOnly", OURS]
    [link] = definition["links"]
    by_number = {one["id"]: one["type"] for one in definition["nodes"]}
    assert (by_number[link["origin_id"]], by_number[link["target_id"]]) == (OURS, "LoraLoaderModelOnly")
    assert comfy.our_errors == []


def archived() -> dict[str, Any]:
    """As the archived pack's own examples are, with files that are here. The page knows no such classes."""
    return workflow(
        node(1, "UNETLoaderDisTorch2MultiGPU", [demo.UNET, "default", "cuda:0", 14, "cuda:1", "", True]),
        node(2, "CLIPLoaderMultiGPU", [demo.CLIP, "stable_diffusion", "cuda:1"]),
        node(3, "CLIPTextEncode", ["a river of small lanterns at dusk"], clip=(2, 0)),
        node(4, "LoraLoaderModelOnly", [demo.LORA, 0.8], model=(1, 0)),
    )


def test_a_workflow_of_the_archived_pack_opens_and_streams(comfy: ComfyPage) -> None:
    comfy.load_workflow(archived())
    comfy.page.keyboard.press("Escape")
    stream(comfy, "virtual_vram_gb=14 is not needed")
    check_axe(comfy)
    assert kinds(comfy) == sorted(["CLIPLoader", "CLIPTextEncode", "LoraLoaderModelOnly", PLACEMENT, OURS])
    check_slots(comfy.workflow())
    prompt = comfy.prompt()
    [placement] = [one["inputs"] for one in prompt.values() if one["class_type"] == PLACEMENT]
    assert placement["devices"] == "gpu:0,gpu:1"
    assert placement["clip_device"] == "gpu:1"
    assert comfy.our_errors == []


def test_the_canvas_menu_and_the_loaders_menu_have_the_command(page: ComfyPage) -> None:
    page.page.mouse.click(*EMPTY, button="right")
    entry = page.page.get_by_text(LABEL, exact=True)
    expect(entry.first).to_be_visible()
    entry.first.click()
    check_said(page, "1 model streams now")
    check_axe(page)
    page.page.wait_for_function("kind => app.graph.nodes.some(node => node.type === kind)", arg=OURS)
    items = page.page.evaluate(
        "() => app.graph.nodes.map(node => [node.type, app.collectNodeMenuItems(node).map(item => item?.content)])"
    )
    assert not any(LABEL in contents for _, contents in items), "nothing is left to stream"


def test_the_command_has_its_name_in_the_page_s_language(page: ComfyPage) -> None:
    label = page.page.evaluate("id => app.extensionManager.command.commands.find(one => one.id === id).label", COMMAND)
    assert label == LABEL
