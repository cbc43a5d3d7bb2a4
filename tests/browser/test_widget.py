"""The panel in ComfyUI's real page: live figures, the lease, every state that it has, and what axe says of it."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from comfy_page import HEIGHT, SIDEBAR_PANEL, WIDTH, ComfyPage, eventually
from panel_page import AXE, FAULTS, SEED, UNFOLD, placed_prompt
from playwright.sync_api import Locator, Route, expect
from servers import TINY

from tools import demo
from tools.host import HeadlessHost, PromptInterrupted

STATES = Path(__file__).resolve().parents[1] / "web" / "states.mjs"
STATES_URL = "/weightstream-tests/states.mjs"
DASH = "\N{EN DASH}"
FIGURES = ("resident", "staging", "torch", "cache", "other", "free", "peak")
# By the colour beside it, which is one of FIGURES.
READ_DEVICES = """panel => Object.fromEntries([...panel.querySelectorAll('.ws-device')].map(device => {
    const text = selector => device.querySelector(selector).textContent
    const figures = [...device.querySelectorAll('.ws-figure')].map(figure =>
        [figure.querySelector('.ws-swatch').className.split('ws-').at(-1), figure.querySelector('dd').textContent])
    const meter = device.querySelector('[role=meter]')
    const bar = ['now', 'max'].map(name => Number(meter.getAttribute(`aria-value${name}`)))
    return [text('.ws-device-name'), { bar, ...Object.fromEntries(figures) }]
}))"""
READ_LINES = """widget => [...widget.querySelectorAll('.ws-device')].map(line => [
    line.querySelector('.ws-device-name').textContent,
    ...['now', 'max'].map(name => Number(line.querySelector('[role=meter]').getAttribute(`aria-value${name}`))),
])"""
# In place of the live panel, so that it has the width, the colours and the fonts that the page gives it.
MOUNT_STATE = """async ([url, name]) => {
    const { STATES, fixedFeed } = await import(url)
    const { mountPanel } = await import('/extensions/weightstream/lib/panel.mjs')
    const holder = document.querySelector('.ws-sidebar')
    window.weightstreamShown?.destroy()
    for (const panel of holder.children) panel.style.display = 'none'
    window.weightstreamShown = mountPanel(holder, { feed: fixedFeed(STATES[name]) })
    window.weightstreamShown.element.dataset.test = name
}"""
UNMOUNT_STATE = """() => {
    window.weightstreamShown?.destroy()
    delete window.weightstreamShown
    for (const panel of document.querySelectorAll('.ws-sidebar > *')) panel.style.display = ''
}"""
HEAR_EVENTS = """() => {
    window.weightstreamHeard = []
    app.api.addEventListener('weightstream.status', () => window.weightstreamHeard.push(performance.now()))
}"""
# Of the tiny model on both devices, on the node.
MODEL_LINE = re.compile(r"^\S+: [\d.]+ s/step · [<>]?\d+ % waiting · (streams|all stays|copied)")
# Events come once a second.
SILENT = "() => performance.now() - window.weightstreamHeard.at(-1) > 3000"

# Those that docs/panel.md shows.
IN_DOCS = ("streaming", "beforeRun", "slow", "loading", "allResident", "split", "idleGpus", "fleet", "fallback", "gone")
# What each state must say.
TEXTS = {
    "starting": ["Connecting", "Waiting for the server's first answer."],
    "idle": ["Idle", "NVIDIA GeForce RTX 4090", "No streamed model is loaded."],
    "beforeRun": ["Before a run", "18.0 GiB stream in each step, 1.5 s on the bus", "No streamed model is loaded."],
    "beforeRuns": ["All 4.1 GiB fit into VRAM", "Too little VRAM: 3.3 GiB", "Download the file again"],
    "loading": ["Loading", "8.4 / 23.8 GiB, 1.6 GB/s", "page-locked copies are made now"],
    "allResident": [
        "All stays in VRAM",
        "The whole model is in VRAM; nothing has to be copied.",
        "all 57 blocks stay",
        "20 steps of 0.174 s; nothing had to be copied",
    ],
    "streaming": [
        "Streaming",
        "34.4 GB/s",
        "43 %",
        "Step 7 of 20 · 4 s left",
        "0.324 s/step · 43 % waiting · 34.6 GB/s",
        "11.2 GiB of weights have no room in 25.2 GiB of VRAM",
        "streams from page-locked RAM: 12.6 GiB of 23.8 GiB stay in VRAM",
        "Each step copies 11.2 GiB",
        "34.6 GB/s on average",
        "Free page-locked RAM (11.4 GiB)",
    ],
    "slow": [
        "3.450 s/step · 86 % waiting · 6.3 GB/s",
        "The card's link runs at PCIe 4.0 x4; the card can do PCIe 4.0 x8.",
        "up to 1.71 s of each step",
        "Close them (browsers, games, other ComfyUIs): 1.9 GiB of weights could stay in VRAM.",
    ],
    "packed": [
        "Each step copies 13.0 GiB (packed, 18.0 GiB of weights)",
        "5.8 GiB of 23.8 GiB stay in VRAM",
    ],
    "split": [
        "gpu:0",
        "gpu:1",
        "qwen_image_bf16.safetensors",
        "t5xxl_fp16.safetensors",
        "not loaded",
        "Free page-locked RAM (4.7 GiB)",
    ],
    "inactive": ["Not streaming: Flux", "ComfyUI was told to keep models in VRAM"],
    "fallback": ["Placed differently: GPU Placement", "gpu:3 is not there (this machine has gpu:0)"],
    "nearLimit": ["near the limit", "little room left", "at its limit", "1 copy arrived damaged", "3 copies came late"],
    "idleGpus": ["4 idle GPUs", "gpu:5"],
    "fleet": [
        "3 prompts wait · 1 ran again because a worker died",
        "running for 12 s",
        "41 prompts done · 3 changes of models · clip_l.safetensors, flux1-dev.safetensors, t5xxl_fp16.safetensors",
        "running for 1:05",
        "started again",
        "its process ended (signal 9)",
        "cannot be started",
        "2 free workers",
        "loft",
    ],
    "fleetStarts": ["1 prompt waits", "starting", "No GPU to run on: no worker is up."],
    "noGpu": ["Idle", "No device to stream to: there is no GPU. Models run ComfyUI's own way."],
    "unknown": [DASH, "AMD Radeon RX 7900 XTX", "copied when needed: its settings ask for it"],
    "eight": ["Streaming", *(f"gpu:{place}" for place in range(8))],
    "stale": ["No news", "The server has said nothing for 5 s."],
    "missing": ["Not available", "Restart ComfyUI."],
    "gone": ["No connection", "The server does not answer."],
    "newer": ["Reload this page", "newer than this page"],
}


@pytest.fixture(scope="module")
def expected(host: HeadlessHost) -> demo.Latent:
    """ComfyUI's own loader, without anybody looking; its first sampling in a process is not compared with."""
    demo.sample(host, demo.api_prompt(TINY, demo.THEIRS, SEED - 1))
    return demo.sample(host, demo.api_prompt(TINY, demo.THEIRS, SEED)).latent


