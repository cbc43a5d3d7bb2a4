"""What the panel says of models of the open workflow before they run, in ComfyUI's real page."""

from __future__ import annotations

import copy
from typing import Any

from comfy_page import ComfyPage
from playwright.sync_api import Locator, expect
from servers import TINY, free
from workflow_files import FRAME_IN, FRAME_OUT, node, settings, subgraph, workflow

from tools import demo
from tools.host import HeadlessHost

SEED = 95
ROUTE = "/weightstream/v1/estimate"
GUI = "11111111-2222-3333-4444-666666666666"
OTHER_GUI = "11111111-2222-3333-4444-888888888888"
# GiB, rounded as inputs are.
RESERVE = 0.01
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


def with_two_loaders() -> dict[str, Any]:
    """Two of ComfyUI's loaders with one file: one whose MODEL goes out of a subgraph and into another, to Async Offload
    Settings, and one that is alone."""
    loader = workflow(node(20, "UNETLoader", [demo.UNET, "default"]), first_link=50, as_objects=True)
    behind = settings(30, (FRAME_IN, 0))
    # The first inputs, as far as the reserve.
    behind["widgets_values"] = ["auto", 0, 0, 0.0, "auto", 0.0, RESERVE]
    inside = workflow(behind, first_link=60, as_objects=True)
    out = {"id": 51, "origin_id": 20, "origin_slot": 0, "target_id": FRAME_OUT, "target_slot": 0, "type": "MODEL"}
    loader["nodes"][0]["outputs"][0]["links"] = [51]
    loader["links"], loader["last_link_id"] = [out], 51
    end = {"name": "model", "type": "MODEL"}
    first, second = subgraph(GUI, "Loading", loader, []), subgraph(OTHER_GUI, "Settings", inside, [])
    first["outputs"] = [{**end, "id": GUI.replace("1", "2"), "linkIds": [51]}]
    second["inputs"] = [{**end, "id": GUI.replace("1", "3"), "linkIds": [61]}]
    graph = workflow(node(40, GUI, []), node(41, OTHER_GUI, []), node(42, "UNETLoader", [demo.UNET, "default"]))
    graph["nodes"][0]["outputs"] = [{**end, "links": [1]}]
    graph["nodes"][1]["inputs"] = [{**end, "link": 1}]
    graph["links"], graph["last_link_id"] = [[1, 40, 0, 41, 0, "MODEL"]], 1
    graph["definitions"] = {"subgraphs": [first, second]}
    return graph


def test_settings_count_for_the_loader_that_they_are_behind(comfy: ComfyPage) -> None:
    comfy.load_workflow(with_two_loaders())
    asked = asked_by(comfy)
    cards = card_of(comfy.open_sidebar())
    expect(cards).to_have_count(2)
    expect(cards.filter(has_text=THEIR_WAY)).to_have_count(1)
    expect(cards.filter(has_not_text=THEIR_WAY)).to_contain_text("of which 10.2 MiB are left to activations")
    assert sorted(f"reserve_vram_gb={RESERVE}" in url for url in asked) == [False, True]
    assert [error for error in comfy.our_errors if MISSING not in error] == []


def test_what_comfyui_has_loaded_itself_has_no_card(comfy: ComfyPage, host: HeadlessHost) -> None:
    comfy.load_prompt(demo.api_prompt(TINY, demo.THEIRS, SEED))
    panel = comfy.open_sidebar()
    expect(card_of(panel)).to_be_visible()
    comfy.sample()
    assert host.get(f"{ROUTE}?name={demo.UNET}")["loaded"]
    expect(card_of(panel)).to_have_count(0)
