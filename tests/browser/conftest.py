"""A browser, a real ComfyUI that serves its page, and that page in a tab."""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import NoBrowser, find_chromium
from comfy_page import HEIGHT, SETTINGS, WIDTH, ComfyPage, write_settings
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, sync_playwright
from servers import free

import dev
from tools import demo
from tools.frontend import fetch_page
from tools.host import HeadlessHost

# The tiny FLUX (38 MB here) has to stream on one of them, and on both together.
DEVICES = "2x16MB"
IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
# Nothing beyond the host is reachable, so no test depends on what is out there.
ARGUMENTS = ["--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folder = Path(__file__).parent
    for item in items:
        if folder in item.path.parents:
            item.add_marker(pytest.mark.browser)


def program() -> str:
    """The browser. Skips the test where there is none, but not in CI."""
    try:
        return find_chromium()
    except NoBrowser as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Ends with each file: its event loop would be in the way of other files' own."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program(), args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="session", params=["own", "newest"])
def frontend(request: pytest.FixtureRequest) -> list[str]:
    """The host's arguments for the page that its ComfyUI asks for, and for the newest that was tried."""
    if request.param == "own":
        return []
    try:
        return ["--front-end-root", os.fspath(fetch_page())]
    except dev.SetupError as error:
        pytest.skip(f"a newer page of ComfyUI is not to be had: {error}")


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[list[str]], HeadlessHost]]:
    """Starts a host with some arguments when it is wanted first, for all files: a file has tests of each page."""
    environ = {"WEIGHTSTREAM_VIRTUAL": DEVICES, "CUDA_VISIBLE_DEVICES": ""}
    with contextlib.ExitStack() as running:

        @functools.cache
        def start(*arguments: str) -> HeadlessHost:
            folder = tmp_path_factory.mktemp("host")
            host = HeadlessHost(
                os.environ["COMFYUI_PATH"], folder, cpu=True, page=True, arguments=arguments, environ=environ
            )
            host.prepare()
            write_settings(host, SETTINGS)
            demo.write_models(host, demo.SIZES["tiny"])
            return running.enter_context(host)

        yield lambda arguments: start(*arguments)


@pytest.fixture(scope="session")
def host(frontend: list[str], hosts: Callable[[list[str]], HeadlessHost]) -> HeadlessHost:
    """Without a browser none has to be started."""
    program()
    return hosts(frontend)


@pytest.fixture(scope="module")
def opened(browser: Browser, host: HeadlessHost) -> Iterator[ComfyPage]:
    """The page in a tab. Opening it takes longer than most tests."""
    # Without the page's animations, which take more of the processor than a tiny model.
    context = browser.new_context(viewport={"width": WIDTH, "height": HEIGHT}, reduced_motion="reduce")
    yield ComfyPage(context.new_page(), host).open()
    context.close()


@pytest.fixture
def comfy(opened: ComfyPage) -> ComfyPage:
    """The page with an empty graph, and a host that keeps nothing of the tests before."""
    opened.clear()
    opened.close_sidebar()
    free(opened.host)
    return opened


@pytest.fixture
def save_picture(request: pytest.FixtureRequest, frontend: list[str]) -> Callable[..., None]:
    """Takes a picture for the docs, if asked to: one of each, in the page that ComfyUI brings."""
    if frontend or not request.config.getoption("--write-images"):
        return lambda *_, **__: None

    def save(shown: Locator | Page, name: str, **options: Any) -> None:
        IMAGES.mkdir(parents=True, exist_ok=True)
        taken = Image.open(io.BytesIO(shown.screenshot(animations="disabled", **options))).convert("RGB")
        # A third of the bytes, which everybody downloads who installs the pack.
        taken.quantize(256).save(IMAGES / f"{name}.png", optimize=True)

    return save