def size(value: int | None) -> str:
    """As the panel writes it."""
    if value is None:
        return DASH
    for unit, bytes_of_one in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if value >= bytes_of_one * 0.9995:
            number = value / bytes_of_one
            places = 0 if number >= 99.95 else 1
            # Halves, which sizes in binary units often have, are rounded up there, and to even digits here.
            return f"{math.floor(number * 10**places + 0.5) / 10**places:.{places}f} {unit}"
    return f"{value} B"


def devices_of(host: HeadlessHost) -> dict[str, Any]:
    """What the route says, as the panel shows it."""
    return {
        device["device"]: {
            "bar": [device["total"] - device["free"], device["total"]],
            **{key: size(device[key]) for key in FIGURES},
        }
        for device in demo.read_status(host)["devices"]
    }


def unfold(panel: Locator) -> None:
    """Press what shows the figures of a device, where they are folded away."""
    expect(panel.locator(".ws-device").first).to_be_visible()
    folded = panel.locator(".ws-fold[aria-expanded=false]")
    folded.evaluate_all("(buttons) => buttons.forEach((button) => button.click())")  # At once: each update is another.


def expect_figures_of_the_route(panel: Locator, host: HeadlessHost, timeout_s: float = 10.0) -> dict[str, Any]:
    """Wait until the panel shows what the route says at the same moment, and return that."""
    unfold(panel)
    give_up = time.monotonic() + timeout_s
    while True:
        before, shown, after = devices_of(host), panel.evaluate(READ_DEVICES), devices_of(host)
        if shown in (before, after):
            return shown
        if time.monotonic() > give_up:
            assert shown == after
        # The next event comes within a second.
        panel.page.wait_for_timeout(100)


