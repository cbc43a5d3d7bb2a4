"""ComfyUI's page in a browser, and what a user does there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from playwright.sync_api import ConsoleMessage, Error, Page

from tools import demo
from tools.host import HeadlessHost

# A user who has been here before: no tour, no templates over the graph, no news of releases.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.OnboardingCoachmarks.Seen": ["appMode", "firstRun"],
    "Comfy.Notification.ShowVersionUpdates": False,
    # The newest page asks for a newer ComfyUI.
    "Comfy.VersionCompatibility.DisableWarnings": True,
    # Each test opens its own page: one must not find the graph of another.
    "Comfy.Workflow.Persist": False,
}
READY = "() => window.app?.graph && window.app.extensionManager && window.LiteGraph"
RUN_BUTTON = "[data-testid=queue-button]"
OURS = "weightstream"


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
        self.page.goto(self.host.url)
        self.page.wait_for_function(READY)
        self.page.locator(RUN_BUTTON).wait_for()
        return self

    @property
    def our_errors(self) -> list[str]:
        return [error for error in self.errors if OURS in error.lower()]

    # the graph

    def load_prompt(self, prompt: Mapping[str, Any]) -> None:
        """Show an API prompt as nodes, as the page does with a file that is dropped on it."""
        self.page.evaluate("async prompt => { await app.loadApiJson(prompt, 'test') }", prompt)

    def load_workflow(self, workflow: Mapping[str, Any]) -> None:
        self.page.evaluate("async workflow => { await app.loadGraphData(workflow) }", workflow)

    def clear(self) -> None:
        self.page.evaluate("() => app.graph.clear()")

    def workflow(self) -> dict[str, Any]:
        """What the page saves: the workflow as JSON."""
        return self.page.evaluate("() => JSON.parse(JSON.stringify(app.graph.serialize()))")

    def prompt(self) -> dict[str, Any]:
        """What the page would queue: the API prompt."""
        return self.page.evaluate("async () => (await app.graphToPrompt()).output")

    # running

    def queue(self) -> str:
        """Press Run; the id of the prompt that is queued."""
        with self.page.expect_response(_is_queueing) as queued:
            self.page.locator(RUN_BUTTON).click()
        answer = queued.value.json()
        assert queued.value.ok, f"the host refuses what the page queued: {answer}"
        assert not answer["node_errors"]
        return answer["prompt_id"]

    def sample(self) -> demo.Latent:
        """Press Run and wait; the latent that the workflow's only SaveLatent has saved."""
        return saved_latent(self.host, self.queue())


def _is_queueing(response: Any) -> bool:
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
