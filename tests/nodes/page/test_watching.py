"""Routes and events in a real ComfyUI server, as a page uses them."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from servers import TINY, free
from weightstream import streaming
from weightstream.streaming.command_line import main

from tools import demo
from tools.host import HeadlessHost, PromptFailed, PromptInterrupted, PromptRejected

NAMES = ("status", "watch", "unload", "timeline", "steps")
STATUS, WATCH, UNLOAD, TIMELINE, STEPS = (f"/weightstream/v1/{name}" for name in NAMES)
EVENT = "weightstream.status"
ROOT = Path(streaming.__file__).parent.parent


@pytest.fixture(scope="module")
def host(two_gpus: HeadlessHost) -> HeadlessHost:
    free(two_gpus)
    return two_gpus


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


async def events(page: aiohttp.ClientWebSocketResponse, seconds: float) -> list[str]:
    """The texts of our events of the next so many seconds."""
    found, end = [], time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        try:
            message = await page.receive(timeout=left)
        except asyncio.TimeoutError:
            break
        if message.type == aiohttp.WSMsgType.TEXT and json.loads(message.data)["type"] == EVENT:
            found.append(message.data)
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
            got = await events(page, answer["seconds"])
            assert len(got) >= 2
            assert max(map(len, got)) <= 2048
            # The last one may have been on its way.
            await events(page, 2.5)
            assert await events(page, 3) == [], "the lease has ended"
            event = json.loads(got[-1])["data"]
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
    free(host)
    assert demo.sample(host, prompt(4)).latent == expected


def test_what_cannot_be_unloaded_says_why(host: HeadlessHost) -> None:
    async def ask(*bodies: Any) -> list[tuple[int, dict[str, Any]]]:
        async with aiohttp.ClientSession(host.url) as session:
            return [await post(session, UNLOAD, body) for body in bodies]

    host.run(prompt(5))
    (model,) = host.get(STATUS)["models"]
    gone, bad, worse = asyncio.run(ask({"model": "999", "what": "model"}, {"model": model["id"], "what": "all"}, 3))
    assert gone[0] == 404
    assert "there is no model 999" in gone[1]["error"]
    assert bad[0] == worse[0] == 400
    prompt_id = host.submit(prompt(6, steps=3000))
    give_up = time.monotonic() + 60
    steps = model["counters"]["steps"]
    while host.get(STATUS)["models"][0]["counters"]["steps"] == steps:
        assert time.monotonic() < give_up, "the prompt does not run"
        time.sleep(0.05)
    [(code, answer)] = asyncio.run(ask({"model": model["id"], "what": "model"}))
    host.interrupt()
    assert (code, answer["error"]) == (409, "a prompt is running; interrupt it, or try again when it is done")
    with pytest.raises(PromptInterrupted):
        host.wait(prompt_id, timeout_s=60)


def test_the_command_prints_the_status_of_a_server(host: HeadlessHost, capsys: pytest.CaptureFixture[str]) -> None:
    host.run(prompt(7))
    assert main(["status", "--url", host.url]) == 0
    table = capsys.readouterr().out
    now = host.get(STATUS)
    assert [line.split()[0] for line in table.splitlines()[:3]] == ["gpu:0", "gpu:1", "RAM"]
    assert now["models"][0]["plan"] in table
    assert main(["status", "--json", "--url", host.url]) == 0
    assert json.loads(capsys.readouterr().out)["models"][0]["id"] == now["models"][0]["id"]


def test_a_damaged_file_is_named_without_its_folder(host: HeadlessHost) -> None:
    """A second load fails, and the node that asked for it passes the MODEL through with the reason."""
    path = host.models("diffusion_models") / "sub" / "bad.safetensors"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((host.models("diffusion_models") / demo.UNET).read_bytes())
    damaged = prompt(8)
    damaged["model"]["inputs"]["unet_name"] = os.path.join("sub", "bad.safetensors")
    host.run(damaged)
    # Another file in its place: the one that is loaded stays whole.
    junk = path.with_suffix(".junk")
    junk.write_bytes(b"no safetensors file at all")
    os.replace(junk, path)
    inputs = {"model": ["model", 0], "devices": "gpu:0,gpu:1"}
    damaged["placement"] = {"class_type": "WeightStreamGPUPlacement", "inputs": inputs}
    damaged["lora"]["inputs"]["model"] = ["placement", 0]
    with contextlib.suppress(PromptFailed):
        host.run(damaged)
    text = json.dumps(host.get(STATUS))
    assert os.path.join("sub", "bad.safetensors") in json.loads(json.dumps(text))
    assert "CheckpointError" in text
    assert str(host.base) not in text
    (notice,) = host.get(STATUS)["notices"]
    assert notice["kind"] == "fallback"
    # The next prompt has no such node.
    host.run(prompt(9))
    assert host.get(STATUS)["notices"] == []


@pytest.mark.parametrize(
    ("body", "headers"),
    [(b'{"a": ' * 100_000, {}), (b"{}", {"Content-Type": "application/json; charset=of-nobody"}), (b"\xff", {})],
)
def test_what_is_no_json_is_refused(host: HeadlessHost, body: bytes, headers: dict[str, str]) -> None:
    before = len(host.log)

    async def ask() -> int:
        async with (
            aiohttp.ClientSession(host.url) as session,
            session.post(UNLOAD, data=body, headers=headers) as answer,
        ):
            return answer.status

    assert asyncio.run(ask()) == 400
    assert "Traceback" not in host.log[before:]


def test_the_command_where_nobody_answers(capsys: pytest.CaptureFixture[str]) -> None:
    """Once as a program, whose status is what a script sees; elsewhere as a call, which need not import torch again."""
    words = [sys.executable, "-m", "streaming", "status", "--url", "127.0.0.1:9"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert "http://127.0.0.1:9: no ComfyUI answers" in result.stderr
    assert main(["status", "--url", "http://127.0.0.1:9"]) == 2
    assert capsys.readouterr().err == result.stderr
    assert main(["status", "--url", "127.0.0.1:port"]) == 2


@pytest.mark.parametrize("answer", [b'{"models": []}', b'{"schema": 2}', b"[1]", b"<html>", b""])
def test_the_command_where_somebody_else_answers(answer: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.handle_request).start()
        assert main(["status", "--url", f"http://127.0.0.1:{server.server_port}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_seed_that_is_no_number_is_refused_as_before(host: HeadlessHost) -> None:
    """A report in a prompt does not keep the host from checking it."""
    with pytest.raises(PromptRejected):
        host.submit(prompt("x"))  # type: ignore[arg-type]


def test_single_steps_are_told_by_route(host: HeadlessHost) -> None:
    host.run(prompt(10, steps=4))
    (model,) = host.get(STATUS)["models"]
    told = host.get(f"{STEPS}?model={model['id']}")
    assert told["runs"][-1]["steps"] == [1, 2, 3, 4]
    (device,) = host.get(f"{TIMELINE}?model={model['id']}")["devices"]
    assert device["compute"]
    assert host.post(TIMELINE, {"model": model["id"]}) == {}
    host.run(prompt(11, steps=2))
    (later,) = host.get(f"{TIMELINE}?model={model['id']}")["devices"]
    assert later["time"] > device["time"]
    file = host.get(f"{TIMELINE}?model={model['id']}&format=chrome")
    assert sum(event["ph"] == "X" and event["cat"] == "compute" for event in file["traceEvents"]) == len(
        later["compute"]
    )

    async def ask() -> list[int]:
        async with aiohttp.ClientSession(host.url) as session:
            codes = [(await post(session, TIMELINE, {"model": "999"}))[0]]
            for path in (TIMELINE, f"{TIMELINE}?model=999", STEPS):
                async with session.get(path) as answer:
                    codes.append(answer.status)
            return codes

    assert asyncio.run(ask()) == [404] * 4
