"""What the panel says of models of the open workflow before they run, in ComfyUI's real page."""

from __future__ import annotations

import copy
from typing import Any

from comfy_page import ComfyPage
from playwright.sync_api import Locator, expect
from servers import TINY, free
from workflow_files import node, subgraph, workflow

from tools import demo
from tools.host import HeadlessHost

SEED = 95
ROUTE = "/weightstream/v1/estimate"
GUI = "11111111-2222-3333-4444-666666666666"
COMMAND = "WeightStream.StreamModels"
THEIR_WAY = "ComfyUI loads it its own way"
MISSING = "missing.safetensors"
SET_FILE = """([kind, name]) => {
    app.graph.nodes.find(node => node.type === kind).widgets.find(widget => widget.name === 'unet_name').value = name
}"""


def card_of(panel: Locator, name: str = demo.UNET) -> Locator:
    return panel.locator(".ws-estimates .ws-model").filter(has_text=name)


def asked_by(comfy: ComfyPage) -> list[str]:
    """The addresses of estimates that the page asks for from now on."""
    asked: list[str] = []
    comfy.page.on("request", lambda request: ROUTE in request.url and asked.append(request.url))
    return asked


def pass_news(comfy: ComfyPage, count: int = 3) -> None:
    """Wait for so many events of the status."""
    comfy.page.evaluate(
        """count => new Promise(resolve => {
            app.api.addEventListener('weightstream.status', () => --count || resolve())
        })""",
        count,
    )


def test_a_model_has_a_card_until_it_is_loaded(comfy: ComfyPage) -> None:
    comfy.load_prompt(demo.api_prompt(TINY, demo.OURS, SEED))
    asked = asked_by(comfy)
    panel = comfy.open_sidebar()
    card = card_of(panel)
    expect(card).to_contain_text("gpu:0")
    told = comfy.host.get(f"{ROUTE}?name={demo.UNET}")
    assert told["streamed_bytes"] > 0
    expect(card).to_contain_text(f"from {told['streamed_blocks']} of {told['blocks']} blocks")
    expect(card).to_contain_text("known after the first run" if told["step_seconds"] is None else "predicted, with")
    expect(card).not_to_contain_text(THEIR_WAY)
    pass_news(comfy)
    assert len(asked) == 1, "nothing is asked again while nothing has changed"
    card.get_by_role("button").press("Enter")
    assert comfy.page.evaluate("() => Object.values(app.canvas.selected_nodes).map(node => node.type)") == [
        "WeightStreamModelLoader"
    ]
    comfy.sample()
    expect(panel.locator(".ws-models .ws-model")).to_have_count(1)
    expect(card).to_have_count(0)
    free(comfy.host)
    expect(card).to_contain_text("predicted, with")
    comfy.close_sidebar()
    del asked[:]
    comfy.page.evaluate(SET_FILE, ["WeightStreamModelLoader", MISSING])
    assert asked == []
    expect(card_of(comfy.open_sidebar(), MISSING)).to_contain_text(f"{MISSING}: there is no such file in")
    assert [url.split("?")[1].split("&")[0] for url in asked] == [f"name={MISSING}"]
    # The browser's own line about the status of that answer.
    assert [error for error in comfy.our_errors if MISSING not in error] == []


def with_loader_of_theirs() -> dict[str, Any]:
    """A workflow in which ComfyUI's own loader lies in a subgraph."""
    inner = workflow(
        node(20, "UNETLoader", [demo.UNET, "default"]),
        node(21, "LoraLoaderModelOnly", [demo.LORA, 0.8], model=(20, 0)),
        first_link=50,
        as_objects=True,
    )
    graph = copy.deepcopy(workflow(node(40, GUI, [])))
    graph["definitions"] = {"subgraphs": [subgraph(GUI, "Loading", inner, [])]}
    return graph


def test_a_loader_of_comfyui_s_own_in_a_subgraph_has_a_card(comfy: ComfyPage) -> None:
    comfy.load_workflow(with_loader_of_theirs())
    panel = comfy.open_sidebar()
    expect(card_of(panel)).to_contain_text(THEIR_WAY)
    comfy.page.evaluate("id => app.extensionManager.command.execute(id)", COMMAND)
    expect(card_of(panel)).to_be_visible()
    expect(card_of(panel)).not_to_contain_text(THEIR_WAY)
    expect(card_of(panel)).to_have_count(1)


def test_what_comfyui_has_loaded_itself_has_no_card(comfy: ComfyPage, host: HeadlessHost) -> None:
    comfy.load_prompt(demo.api_prompt(TINY, demo.THEIRS, SEED))
    panel = comfy.open_sidebar()
    expect(card_of(panel)).to_be_visible()
    comfy.sample()
    assert host.get(f"{ROUTE}?name={demo.UNET}")["loaded"]
    expect(card_of(panel)).to_have_count(0)