def expect_state(panel: Locator, *texts: str) -> None:
    """Wait for one of these states; a machine that is busy loads for a while before it samples."""
    expect(panel.locator(".ws-state-text")).to_have_text(re.compile("|".join(texts)), timeout=60_000)


def expect_lines_of_the_route(widget: Locator, host: HeadlessHost, timeout_s: float = 10.0) -> None:
    """Wait until the node has a line for each GPU with what the route says at the same moment."""
    give_up = time.monotonic() + timeout_s
    while True:
        before, shown, after = bars_of(host), widget.evaluate(READ_LINES), bars_of(host)
        if shown in (before, after):
            return
        if time.monotonic() > give_up:
            assert shown == after
        widget.page.wait_for_timeout(100)


def bars_of(host: HeadlessHost) -> list[Any]:
    return [[name, *device["bar"]] for name, device in devices_of(host).items()]


def show_whole(panel: Locator) -> None:
    """Put the node aside, and have it be as high as what its panel shows."""
    panel.evaluate("""async panel => {
        const node = app.graph.nodes.find(node => node.type === 'WeightStreamGPUPlacement')
        node.pos = [node.pos[0], node.pos[1] - 3000]
        app.canvas.ds.offset[1] += 3000
        node.setSize([320, node.size[1]])
        // What the node has beside the panel takes a share of what is added.
        for (let missing = 1; missing > 0; ) {
            app.canvas.setDirty(true, true)
            for (let frame = 0; frame < 3; frame++) await new Promise(requestAnimationFrame)
            missing = panel.scrollHeight - panel.clientHeight
            if (missing > 0) node.setSize([320, node.size[1] + missing])
        }
    }""")


# --- live ------------------------------------------------------------------------------------------------------------


def test_the_panel_shows_what_the_route_says(comfy: ComfyPage, expected: demo.Latent) -> None:
    sidebar = comfy.open_sidebar()
    expect_state(sidebar, "Idle")
    comfy.load_prompt(placed_prompt())
    widget = comfy.page.locator(".ws-embedded")
    assert comfy.sample() == expected, "the same with the sidebar open"
    shown = expect_figures_of_the_route(sidebar, comfy.host)
    assert shown.keys() == {"gpu:0", "gpu:1"}
    for device in shown.values():
        assert device["resident"] != "0 B"
        assert device["staging"] != "0 B"
    expect(sidebar).to_contain_text(f"Last run: {demo.STEPS} steps")
    expect_lines_of_the_route(widget, comfy.host)
    expect(widget.locator(".ws-brief")).to_have_text([MODEL_LINE])
    assert comfy.our_errors == []


