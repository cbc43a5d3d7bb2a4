"""ComfyUI's real page against a fleet: prompts run there as with one ComfyUI, and the panel shows the workers."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from comfy_page import HEIGHT, SETTINGS, WIDTH, ComfyPage, saved_latent, write_settings
from fleets import make_fleet
from panel_page import AXE, FAULTS, UNFOLD
from playwright.sync_api import Browser, Locator, expect
from servers import TINY

from tools import demo
from tools.fleet_host import FleetHost
from tools.frontend import fetch_page
from tools.host import PromptInterrupted

WORKERS = 2
SEED = 120
# Longer than any test, unless it is interrupted.
ENDLESS_STEPS = 10_000
# A worker that is busy answers late.
SLOW_MS = 60_000
LINE = re.compile(r"^[\d.]+ s/step · ")
STATE = re.compile("running for")
INTERRUPT = "Cancel current run"
FIND_NODE = "const node = app.graph.nodes.find(node => node.type === type)"
# Pictures of a node count once they are decoded.
PICTURE_OF = f"""type => {{
    {FIND_NODE}
    const image = node.imgs?.at(-1)
    return image?.naturalWidth ? {{ width: image.naturalWidth, source: image.src }} : null
}}"""
PROGRESS_OF = f"type => {{ {FIND_NODE}; return node.progress ?? 0 }}"
HEAR = """() => {
    window.fleetHeard = {}
    for (const kind of ['execution_start', 'execution_success', 'execution_interrupted', 'executed', 'b_preview'])
        app.api.addEventListener(kind, ({ detail }) => (window.fleetHeard[kind] ??= []).push(detail?.prompt_id))
}"""
HEARD = "kind => window.fleetHeard[kind] ?? []"


@pytest.fixture(scope="module")
def front(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FleetHost]:
    """One for all tests here, with the newest page. Without ``browser``, nothing has to be started."""
    arguments = ["--front-end-root", os.fspath(fetch_page()), "--preview-method", "latent2rgb"]
    host = make_fleet(tmp_path_factory.mktemp("fleet"), WORKERS, arguments=arguments, page=True)
    write_settings(host, SETTINGS)
    with host:
        yield host


@pytest.fixture(scope="module")
def opened(browser: Browser, front: FleetHost) -> Iterator[ComfyPage]:
    context = browser.new_context(viewport={"width": WIDTH, "height": HEIGHT}, reduced_motion="reduce")
    yield ComfyPage(context.new_page(), front).open()
    context.close()


@pytest.fixture
def comfy(opened: ComfyPage) -> ComfyPage:
    """The page with an empty graph, its panel, and an ear for what the front sends."""
    opened.clear()
    opened.page.evaluate(HEAR)
    opened.open_sidebar()
    return opened


def make_prompt(seed: int, steps: int = demo.STEPS) -> dict[str, Any]:
    """The demo's prompt, with a picture that the page shows."""
    result = copy.deepcopy(demo.api_prompt(TINY, demo.OURS, seed))
    result["sampler"]["inputs"]["steps"] = steps
    size = {"width": 64, "height": 32, "batch_size": 1, "color": seed}
    result["picture"] = {"class_type": "EmptyImage", "inputs": size}
    result["shown"] = {"class_type": "PreviewImage", "inputs": {"images": ["picture", 0]}}
    return result


def workers_of(comfy: ComfyPage) -> Locator:
    return comfy.open_sidebar().locator(".ws-worker")


def wait_until_up(comfy: ComfyPage) -> None:
    expect(workers_of(comfy)).to_contain_text(["gpu-0free", "gpu-1free"], timeout=2 * SLOW_MS)


def interrupt(comfy: ComfyPage, prompt_id: str) -> None:
    """Press the page's own button, and wait for the end of the prompt there."""
    comfy.page.get_by_role("button", name=INTERRUPT, exact=True).click()
    with pytest.raises(PromptInterrupted):
        comfy.host.wait(prompt_id, timeout_s=60)
    comfy.page.wait_for_function("id => window.fleetHeard.execution_interrupted?.includes(id)", arg=prompt_id)


def test_a_model_is_told_of_before_it_runs(comfy: ComfyPage) -> None:
    wait_until_up(comfy)
    comfy.load_prompt(make_prompt(SEED))
    card = comfy.open_sidebar().locator(".ws-estimates")
    expect(card).to_contain_text(demo.UNET)
    expect(card).to_contain_text(re.compile(r"stay; gpu-\d has "))
    expect(card).not_to_contain_text("GPU Placement")


