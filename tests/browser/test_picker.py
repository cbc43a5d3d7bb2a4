"""The picker on GPU Placement in ComfyUI's real page: by mouse and keyboard, with the text as all that is saved."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from comfy_page import ComfyPage, eventually
from panel_page import AXE, FAULTS, placed_prompt
from playwright.sync_api import Locator, Route, expect

PLACEMENT = "WeightStreamGPUPlacement"
PICKER = ".ws-pick-holder"
INPUT = "devices"
DEVICES = (
    """type => app.graph.nodes.find(node => node.type === type).widgets.find(({ name }) => name === 'devices').value"""
)
SIZE = "async type => [...app.graph.nodes.find(node => node.type === type).size]"
# As a user does on the canvas, where the page asks in a box of its own.
TYPE = """([type, text]) => {
    const node = app.graph.nodes.find(node => node.type === type)
    const widget = node.widgets.find(({ name }) => name === 'devices')
    widget.value = text
    widget.callback?.(text, app.canvas, node, app.canvas.graph_mouse)
}"""
FRAMES = "async () => { for (let frame = 0; frame < 10; frame++) await new Promise(requestAnimationFrame) }"


@pytest.fixture(params=[False, True], ids=["canvas", "dom"])
def dom(request: pytest.FixtureRequest, comfy: ComfyPage) -> Iterator[bool]:
    """Whether nodes are made of elements ("Nodes 2.0"), or drawn on a canvas."""
    comfy.set("Comfy.VueNodes.Enabled", request.param)
    yield request.param
    comfy.set("Comfy.VueNodes.Enabled", False)


def show(comfy: ComfyPage, devices: str) -> Locator:
    """The picker of a node whose text is this."""
    prompt = copy.deepcopy(placed_prompt())
    prompt["placement"]["inputs"]["devices"] = devices
    comfy.load_prompt(prompt)
    comfy.bring_into_view(PLACEMENT)
    return comfy.page.locator(PICKER)


def around(comfy: ComfyPage, *shown: Locator) -> dict[str, float]:
    """The place of the node, and of these."""
    place = comfy.bring_into_view(PLACEMENT)
    boxes = [box for each in shown if (box := each.bounding_box()) is not None]
    right = max(place["x"] + place["width"], *(box["x"] + box["width"] + 14 for box in boxes))
    bottom = max(box["y"] + box["height"] + 14 for box in boxes)
    return {**place, "width": right - place["x"], "height": bottom - place["y"]}


def text_of(comfy: ComfyPage) -> str:
    return comfy.page.evaluate(DEVICES, PLACEMENT)


def placed(comfy: ComfyPage) -> tuple[Any, Any]:
    """What a workflow saves of the node, and what a prompt carries."""
    (node,) = [node for node in comfy.workflow()["nodes"] if node["type"] == PLACEMENT]
    (queued,) = [node for node in comfy.prompt().values() if node["class_type"] == PLACEMENT]
    return node["widgets_values"], {name for name in queued["inputs"] if "gpus" in name or "pick" in name}


def test_gpus_are_chosen_in_order_by_mouse_and_keyboard(
    comfy: ComfyPage, dom: bool, save_picture: Callable[..., None]
) -> None:
    picker = show(comfy, "")
    opener, menu = picker.get_by_role("button", name="Choose GPUs"), picker.get_by_role("dialog")
    expect(opener).to_have_text("Choose GPUsdefault")
    opener.click()
    expect(menu).to_be_visible()
    rows = menu.locator(".ws-pick-gpu")
    expect(rows).to_have_count(2)
    expect(rows.first).to_contain_text("/ 16.0 MiB")
    rows.nth(1).click()
    rows.nth(0).click()
    assert text_of(comfy) == "gpu:1,gpu:0"
    expect(rows).to_have_text([re.compile("^2gpu:0virtual device"), re.compile("^1gpu:1virtual device")])
    comfy.page.add_script_tag(path=str(AXE))
    for theme in ("light", "dark"):
        comfy.set("Comfy.ColorPalette", theme)
        assert comfy.page.evaluate(FAULTS, PICKER) == []
    if not dom:
        save_picture(comfy.page, "picker", clip=around(comfy, picker, menu))
    opener.click()
    expect(menu).not_to_be_visible()

    opener.focus()
    opener.press("Enter")
    expect(rows.first).to_be_focused()
    comfy.page.keyboard.press("Tab")
    comfy.page.keyboard.press("Space")
    assert text_of(comfy) == "gpu:0,gpu:1"
    expect(rows.first).to_be_focused()
    comfy.page.keyboard.press("ArrowDown")
    comfy.page.keyboard.press("Enter")
    assert text_of(comfy) == "gpu:0"
    comfy.page.keyboard.press("Delete")
    comfy.page.keyboard.press("Escape")
    expect(menu).not_to_be_visible()
    expect(opener).to_be_focused()
    assert placed(comfy) == (["gpu:0", "auto", "", "default", "default", "fallback", "exact"], set())
    assert comfy.our_errors == []


@pytest.mark.usefixtures("dom")
def test_a_choice_is_a_step_of_undo(comfy: ComfyPage) -> None:
    picker = show(comfy, "gpu:0")
    opener = picker.get_by_role("button", name="Choose GPUs")
    opener.click()
    picker.locator(".ws-pick-gpu").last.click()
    for key, text in (("z", "gpu:0"), ("y", "gpu:0, gpu:1")):
        comfy.page.evaluate(FRAMES)
        comfy.page.keyboard.press(f"Control+{key}")
        # What is shown is of the node that is there now.
        expect(opener).to_have_text(f"Choose GPUs{text}")
        expect(comfy.page.locator(".ws-embedded")).to_be_visible()
    assert comfy.our_errors == []


def test_the_picker_follows_what_is_typed_and_shows_what_is_not_here(comfy: ComfyPage, dom: bool) -> None:
    picker = show(comfy, "gpu:3,gpu:1")
    opener, rows = picker.get_by_role("button", name="Choose GPUs"), picker.locator(".ws-pick-gpu")
    expect(opener).to_have_text("Choose GPUsnot here: gpu:3")
    if dom:
        comfy.page.locator("[data-node-id]").get_by_role("textbox", name=INPUT).fill("cuda:1, 0")
    else:
        comfy.page.evaluate(TYPE, [PLACEMENT, "cuda:1, 0"])
    expect(opener).to_have_text("Choose GPUsgpu:1, gpu:0")
    comfy.page.evaluate(TYPE, [PLACEMENT, "gpu:3,gpu:1"])
    opener.click()
    missing = rows.filter(has_text="not on this server")
    expect(missing).to_have_text("1gpu:3not on this server")
    missing.click()
    expect(missing).to_have_count(0)
    assert text_of(comfy) == "gpu:1"
    assert comfy.our_errors == []


@pytest.mark.usefixtures("dom")
def test_it_is_one_line_high_and_the_saved_size_stays(comfy: ComfyPage) -> None:
    picker = show(comfy, "gpu:0")
    # Once the style sheet is there.
    eventually(
        comfy.page,
        lambda: (picker.bounding_box() or {}).get("height"),
        lambda height: height == pytest.approx(26, abs=1),
    )
    comfy.page.evaluate(FRAMES)
    saved, size = comfy.workflow(), comfy.page.evaluate(SIZE, PLACEMENT)
    comfy.load_workflow(saved)
    expect(comfy.page.locator(PICKER)).to_be_visible()
    comfy.page.evaluate(FRAMES)
    assert comfy.page.evaluate(SIZE, PLACEMENT) == size
    assert comfy.our_errors == []


def test_with_one_gpu_a_line_says_so(comfy: ComfyPage) -> None:
    def one(route: Route) -> None:
        status = route.fetch().json()
        # No event is newer.
        status |= {"devices": status["devices"][:1], "time": status["time"] + 3600}
        route.fulfill(body=json.dumps(status), content_type="application/json")

    comfy.page.route("**/weightstream/v1/status", one)
    try:
        picker = show(comfy, "gpu:0")
        expect(picker.locator(".ws-pick-line")).to_have_text(
            "The only GPU here: gpu:0, virtual device in RAM, 16.0 MiB"
        )
        expect(picker.get_by_role("button")).to_have_count(0)
        comfy.page.evaluate(TYPE, [PLACEMENT, "gpu:3,gpu:0"])
        expect(picker.get_by_role("button")).to_have_text("Choose GPUsnot here: gpu:3")
    finally:
        comfy.page.unroute("**/weightstream/v1/status")
