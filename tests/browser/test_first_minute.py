"""The way of somebody with a workflow: ComfyUI's own FLUX template, the command, a run, why it is slow, a change."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from comfy_page import READY, RUN_BUTTON, ComfyPage, eventually
from PIL import Image
from playwright.sync_api import Locator, expect

from tools import demo
from tools.checkpoints import FLUX_SIZES, flux_tensors, write_checkpoint
from tools.host import HeadlessHost
from tools.serve import VAE, write_vae

TEMPLATE = "flux_dev_full_text_to_image"
# Of the canvas, below all nodes.
BELOW = (800, 850)
COMMAND = "WeightStream: stream this workflow's models"
THEIR_WAY = "ComfyUI loads it its own way"
# What the template asks for. Small files stand in for them: the text encoders are two CLIP-L, since a T5 has one size.
UNET = "flux1-dev.safetensors"
OTHERS = {
    ("text_encoders", "clip_l.safetensors"): demo.CLIP,
    ("text_encoders", "t5xxl_fp16.safetensors"): demo.CLIP,
    ("vae", "ae.safetensors"): VAE,
}
# The template is a subgraph; its picture's size is on the subgraph's node.
SET_SMALL = """() => {
    const inner = [...app.rootGraph.subgraphs.values()].flatMap(graph => graph.nodes)
    const set = (node, values) => {
        for (const widget of node.widgets.filter(each => each.name in values)) {
            widget.value = values[widget.name]
            widget.callback?.(widget.value)
        }
    }
    set(inner.find(node => node.type === 'DualCLIPLoader'), { type: 'sd3' })
    set(inner.find(node => node.type === 'KSampler'), { steps: 6, control_after_generate: 'fixed' })
    set(app.rootGraph.nodes.find(node => node.subgraph), { width: 256, height: 256 })
}"""
SET_SIZE = """size => {
    for (const widget of app.rootGraph.nodes.find(node => node.subgraph).widgets)
        if (['width', 'height'].includes(widget.name)) widget.value = size
}"""
# What is saved of the subgraph's node, but for its size.
OUTER = """() => {
    const { size, ...saved } = app.rootGraph.nodes.find(node => node.subgraph).serialize()
    return JSON.parse(JSON.stringify(saved))
}"""
# Of a picture for README.md: the panel and the node with the line.
FRONT = {"x": 55, "y": 40, "width": 870, "height": 660}
SECONDS, WAITING = re.compile(r"([\d.]+) s/step"), re.compile(r"(\d+) % waiting")
# What both kinds of advice name: for a model that has no room, and for one that is as fast as the GPU computes.
ADVICE = "smaller picture"
# Beside badges of the host's own.
LINES = """() => app.rootGraph.nodes.find(node => node.subgraph).badges
    .map(badge => (typeof badge === 'function' ? badge() : badge).text)
    .filter(text => /^[\\d.]+ s\\/step · /.test(text))"""
# The headline of a card, and the lines, at one moment.
BOTH = f"headline => [headline.innerText, ({LINES})()]"
# Nodes 2.0 has on a node's element what its badges say now.
SHOWN = f"""() => {{
    const [line] = ({LINES})()
    const elements = [...document.querySelectorAll('[data-node-id] *')]
    return elements.some(each => each.textContent.trim() === line && each.checkVisibility())
}}"""


@pytest.fixture(scope="module", autouse=True)
def files(host: HeadlessHost) -> Iterator[None]:
    """Before the page asks which files there are."""
    write_vae(host)
    unet = host.models("diffusion_models") / UNET
    # As wide a conditioning as the template's type of text encoders makes.
    write_checkpoint(unet, flux_tensors(replace(FLUX_SIZES["tiny"], context=4096)), seed=1)
    stand_ins = {host.models(folder) / name: host.models(folder) / small for (folder, name), small in OTHERS.items()}
    for path, small in stand_ins.items():
        path.hardlink_to(small)
    yield
    for path in (unet, *stand_ins, host.models("vae") / VAE):
        path.unlink()


@pytest.fixture
def template(comfy: ComfyPage) -> ComfyPage:
    """The page with the template open."""
    comfy.page.goto(f"{comfy.host.url}/?template={TEMPLATE}")
    comfy.page.wait_for_function(READY)
    comfy.page.locator(RUN_BUTTON).wait_for()
    comfy.page.wait_for_function("() => app.rootGraph.nodes.some(node => node.subgraph)")
    comfy.page.evaluate(SET_SMALL)
    return comfy


def run(comfy: ComfyPage) -> bytes:
    """Press Run; the picture, without what its file says of the workflow."""
    outputs = comfy.host.wait(comfy.queue(), timeout_s=120)["outputs"]
    [saved] = [image for output in outputs.values() for image in output["images"]]
    with Image.open(comfy.host.output_file(saved)) as image:
        return image.tobytes()


def forget(comfy: ComfyPage) -> None:
    """Free what ComfyUI has loaded its own way: no card tells what it will do.

    A host that is just collecting garbage after a prompt misses what it is told, and must be told again; a model of
    which the last clone is gone seems to be gone too for a moment.
    """
    give_up, gone_since = time.monotonic() + 30, time.monotonic()
    while time.monotonic() < gone_since + 0.5:
        assert time.monotonic() < give_up, "it does not forget"
        if comfy.host.get(f"/weightstream/v1/estimate?name={UNET}")["loaded"]:
            comfy.host.free()
            time.sleep(0.3)
            gone_since = time.monotonic()
        time.sleep(0.05)


def settled(comfy: ComfyPage, card: Locator, before: str = "") -> str:
    """Wait until nothing runs, and the card tells of the run after ``before`` what the line on the node says too, which
    is not written at the same moment. Returns the card's headline."""
    expect(comfy.page.locator(".ws-state-text").first).to_have_text("Idle", timeout=20_000)
    headline = card.locator(".ws-headline")
    expect(headline).to_have_count(1)
    told, _ = eventually(
        comfy.page, lambda: headline.evaluate(BOTH), lambda both: both[0] != before and agree(both[0], both[1])
    )
    return str(told)