def test_the_panel_follows_a_run(comfy: ComfyPage, save_picture: Callable[..., None]) -> None:
    sidebar = comfy.open_sidebar()
    comfy.load_prompt(placed_prompt(steps=10_000))
    prompt_id = comfy.queue()
    try:
        expect_state(sidebar, r"Streaming\b")
        widget = comfy.page.locator(".ws-embedded")
        comfy.page.set_viewport_size({"width": WIDTH, "height": 2 * HEIGHT})
        comfy.bring_into_view("WeightStreamGPUPlacement")
        show_whole(widget)
        clip, inside = comfy.bring_into_view("WeightStreamGPUPlacement"), widget.bounding_box()
        assert inside is not None
        # The plan stands below the panel too, as text of the host.
        clip["height"] = inside["y"] + inside["height"] + 14 - clip["y"]
        save_picture(comfy.page, "widget", clip=clip)
        expect_figures_of_the_route(sidebar, comfy.host)
        expect_lines_of_the_route(widget, comfy.host)
    finally:
        comfy.host.interrupt()
        comfy.page.set_viewport_size({"width": WIDTH, "height": HEIGHT})
    with pytest.raises(PromptInterrupted):
        comfy.host.wait(prompt_id, timeout_s=60)
    # The host says that the model runs for two more seconds.
    expect_state(sidebar, r"Idle\b")


def test_a_model_is_freed_from_the_panel(comfy: ComfyPage) -> None:
    sidebar = comfy.open_sidebar()
    comfy.load_prompt(placed_prompt())
    comfy.sample()
    assert any(device["resident"] for device in demo.read_status(comfy.host)["devices"])
    card = sidebar.locator(".ws-model").filter(has_text="gpu:1")
    card.get_by_role("button", name=f"Free {demo.UNET}", exact=True).click()
    expect(card).to_contain_text("Freed ")
    assert {device["resident"] + device["staging"] for device in demo.read_status(comfy.host)["devices"]} == {0}
    expect_figures_of_the_route(sidebar, comfy.host)


def test_the_node_shows_it_in_dom_rendering_too(comfy: ComfyPage, expected: demo.Latent) -> None:
    """The page draws nodes on a canvas, or ("Nodes 2.0") makes them of elements."""
    comfy.set("Comfy.VueNodes.Enabled", True)
    try:
        comfy.load_prompt(placed_prompt())
        widget = comfy.page.locator("[data-node-id] .ws-embedded")
        expect(widget).to_be_visible()
        assert comfy.sample() == expected
        expect_lines_of_the_route(widget, comfy.host)
        assert comfy.our_errors == []
    finally:
        comfy.set("Comfy.VueNodes.Enabled", False)


def test_the_node_keeps_to_a_few_lines_and_leads_to_the_panel(comfy: ComfyPage) -> None:
    prompt = placed_prompt()
    comfy.load_prompt(prompt)
    workflow = comfy.workflow()
    (node,) = [node for node in workflow["nodes"] if node["type"] == "WeightStreamGPUPlacement"]
    # As it was saved when the node showed the whole panel.
    node["size"] = [node["size"][0], node["size"][1] + 200]
    comfy.load_workflow(workflow)
    widget = comfy.page.locator(".ws-embedded")
    expect(widget.locator(".ws-device")).to_have_count(2)
    comfy.sample()
    expect(widget.locator(".ws-brief")).to_have_text([MODEL_LINE])
    # Two GPUs, a model, and a button.
    eventually(comfy.page, widget.inner_text, lambda text: len(text.splitlines()) <= 8)
    sizes = {node["type"]: node["size"] for node in comfy.workflow()["nodes"]}
    assert sizes["WeightStreamGPUPlacement"][1] == pytest.approx(node["size"][1], abs=1), "no node jumps"
    for _ in range(2):
        widget.get_by_role("button", name="Open the panel").press("Enter")
        expect(comfy.page.locator(SIDEBAR_PANEL)).to_be_visible()


def test_the_widget_is_not_saved_and_can_be_switched_off(comfy: ComfyPage) -> None:
    comfy.load_prompt(placed_prompt())
    widget = comfy.page.locator(".ws-embedded")
    expect(widget).to_be_visible()
    (node,) = [node for node in comfy.workflow()["nodes"] if node["type"] == "WeightStreamGPUPlacement"]
    (queued,) = [node for node in comfy.prompt().values() if node["class_type"] == "WeightStreamGPUPlacement"]
    assert node["widgets_values"] == ["gpu:0,gpu:1", "auto", "", "default", "default", "fallback", "exact"]
    assert not [name for name in queued["inputs"] if "vram" in name]
    comfy.set("WeightStream.NodeWidget", False)
    expect(widget).to_have_count(0)
    comfy.set("WeightStream.NodeWidget", True)
    expect(widget).to_be_visible()


