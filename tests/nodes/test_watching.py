"""Routes and events in a real ComfyUI server, as a page uses them."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from weightstream import streaming

from tools import demo
from tools.host import HeadlessHost, PromptRejected

TINY = demo.SIZES["tiny"]
STATUS, WATCH, UNLOAD = (f"/weightstream/v1/{name}" for name in ("status", "watch", "unload"))
EVENT = "weightstream.status"
ROOT = Path(streaming.__file__).parent.parent


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HeadlessHost]:
    environment = {"WEIGHTSTREAM_VIRTUAL": "2x24MB", "CUDA_VISIBLE_DEVICES": ""}
    host = HeadlessHost(os.environ["COMFYUI_PATH"], tmp_path_factory.mktemp("host"), cpu=True, environ=environment)
    host.prepare()
    demo.write_models(host, TINY)
    with host:
        yield host


def prompt(seed: int, steps: int = demo.STEPS) -> dict[str, Any]:
    """A picture, and a report of it."""
    result = demo.api_prompt(TINY, demo.OURS, seed)
    result["sampler"]["inputs"]["steps"] = steps
    inputs = {"model": ["model", 0], "trigger": ["sampler", 0]}
    result["report"] = {"class_type": "WeightStreamReport", "inputs": inputs}
    return result


async def post(session: aiohttp.ClientSession, path: str, body: Any) -> tuple[int, dict[str, Any]]:
    async with session.post(path, json=body) as answer:
        return answer.status, await answer.json()


async def events(page: aiohttp.ClientWebSocketResponse, seconds: float) -> list[tuple[float, str]]:
    """Our events of the next so many seconds: when they came, and their text."""
    found, end = [], time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        try:
            message = await page.receive(timeout=left)
        except asyncio.TimeoutError:
            break
        if message.type == aiohttp.WSMsgType.TEXT and json.loads(message.data)["type"] == EVENT:
            found.append((time.monotonic(), message.data))
    return found


def test_the_report_is_in_the_history_and_is_made_each_time(host: HeadlessHost) -> None:
    for seed in (1, 2):
        output = host.run(prompt(seed))["outputs"]["report"]
        (report,) = output["weightstream"]
        (entry,) = report["models"]
        assert entry["last_run"]["steps"] == demo.STEPS
        assert entry["name"] in output["text"][0]
    # Nothing is computed anew now; the report is, of what ran before.
    (report,) = host.run(prompt(2))["outputs"]["report"]["weightstream"]
    assert report["models"][0]["counters"] == entry["counters"]


def test_who_asks_gets_events_for_as_long_as_the_lease_lasts(host: HeadlessHost) -> None:
    host.run(prompt(3))

    async def watch() -> None:
        async with aiohttp.ClientSession(host.url) as session, session.ws_connect("/ws?clientId=page") as page:
            assert await events(page, 1.5) == [], "nobody has asked"
            code, answer = await post(session, WATCH, {"client_id": "page"})
            assert code == 200
            got = await events(page, answer["seconds"] + 3)
            assert answer["seconds"] - 4 <= len(got) <= answer["seconds"] + 1
            assert got[-1][0] - got[0][0] <= answer["seconds"] + 0.5, "the lease has ended"
            gaps = [later[0] - earlier[0] for earlier, later in itertools.pairwise(got)]
            assert min(gaps) > 0.9, "at most one a second"
            assert max(len(text) for _, text in got) <= 2048
            event = json.loads(got[-1][1])["data"]
            now = host.get(STATUS)
            names = ("device", "total", "free", "resident", "staging", "torch", "cache", "other", "peak")
            assert [row[:9] for row in event["devices"]] == [
                [device[name] for name in names] for device in now["devices"]
            ]
            assert event["host"][2] == now["host"]["pinned"]

    asyncio.run(watch())


def test_only_an_open_page_gets_a_lease(host: HeadlessHost) -> None:
    async def ask() -> None:
        async with aiohttp.ClientSession(host.url) as session:
            for body in ({"client_id": "nobody"}, {"client_id": 5}, {}, [], "x"):
                code, answer = await post(session, WATCH, body)
                assert (code, answer["error"]) == (400, "client_id must be that of a page that is open")

    asyncio.run(ask())


@pytest.mark.parametrize("what", ["model", "pinned"])
def test_a_model_is_unloaded_by_route(host: HeadlessHost, what: str) -> None:
    expected = demo.sample(host, prompt(4)).latent
    (model,) = host.get(STATUS)["models"]
    freed = host.post(UNLOAD, {"model": model["id"], "what": what})
    (after,) = host.get(STATUS)["models"]
    if what == "model":
        assert freed["freed_device"] == model["device_bytes"] > 0
        assert (after["device_bytes"], after["ladder"]) == (0, "unloaded")
    else:
        assert freed["freed_pinned"] == model["pinned_bytes"] > 0
        assert after["pinned_bytes"] == 0
    host.free()
    assert demo.sample(host, prompt(4)).latent == expected


def test_what_cannot_be_unloaded_says_why(host: HeadlessHost) -> None:
    async def ask(*bodies: Any) -> list[tuple[int, dict[str, Any]]]:
        async with aiohttp.ClientSession(host.url) as session:
            return [await post(session, UNLOAD, body) for body in bodies]

    host.run(prompt(5))
    (model,) = host.get(STATUS)["models"]
    gone, bad, worse = asyncio.run(ask({"model": "999", "what": "model"}, {"model": model["id"], "what": "all"}, 3))
    assert gone[0] == 404
    assert "there is no model '999'" in gone[1]["error"]
    assert bad[0] == worse[0] == 400
    prompt_id = host.submit(prompt(6, steps=3000))
    give_up = time.monotonic() + 60
    while not host.get(STATUS)["models"][0]["running"] and time.monotonic() < give_up:
        time.sleep(0.05)
    [(code, answer)] = asyncio.run(ask({"model": model["id"], "what": "model"}))
    host.interrupt()
    assert (code, answer["error"]) == (409, "a prompt is running; interrupt it, or try again when it is done")
    give_up = time.monotonic() + 60
    while prompt_id not in host.get(f"/history/{prompt_id}") and time.monotonic() < give_up:
        time.sleep(0.05)


def test_the_command_prints_the_status_of_a_server(host: HeadlessHost) -> None:
    host.run(prompt(7))
    table = command("status", "--url", host.url)
    assert table.returncode == 0, table.stderr
    now = host.get(STATUS)
    assert [line.split()[0] for line in table.stdout.splitlines()[:3]] == ["gpu:0", "gpu:1", "RAM"]
    assert now["models"][0]["plan"] in table.stdout
    assert (
        json.loads(command("status", "--json", "--url", host.url).stdout)["models"][0]["id"] == now["models"][0]["id"]
    )


def test_the_command_where_nobody_answers() -> None:
    result = command("status", "--url", "http://127.0.0.1:9")
    assert result.returncode == 2
    assert "http://127.0.0.1:9: no ComfyUI answers" in result.stderr


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "streaming", *arguments]
    return subprocess.run(
        words, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )


def test_a_seed_that_is_no_number_is_refused_as_before(host: HeadlessHost) -> None:
    """A report in a prompt does not keep the host from checking it."""
    with pytest.raises(PromptRejected):
        host.submit(prompt("x"))  # type: ignore[arg-type]