def agree(told: str, lines: list[str]) -> bool:
    """Whether a headline and the only line say the same of a step, within rounding."""
    seconds = [float(found) for text in (told, *lines) for found in SECONDS.findall(text)]
    if len(lines) != 1 or len(seconds) != 2:
        return False
    # A line does not say how little it is.
    part, on_node = (sum(map(int, WAITING.findall(text))) for text in (told, *lines))
    is_like = abs(part - on_node) <= 1 or max(part, on_node) <= 3
    return seconds[1] == pytest.approx(seconds[0], rel=0.06) and is_like


def test_from_the_template_to_why_it_is_slow(template: ComfyPage, save_picture: Callable[..., None]) -> None:
    page = template.page
    # The file's name is an input of the subgraph.
    before_run = template.open_sidebar().locator(".ws-estimates .ws-model").filter(has_text=UNET)
    expect(before_run).to_contain_text(THEIR_WAY)
    save_picture(page, "first-minute-before")
    template.close_sidebar()
    own = run(template)
    forget(template)
    page.mouse.click(*BELOW, button="right")
    page.get_by_text(COMMAND).last.click()
    expect(page.get_by_text("1 model streams now").last).to_be_visible()
    save_picture(page, "first-minute-command")
    page.evaluate("() => app.extensionManager.toast.removeAll?.()")
    before = page.evaluate(OUTER)
    template.open_sidebar()
    expect(before_run).to_be_visible()
    expect(before_run).not_to_contain_text(THEIR_WAY)
    template.close_sidebar()

    assert run(template) == own
    # Of a node in a subgraph, on the node that is seen.
    page.wait_for_function(f"() => ({LINES})().length === 1")
    [line] = page.evaluate(LINES)
    assert page.evaluate(OUTER) == before
    card = template.open_sidebar().locator(".ws-model").filter(has_text=UNET)
    expect(card.locator(".ws-cause").first).to_be_visible()
    told = settled(template, card)
    expect(card.locator(".ws-todo").first).to_contain_text(ADVICE)
    save_picture(page, "first-minute-why")
    save_picture(page, "first-minute", clip=FRONT)

    page.evaluate(SET_SIZE, 128)
    assert len(run(template)) == len(own) // 4
    page.wait_for_function(f"line => ({LINES})().join() !== line", arg=line)
    card.locator("summary", has_text="Steps of the last runs").click()
    expect(card.locator("tbody tr")).to_have_count(2)
    settled(template, card, told)
    save_picture(page, "first-minute-changed")
    template.set("Comfy.VueNodes.Enabled", True)
    try:
        page.wait_for_function(SHOWN)
    finally:
        template.set("Comfy.VueNodes.Enabled", False)
    assert template.our_errors == []
