"""ComfyUI's page in a browser, and what a user does there."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from playwright.sync_api import ConsoleMessage, Locator, Page, Response, TimeoutError, expect

from tools import demo
from tools.host import HeadlessHost

WIDTH, HEIGHT = 1600, 1000
# A user who has been here before: no tour, no templates over the graph, no news of releases.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.OnboardingCoachmarks.Seen": ["appMode", "firstRun"],
    "Comfy.Notification.ShowVersionUpdates": False,
    # The newest page asks for a newer ComfyUI.
    "Comfy.VersionCompatibility.DisableWarnings": True,
    # Each test opens its own page: one must not find the graph of another.
    "Comfy.Workflow.Persist": False,
    "LiteGraph.Node.TooltipDelay": 50,
}
# While it starts a mask lies over the page, which takes the clicks.
READY = """() => window.app?.graph && app.extensionManager && !app.extensionManager.spinner
    && !document.querySelector('.p-blockui-mask')"""
# The page says that a prompt is loaded before the tab is open that it is shown in, and that keeps its steps of undo.
LOAD_PROMPT = """async prompt => {
    const name = 'test-' + crypto.randomUUID()
    await app.loadApiJson(prompt, name)
    const widgets = app.graph.nodes.flatMap(node => node.widgets ?? [])
    for (const widget of widgets.filter(widget => widget.name === 'control_after_generate')) widget.value = 'fixed'
    while (app.extensionManager.workflow.activeWorkflow?.filename !== name) await new Promise(requestAnimationFrame)
}"""
# After a change of its language the page asks for the nodes' definitions, and then loads the open workflow anew,
# whichever that is by then.
SET_LOCALE = """async locale => {
    const { loadGraphData } = app
    const loaded = new Promise((resolve, reject) => {
        app.loadGraphData = async (...values) => {
            delete app.loadGraphData
            await loadGraphData.apply(app, values).then(resolve, reject)
        }
    })
    await app.extensionManager.setting.set('Comfy.Locale', locale)
    await loaded
}"""
TAB_PICTURE = ".workflow-preview-content, .workflow-popover-fade, [data-reka-popper-content-wrapper]"
SEARCH_INPUT = "input[role=combobox]:focus"
EMPTY_PLACE = (800, 500)
# The canvas takes no double click while it is busy with what was added before.
SEARCH_TRIES = 5
# Once they are drawn there; elements on nodes follow a frame later.
BRING_INTO_VIEW = """async types => {
    const nodes = app.graph.nodes.filter(node => types.includes(node.type))
    const frames = async count => { while (count--) await new Promise(requestAnimationFrame) }
    const margin = 14
    const title = LiteGraph.NODE_TITLE_HEIGHT
    const left = Math.min(...nodes.map(node => node.pos[0])) - margin
    const top = Math.min(...nodes.map(node => node.pos[1])) - title - 2 * margin
    const right = Math.max(...nodes.map(node => node.pos[0] + node.size[0])) + margin
    const bottom = Math.max(...nodes.map(node => node.pos[1] + node.size[1])) + margin
    const canvas = app.canvas.canvas.getBoundingClientRect()
    const x = 380, y = 180
    app.canvas.ds.scale = 1
    app.canvas.ds.offset = [x - canvas.x - left, y - canvas.y - top]
    app.canvas.setDirty(true, true)
    await frames(5)
    return [x, y, right - left, bottom - top]
}"""
SIDEBAR_PANEL = ".ws-sidebar .ws-panel"
SIDEBAR_BUTTON = "VRAM and streamed models (WeightStream)"
RUN_BUTTON = "[data-testid=queue-button]"
OURS = "weightstream"
# The host's own text on a node: it is there for a moment before what is said instead.
HOST_TEXT = "$$node-text-preview"
NO_HOST_TEXT = f"""type => app.graph.nodes.find(node => node.type === type).widgets
    .every(({{ name }}) => name !== '{HOST_TEXT}')"""

T = TypeVar("T")


def write_settings(host: HeadlessHost, settings: Mapping[str, Any]) -> None:
    """The settings of the host's only user, whom the page asks for before it shows anything."""
    folder = host.base / "user" / "default"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comfy.settings.json").write_text(json.dumps(settings), "utf-8")


