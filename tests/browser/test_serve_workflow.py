"""The workflow of ``dev.py serve`` in the real page: no node lies over another, in either style of nodes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from comfy_page import ComfyPage

from tools.host import HeadlessHost
from tools.serve import DEMO, VAE, write_vae
from tools.workflow import build

# The canvas knows its nodes' sizes itself. In the other style they are elements, which are as tall as they are.
BOXES = {
    False: """() => app.graph.nodes.map(({ type, pos: [x, y], size: [width, height] }) =>
        [type, x, y - LiteGraph.NODE_TITLE_HEIGHT, x + width, y + height])""",
    True: """() => [...document.querySelectorAll('[data-node-id]')].map(element => {
        const box = element.getBoundingClientRect()
        return [app.graph.getNodeById(element.dataset.nodeId)?.type, box.left, box.top, box.right, box.bottom]
    }).filter(([type, left, , right]) => type && right > left)""",
}
# Whatever the page does once it has drawn.
FRAMES = "async () => { for (let frame = 0; frame < 40; frame++) await new Promise(requestAnimationFrame) }"


@pytest.fixture(scope="module", autouse=True)
def vae(host: HeadlessHost) -> Iterator[None]:
    """Before the page asks which files there are."""
    write_vae(host)
    yield
    (host.models("vae") / VAE).unlink()


@pytest.fixture(params=[False, True], ids=["canvas", "elements"])
def as_elements(request: pytest.FixtureRequest, comfy: ComfyPage) -> Iterator[bool]:
    comfy.set("Comfy.VueNodes.Enabled", request.param)
    yield request.param
    comfy.set("Comfy.VueNodes.Enabled", False)


def test_no_node_lies_over_another(comfy: ComfyPage, as_elements: bool) -> None:
    comfy.load_workflow(build(DEMO, comfy.host.get("/object_info"), "0.1.0"))
    check_apart(comfy, BOXES[as_elements])
    comfy.host.wait(comfy.queue())
    check_apart(comfy, BOXES[as_elements])


def check_apart(comfy: ComfyPage, boxes: str) -> None:
    """All nodes are there, and what the page shows on them after a run has room too."""
    comfy.page.wait_for_function(f"() => ({boxes})().length === {len(DEMO.nodes) + 1}")
    comfy.page.evaluate(FRAMES)
    found: list[Any] = comfy.page.evaluate(boxes)
    over = [
        (one[0], other[0])
        for place, one in enumerate(found)
        for other in found[place + 1 :]
        if one[1] < other[3] and other[1] < one[3] and one[2] < other[4] and other[2] < one[4]
    ]
    assert over == [], found
