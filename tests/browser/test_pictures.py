"""Pictures of steps, causes, badge, toasts and report in ComfyUI's real page, of models that stream for real."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from comfy_page import HEIGHT, WIDTH, ComfyPage
from panel_page import AXE, FAULTS, UNFOLD, placed_prompt
from playwright.sync_api import Locator, expect
from servers import TINY

from tools import demo
from tools.host import PromptInterrupted

STEPS = 6
TIMELINE = "Timeline of a step"
RUNS = "Steps of the last runs"
# How many pixels of a canvas have the colour of waits, of compute and of copies, as the style sheet has them.
COUNT_COLOURS = """canvas => {
    const style = getComputedStyle(canvas)
    const wanted = ['--ws-error', '--ws-resident', '--ws-staging'].map(name => {
        const number = parseInt(style.getPropertyValue(name).trim().slice(1), 16)
        return [number >> 16, (number >> 8) & 255, number & 255]
    })
    const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height)
    const counts = wanted.map(() => 0)
    for (let at = 0; at < data.length; at += 4)
        wanted.forEach((colour, place) => {
            counts[place] += colour.every((value, part) => Math.abs(value - data[at + part]) < 3) && data[at + 3] > 250
        })
    return counts
}"""
# A canvas is drawn anew once it is laid out.
FRAMES = "async () => { for (let frame = 0; frame < 5; frame++) await new Promise(requestAnimationFrame) }"
SET_SEED = """seed => {
    const sampler = app.graph.nodes.find(node => node.type === 'KSampler')
    sampler.widgets.find(widget => widget.name === 'seed').value = seed
}"""
# Of the page that ComfyUI brings, and of newer ones.
TOAST = ".p-toast-message, [data-toast-kind]"
TABS = "[role=tab], .workflow-tab, .p-togglebutton"
SET_DEVICES = """devices => {
    const placement = app.graph.nodes.find(node => node.type === 'WeightStreamGPUPlacement')
    placement.widgets.find(widget => widget.name === 'devices').value = devices
}"""
SELECTED = "() => Object.values(app.canvas.selected_nodes ?? {}).map(node => node.type)"
SEND_NOTICE = """notice => app.api.dispatchEvent(new CustomEvent('weightstream.notice', { detail: notice }))"""
NO_CLIPBOARD = "() => Object.defineProperty(navigator, 'clipboard', { value: undefined, configurable: true })"


@pytest.fixture
def ran(comfy: ComfyPage) -> ComfyPage:
    """A page whose model has run on both devices."""
    comfy.load_prompt(placed_prompt(steps=STEPS))
    comfy.sample()
    return comfy


def sample_again(page: ComfyPage, seed: int) -> None:
    """Another picture: the host makes none twice."""
    page.page.evaluate(SET_SEED, seed)
    page.sample()


@pytest.fixture(params=["dark", "light"])
def theme(request: pytest.FixtureRequest, comfy: ComfyPage) -> Iterator[str]:
    comfy.set("Comfy.ColorPalette", request.param)
    yield request.param
    comfy.set("Comfy.ColorPalette", "dark")


def card_of(panel: Locator) -> Locator:
    card = panel.locator(".ws-model").filter(has_text="gpu:1")
    expect(card).to_be_visible()
    return card


def unfold(card: Locator, title: str) -> Locator:
    """Open a part of the card with the keyboard, as it is reached there."""
    summary = card.locator("summary", has_text=title)
    summary.focus()
    summary.press("Enter")
    part = card.locator("details").filter(has=card.page.locator("summary", has_text=title)).first
    expect(part).to_have_attribute("open", "")
    return part


def devices_of(page: ComfyPage) -> list[dict[str, Any]]:
    """The lanes that the route tells of the model on both devices."""
    (model,) = {entry["id"] for entry in demo.read_status(page.host)["models"] if entry["device"] == "gpu:1"}
    return page.host.get(f"/weightstream/v1/timeline?model={model}")["devices"]


def test_a_step_that_ran_is_drawn_and_told(ran: ComfyPage, theme: str, save_picture: Callable[..., None]) -> None:
    ran.page.set_viewport_size({"width": WIDTH, "height": 2 * HEIGHT})
    try:
        card = card_of(ran.open_sidebar())
        part = unfold(card, TIMELINE)
        canvas = part.locator("canvas")
        expect(canvas).to_be_visible()
        devices = devices_of(ran)
        assert [device["device"] for device in devices] == ["gpu:0", "gpu:1"]
        expect(canvas).to_have_attribute("aria-label", re.compile(r"gpu:0: .* in all; .*gpu:1: .* in all; "))
        ran.page.evaluate(FRAMES)
        waits, compute, copies = canvas.evaluate(COUNT_COLOURS)
        assert compute > 100
        assert copies > 0
        assert (waits > 0) == any(device["waits"] for device in devices)
        unfold(part, "As text")
        expect(part.locator(".ws-lines").first.locator("li")).to_have_count(2)
        unfold(card, RUNS)
        expect(card.locator(".ws-plot")).to_have_count(3)
        save_picture(card, "pictures" + ("" if theme == "dark" else "-light"))
        ran.page.add_script_tag(path=str(AXE))
        card.evaluate(UNFOLD)
        assert ran.page.evaluate(FAULTS, ".ws-sidebar") == []
        assert ran.our_errors == []
    finally:
        ran.page.set_viewport_size({"width": WIDTH, "height": HEIGHT})


def test_zooming_draws_another_part(ran: ComfyPage) -> None:
    part = unfold(card_of(ran.open_sidebar()), TIMELINE)
    canvas = part.locator("canvas")
    expect(canvas).to_be_visible()
    ran.page.evaluate(FRAMES)
    whole = canvas.evaluate("canvas => canvas.toDataURL()")
    part.get_by_role("button", name="Zoom in").press("Enter")
    near = canvas.evaluate("canvas => canvas.toDataURL()")
    assert near != whole
    part.get_by_role("button", name="Later").press("Enter")
    assert canvas.evaluate("canvas => canvas.toDataURL()") != near
    for _ in range(2):
        part.get_by_role("button", name="Zoom out").press("Enter")
    assert canvas.evaluate("canvas => canvas.toDataURL()") == whole
    first, *_ = devices = devices_of(ran)
    whole_seconds = max(device["offset"] + device["seconds"] for device in devices)
    begin, end, block = first["compute"][0]
    box = canvas.bounding_box()
    assert box is not None
    at = (first["offset"] + (begin + end) / 2) / whole_seconds
    ran.page.mouse.move(box["x"] + box["width"] * at, box["y"] + 20)
    expect(part.locator(".ws-under")).to_contain_text(f"{first['blocks'][block]}: ")


def test_the_next_step_is_recorded_when_somebody_asks(comfy: ComfyPage) -> None:
    comfy.load_prompt(placed_prompt(steps=10_000))
    prompt_id = comfy.queue()
    try:
        sidebar = comfy.open_sidebar()
        expect(sidebar.locator(".ws-progress")).to_contain_text(
            re.compile(r"Step \d+ of 10000 · .* left"), timeout=60_000
        )
        part = unfold(card_of(sidebar), TIMELINE)
        shown = part.locator(".ws-picture > p.ws-muted").last
        expect(shown).to_contain_text(re.compile(r"Step \d+ of its run"))
        before = shown.inner_text()
        part.get_by_role("button", name="Record the next step").press("Enter")
        expect(shown).not_to_have_text(before, timeout=60_000)
        expect(shown).to_contain_text(re.compile(r"Step \d+ of its run"))
    finally:
        comfy.host.interrupt()
    with pytest.raises(PromptInterrupted):
        comfy.host.wait(prompt_id, timeout_s=60)
    expect(sidebar.locator(".ws-progress")).to_be_hidden()


def test_the_timeline_is_saved_as_a_trace(ran: ComfyPage, tmp_path: Path) -> None:
    part = unfold(card_of(ran.open_sidebar()), TIMELINE)
    with ran.page.expect_download() as saved:
        part.get_by_role("button", name="Download for Perfetto").click()
    saved.value.save_as(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text("utf-8"))["traceEvents"]
    lanes = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert saved.value.suggested_filename == "weightstream-step.json"
    assert lanes == {"compute", "waits", "unpacking", "copies"}
    assert any(event["ph"] == "X" and event["dur"] > 0 for event in events)


def test_runs_stand_side_by_side(ran: ComfyPage) -> None:
    for seed in range(3):
        sample_again(ran, seed)
    part = unfold(card_of(ran.open_sidebar()), RUNS)
    rows = part.locator("tbody tr")
    expect(rows).to_have_count(3)
    expect(rows.first).to_contain_text("latest")
    expect(rows.first.locator("td").first).to_have_text(str(STEPS))
    expect(part.locator(".ws-plot-line")).to_have_count(9)
    latest = rows.first.locator("th").inner_text()
    sample_again(ran, 9)
    expect(rows.first.locator("th")).not_to_have_text(latest)
    expect(rows.nth(1).locator("th")).to_have_text(latest.replace(" (latest)", ""))


def test_the_card_says_why(ran: ComfyPage) -> None:
    card = card_of(ran.open_sidebar())
    expect(card.locator(".ws-cause").first).to_be_visible()
    assert ran.host.get("/weightstream/v1/status")["causes"]
    expect(card.locator(".ws-todo").first).not_to_be_empty()


def test_a_node_is_called_by_its_title_and_shown(ran: ComfyPage) -> None:
    title = "My own placement"
    ran.page.evaluate(
        "title => { app.graph.nodes.find(node => node.type === 'WeightStreamGPUPlacement').title = title }", title
    )
    ran.sample()
    card = card_of(ran.open_sidebar())
    node = card.get_by_role("button", name=f"Go to the node {title}")
    expect(node).to_have_text(title)
    ran.page.evaluate("() => { app.canvas.deselectAll?.(); app.canvas.ds.offset = [9000, 9000] }")
    node.press("Enter")
    assert ran.page.evaluate(SELECTED) == ["WeightStreamGPUPlacement"]
    assert ran.page.evaluate("() => app.canvas.ds.offset[0]") < 8000


def test_the_badge_is_off_until_somebody_wants_it(ran: ComfyPage, theme: str) -> None:
    badge = ran.page.locator(".ws-top-badge")
    expect(badge).to_have_count(0)
    ran.set("WeightStream.TopBarBadge", True)
    try:
        expect(badge).to_have_text(re.compile(r"VRAM [\d.]+ / 16.0 MiB · [<>]?\d+ % waiting"))
        ran.page.add_script_tag(path=str(AXE))
        assert ran.page.evaluate(FAULTS, ".ws-top-badge") == []
        badge.press("Enter")
        expect(ran.page.locator(".ws-sidebar .ws-panel")).to_be_visible()
    finally:
        ran.set("WeightStream.TopBarBadge", False)
    expect(badge).to_have_count(0)


def test_a_fallback_is_said_by_a_toast(comfy: ComfyPage) -> None:
    prompt: dict[str, Any] = placed_prompt(steps=1)
    prompt["placement"]["inputs"]["devices"] = "gpu:0,gpu:9"
    comfy.load_prompt(prompt)
    prompt_id = comfy.queue()
    toast = comfy.page.locator(TOAST, has_text="Placed differently")
    expect(toast.first).to_contain_text("gpu:9", timeout=60_000)
    toast.first.locator("button").first.click()
    expect(toast).to_have_count(0)
    comfy.host.wait(prompt_id, timeout_s=120)
    notice = {"node_id": None, "name": "Flux", "kind": "inactive", "text": "left as it is"}
    comfy.set("WeightStream.Toasts", False)
    try:
        comfy.page.evaluate(SEND_NOTICE, notice)
        expect(comfy.page.locator(TOAST, has_text="left as it is")).to_have_count(0)
    finally:
        comfy.set("WeightStream.Toasts", True)
    comfy.page.evaluate(SEND_NOTICE, notice)
    shown = comfy.page.locator(TOAST, has_text="left as it is")
    expect(shown).to_have_count(1)
    shown.locator("button").first.click()


def test_a_notice_goes_with_its_cause_and_what_is_refused_is_one(comfy: ComfyPage) -> None:
    prompt: dict[str, Any] = placed_prompt(steps=1)
    prompt["placement"]["inputs"]["devices"] = "gpu:0,gpu:9"
    comfy.load_prompt(prompt)
    placed = comfy.page.evaluate("() => app.extensionManager.workflow.activeWorkflow.filename")
    notices = comfy.open_sidebar().locator(".ws-notices li")
    comfy.sample()
    expect(notices).to_contain_text(["Placed differently: GPU Placement gpu:9 is not there"])
    expect(notices.get_by_role("button")).to_have_count(1)
    comfy.load_prompt(demo.api_prompt(TINY, demo.OURS, 1))
    expect(notices).to_have_count(0)
    comfy.page.locator(TABS).filter(has_text=placed).first.click()
    expect(notices).to_have_count(1)
    comfy.page.evaluate(SET_DEVICES, "cuda:x")
    expect(notices).to_have_count(0)
    comfy.press_run()
    expect(notices).to_contain_text(["Not run: GPU Placement devices='cuda:x': 'cuda:x' is no GPU"])
    comfy.page.evaluate(SET_DEVICES, "gpu:0")
    expect(notices).to_have_count(0)
    comfy.page.keyboard.press("Escape")


def test_a_report_is_copied_or_shown(ran: ComfyPage) -> None:
    ran.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    panel = ran.open_sidebar()
    expect(panel).to_contain_text(demo.UNET)  # The page has heard of the run.
    panel.get_by_role("button", name="Copy report for an issue").click()
    expect(panel).to_contain_text("The report is in the clipboard.")
    text = ran.page.evaluate("async () => await navigator.clipboard.readText()")
    assert text.startswith("### WeightStream report\nWeightStream ")
    assert demo.UNET in text
    ran.page.evaluate(NO_CLIPBOARD)
    panel.get_by_role("button", name="Copy report for an issue").click()
    expect(panel.get_by_label("Report", exact=True)).to_have_value(re.compile("^### WeightStream report"))