def test_a_prompt_runs_as_in_one_comfyui(comfy: ComfyPage) -> None:
    wait_until_up(comfy)
    comfy.load_prompt(make_prompt(SEED))
    prompt_id = comfy.queue()
    latent = saved_latent(comfy.host, prompt_id)
    for kind in ("execution_start", "executed", "execution_success"):
        comfy.page.wait_for_function("([kind, id]) => window.fleetHeard[kind]?.includes(id)", arg=[kind, prompt_id])
    comfy.page.wait_for_function("() => window.fleetHeard.b_preview")
    comfy.page.wait_for_function(PICTURE_OF, arg="PreviewImage")
    picture = comfy.page.evaluate(PICTURE_OF, "PreviewImage")
    assert picture["width"] == 64
    assert re.search(r"subfolder=gpu-\d%2Ftemp", picture["source"]), "of a worker's folder"
    expect(comfy.page.locator("details.ws-line summary")).to_have_text(LINE)
    panel = comfy.open_sidebar()
    names = [f"gpu-{number}" for number in range(WORKERS)]
    for part in (".ws-worker", ".ws-device"):
        expect(panel.locator(part).locator(".ws-device-name")).to_have_text(names)
    expect(panel.locator(".ws-fleet")).to_contain_text("No prompt waits")
    expect(panel.locator(".ws-worker", has_text="1 prompt done · 1 change of models · ")).to_contain_text(demo.UNET)
    expect(panel.locator(".ws-model", has_text=demo.UNET)).to_contain_text(re.compile(r"gpu-\d "))
    assert comfy.sample() == latent, "with nothing of it made again"
    assert comfy.our_errors == []


def test_a_model_on_a_worker_is_freed_from_the_panel(comfy: ComfyPage) -> None:
    wait_until_up(comfy)
    comfy.load_prompt(make_prompt(SEED + 1))
    comfy.sample()
    card = comfy.open_sidebar().locator(".ws-model", has_text=demo.UNET).first
    card.get_by_role("button", name=f"Free {demo.UNET}", exact=True).click()
    expect(card).to_contain_text("Freed ", timeout=SLOW_MS)


def test_a_long_prompt_is_followed_outlives_its_worker_and_is_interrupted(comfy: ComfyPage) -> None:
    """One prompt for the page all the time, though a worker is killed under it."""
    wait_until_up(comfy)
    comfy.load_prompt(make_prompt(SEED + 2, ENDLESS_STEPS))
    prompt_id = comfy.queue()
    panel, workers = comfy.open_sidebar(), workers_of(comfy)
    first = workers.filter(has_text=STATE)
    expect(first).to_have_count(1, timeout=SLOW_MS)
    expect(panel.locator(".ws-progress")).to_contain_text(f"of {ENDLESS_STEPS}", timeout=SLOW_MS)
    expect(panel.locator(".ws-state-text")).to_have_text(re.compile("^Streaming"), timeout=SLOW_MS)
    comfy.page.wait_for_function(PICTURE_OF, arg="KSampler")
    comfy.page.wait_for_function(PROGRESS_OF, arg="KSampler")

    (running,) = [worker for worker in comfy.host.workers if worker["prompt_id"] == prompt_id]
    psutil.Process(running["pid"]).kill()
    lost = workers.filter(has=comfy.page.get_by_text(running["name"], exact=True))
    expect(lost).to_contain_text("started again", timeout=SLOW_MS)
    expect(lost).to_contain_text(re.compile(r"its process ended \(\w+ \w+\)"))
    expect(panel.locator(".ws-fleet")).to_contain_text("1 ran again because a worker died")
    other = workers.filter(has_text=STATE)
    expect(other).to_have_count(1, timeout=SLOW_MS)
    expect(other).not_to_contain_text(running["name"])
    comfy.page.wait_for_function("() => window.fleetHeard.execution_start?.length >= 2")
    assert set(comfy.page.evaluate(HEARD, "execution_start")) == {prompt_id}

    comfy.page.add_script_tag(path=str(AXE))
    panel.evaluate(UNFOLD)
    assert comfy.page.evaluate(FAULTS, ".ws-sidebar") == []
    expect(panel.locator(".ws-model")).to_have_count(1)
    interrupt(comfy, prompt_id)
    expect(other).to_have_count(0, timeout=SLOW_MS)
    expect(panel.locator(".ws-progress")).to_be_hidden()
    wait_until_up(comfy)
    # Until the page hears of a worker's end it may ask for steps of the model there.
    gone = f"model={running['name']}."
    assert [error for error in comfy.our_errors if gone not in error] == []