def test_the_server_stops_when_nobody_looks(comfy: ComfyPage) -> None:
    comfy.page.evaluate(HEAR_EVENTS)
    comfy.open_sidebar()
    comfy.page.wait_for_function("() => window.weightstreamHeard.length >= 2")
    renewals: list[str] = []
    comfy.close_sidebar()
    comfy.page.on("request", lambda request: "/weightstream/" in request.url and renewals.append(request.url))
    # The lease of before lasts up to ten seconds more.
    comfy.page.wait_for_function(SILENT, timeout=20_000)
    assert renewals == []
    heard = comfy.page.evaluate("() => window.weightstreamHeard.length")
    comfy.open_sidebar()
    comfy.page.wait_for_function("heard => window.weightstreamHeard.length > heard", arg=heard)


def test_a_server_without_the_routes_is_named(comfy: ComfyPage) -> None:
    comfy.page.route("**/weightstream/v1/**", lambda route: route.fulfill(status=404))
    try:
        expect_state(comfy.open_sidebar(), "Not available")
    finally:
        comfy.page.unroute("**/weightstream/v1/**")
    # The next renewal is answered again.
    expect_state(comfy.open_sidebar(), "Idle")


# --- every state -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["dark", "light"])
def theme(request: pytest.FixtureRequest, comfy: ComfyPage) -> Iterator[str]:
    comfy.set("Comfy.ColorPalette", request.param)
    yield request.param
    comfy.set("Comfy.ColorPalette", "dark")


@pytest.fixture
def show_state(comfy: ComfyPage) -> Iterator[Callable[[str], Locator]]:
    """Shows one of the panel's states in the sidebar, and gives the panel."""

    def serve(route: Route) -> None:
        route.fulfill(path=STATES, content_type="text/javascript")

    def show(name: str) -> Locator:
        comfy.page.evaluate(MOUNT_STATE, [STATES_URL, name])
        panel = comfy.page.locator(f"[data-test={name}]")
        expect(panel).to_be_visible()
        return panel

    comfy.open_sidebar()
    comfy.page.route(f"**{STATES_URL}", serve)
    yield show
    comfy.page.evaluate(UNMOUNT_STATE)
    comfy.page.unroute(f"**{STATES_URL}")


def test_every_state_says_what_it_should(
    comfy: ComfyPage, theme: str, show_state: Callable[[str], Locator], save_picture: Callable[..., None]
) -> None:
    comfy.page.add_script_tag(path=str(AXE))
    names = comfy.page.evaluate("async url => Object.keys((await import(url)).STATES)", STATES_URL)
    assert set(names) == set(TEXTS)
    faults = {}
    for name in names:
        panel = show_state(name)
        for text in TEXTS[name]:
            expect(panel).to_contain_text(text)
        if name in IN_DOCS and theme == "dark":
            save_picture(panel, f"state-{name}")
        elif name == "streaming":
            save_picture(panel, f"state-{name}-light")
        panel.evaluate(UNFOLD)
        if name == "streaming" and theme == "dark":
            timeline = panel.locator(".ws-model > details").filter(has=comfy.page.locator("canvas"))
            expect(timeline.locator("canvas")).to_be_visible()
            save_picture(timeline, "timeline")
        faults[name] = comfy.page.evaluate(FAULTS, f"[data-test={name}]")
    assert faults == {name: [] for name in names}


def test_axe_finds_no_fault_in_the_live_panels(comfy: ComfyPage, theme: str) -> None:
    comfy.load_prompt(placed_prompt())
    comfy.open_sidebar()
    comfy.sample()
    comfy.page.add_script_tag(path=str(AXE))
    for selector in (".ws-sidebar", ".ws-embedded"):
        assert comfy.page.evaluate(FAULTS, selector) == []