class ComfyPage:
    """A tab with ComfyUI's page, ready for use.

    Attributes:
        page: the tab, for whatever else a test does there.
        errors: what the page's console called an error, and exceptions that nobody caught.
    """

    def __init__(self, page: Page, host: HeadlessHost) -> None:
        self.page = page
        self.host = host
        self.errors: list[str] = []
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.errors.append(f"{error}\n{error.stack or ''}"))

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(f"{message.location.get('url', '')}: {message.text}")

    def open(self) -> ComfyPage:
        """Open the page and take away the graph that it starts with."""
        self.page.goto(self.host.url)
        self.page.wait_for_function(READY)
        self.page.locator(RUN_BUTTON).wait_for()
        self.clear()
        return self

    @property
    def our_errors(self) -> list[str]:
        return [error for error in self.errors if OURS in error.lower()]

    # the graph

    def clear(self) -> None:
        """An empty graph, looked at as at first."""
        self.page.evaluate("() => { app.graph.clear(); app.canvas.ds.reset(); app.canvas.setDirty(true, true) }")

    def search(self, text: str) -> Locator:
        """Look for a node as a user does, with a double click on the empty graph; what is found."""
        search = self.page.locator(SEARCH_INPUT)
        for _ in range(SEARCH_TRIES):
            self.page.mouse.dblclick(*EMPTY_PLACE)
            with contextlib.suppress(TimeoutError):
                search.wait_for(timeout=2_000)
                break
        search.fill(text)
        return self.page.get_by_role("option")

    def load_prompt(self, prompt: Mapping[str, Any]) -> None:
        """Show an API prompt as nodes, as the page does with a file that is dropped on it, and keep its seed."""
        self.page.evaluate(LOAD_PROMPT, as_page_numbers(prompt))

    def load_workflow(self, workflow: Mapping[str, Any]) -> None:
        self.page.evaluate("async workflow => { await app.loadGraphData(workflow) }", workflow)

    def workflow(self) -> dict[str, Any]:
        """What the page saves: the workflow as JSON."""
        return self.page.evaluate("() => JSON.parse(JSON.stringify(app.graph.serialize()))")

    def prompt(self) -> dict[str, Any]:
        """What the page would queue: the API prompt."""
        return self.page.evaluate("async () => (await app.graphToPrompt()).output")

    def bring_into_view(self, *types: str) -> dict[str, float]:
        """Show the nodes of these types at their true size; where on the page they are then."""
        x, y, width, height = self.page.evaluate(BRING_INTO_VIEW, list(types))
        return {"x": x, "y": y, "width": width, "height": height}

    # the panel

    def set(self, setting: str, value: Any) -> None:
        self.page.evaluate("([id, value]) => app.extensionManager.setting.set(id, value)", [setting, value])

    def load_prompt_in(self, locale: str, prompt: Mapping[str, Any]) -> None:
        """Show an API prompt in another language than the page has."""
        self.page.evaluate(SET_LOCALE, locale)
        self.load_prompt(prompt)

    def open_sidebar(self) -> Locator:
        """The panel in its sidebar tab."""
        panel = self.page.locator(SIDEBAR_PANEL)
        if not panel.count():
            self.page.get_by_role("button", name=SIDEBAR_BUTTON).click()
        expect(panel).to_be_visible()
        return panel

    def close_sidebar(self) -> None:
        panel = self.page.locator(SIDEBAR_PANEL)
        if panel.count():
            self.page.get_by_role("button", name=SIDEBAR_BUTTON).click()
        expect(panel).to_have_count(0)

    # running

    def press_run(self) -> None:
        """At a tab under the mouse the page shows a picture of its workflow, which would lie over the button, and stays
        while the mouse is on it."""
        self.page.mouse.move(*EMPTY_PLACE)
        expect(self.page.locator(TAB_PICTURE)).to_have_count(0)
        self.page.locator(RUN_BUTTON).click()

    def queue(self) -> str:
        """Press Run; the id of the prompt that is queued."""
        with self.page.expect_response(_is_queueing) as queued:
            self.press_run()
        answer = queued.value.json()
        assert queued.value.ok, f"the host refuses what the page queued: {answer}"
        assert not answer["node_errors"]
        return answer["prompt_id"]

    def sample(self) -> demo.Latent:
        """Press Run and wait; the latent that the workflow's only SaveLatent has saved."""
        return saved_latent(self.host, self.queue())


def eventually(page: Page, read: Callable[[], T], is_so: Callable[[T], bool], timeout_s: float = 20.0) -> T:
    """Return what is read once it is as it should be: what a run has left to say comes some moments after its end.

    Raises:
        AssertionError: it has not become so; the text is what was read last.
    """
    give_up = time.monotonic() + timeout_s
    while not is_so(value := read()):
        assert time.monotonic() < give_up, value
        # What comes from the server goes on meanwhile.
        page.wait_for_timeout(100)
    return value


def _is_queueing(response: Response) -> bool:
    return response.request.method == "POST" and response.url.split("?")[0].endswith("/api/prompt")


def saved_latent(host: HeadlessHost, prompt_id: str) -> demo.Latent:
    outputs = host.wait(prompt_id, timeout_s=120)["outputs"]
    (saved,) = [item for output in outputs.values() for item in output.get("latents", ())]
    return demo.read_latent(host.output_file(saved))


def as_page_numbers(prompt: Mapping[str, Any]) -> dict[str, Any]:
    """An API prompt with ids as the page gives them to nodes: numbers."""
    numbers = {name: str(number) for number, name in enumerate(prompt, 1)}

    def renamed(value: Any) -> Any:
        return [numbers[value[0]], value[1]] if isinstance(value, list) else value

    return {
        numbers[name]: {**node, "inputs": {key: renamed(value) for key, value in node["inputs"].items()}}
        for name, node in prompt.items()
    }
