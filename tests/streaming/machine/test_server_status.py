"""The status of a fleet: asked with its token, and as text."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from weightstream.streaming.command_line import main
from weightstream.streaming.errors import ServerError
from weightstream.streaming.machine import server_status
from weightstream.streaming.machine.server_status import ROUTE, as_text, ask

from tools.checkpoints import TensorSpec, encode_header

NOW = 1_764_320_000.0
STATUS = {
    "schema": 1,
    "time": NOW,
    "devices": [],
    "why_no_devices": "no worker is up",
    "host": {"ram_available": 8 << 30, "ram_total": 16 << 30, "pinned": 0, "pinned_limit": None},
    "models": [],
    "notices": [],
}


def worker(name: str, state: str, **changes: Any) -> dict[str, Any]:
    idle = {"host": "one", "reason": "", "since": None, "done": 0, "changes": 0, "loaded": []}
    return {"name": name, "state": state, **idle, **changes}


def lines_of(*workers: dict[str, Any], waiting: int = 0, reruns: int = 0) -> list[str]:
    fleet = {"waiting": waiting, "reruns": reruns, "workers": list(workers)}
    return as_text({**STATUS, "fleet": fleet}).splitlines()


def test_a_fleet_has_a_line_and_each_worker_one() -> None:
    running = worker(
        "gpu-0", "running", since=NOW - 12.4, done=41, changes=3, loaded=["a.safetensors", "b.safetensors"]
    )
    lines = lines_of(running, worker("gpu-1", "free", done=1, changes=1), waiting=3, reruns=1)
    assert lines == [
        "fleet  2 workers; 3 prompts waiting; 1 ran again because a worker died",
        "gpu-0: running for 12 s; 41 prompts done, 3 changes of models; loaded: a.safetensors, b.safetensors",
        "gpu-1: free; 1 prompt done, 1 change of models; loaded: no model",
        *as_text(STATUS).splitlines(),
    ]


def test_a_worker_that_does_not_work_says_why() -> None:
    _, restarting, failed, starting, *_ = lines_of(
        worker("gpu-0", "restarting", reason="its process ended (signal 9)"),
        worker("gpu-1", "failed", reason="its ComfyUI did not answer within 600 s"),
        worker("gpu-2", "starting", host=None),
    )
    assert restarting.startswith("gpu-0: started again (its process ended (signal 9)); ")
    assert failed.startswith("gpu-1: cannot be started (its ComfyUI did not answer within 600 s); ")
    assert starting.startswith("gpu-2: starting; ")


def test_the_host_is_said_where_there_are_several() -> None:
    _, first, second, third, *_ = lines_of(
        worker("gpu-0", "free"), worker("gpu-1", "free", host="two"), worker("gpu-2", "starting", host=None)
    )
    assert first.startswith("gpu-0 on one: ")
    assert second.startswith("gpu-1 on two: ")
    assert third.startswith("gpu-2: ")


def test_a_clock_that_was_set_back_makes_no_negative_time() -> None:
    _, line, *_ = lines_of(worker("gpu-0", "running", since=NOW + 5))
    assert line.startswith("gpu-0: running for 0 s; ")


class Guarded(http.server.BaseHTTPRequestHandler):
    """Has the status for those who know the token."""

    def do_GET(self) -> None:
        knows = self.headers.get("Authorization") == "Bearer secret word"
        self.send_response(200 if knows and self.path == ROUTE else 401)
        self.end_headers()
        self.wfile.write(json.dumps(STATUS).encode())

    def log_message(self, *_: object) -> None:
        """Nothing of requests is of interest."""


@pytest.fixture
def guarded() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), Guarded) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("path", ["?token=secret%20word", "/?token=secret+word"])
def test_a_token_in_the_address_is_sent(guarded: str, path: str) -> None:
    assert ask(guarded + path) == STATUS


@pytest.mark.parametrize("path", ["", "/?token=wrong"])
def test_a_token_that_is_missing_or_wrong_is_asked_for_and_never_repeated(guarded: str, path: str) -> None:
    with pytest.raises(ServerError, match=r"it wants a token: give its address with --url .*\?token=TOKEN") as found:
        ask(guarded + path)
    assert "wrong" not in str(found.value)


MODEL = {
    "name": "m",
    "device": "gpu:0",
    "ladder": "pinned",
    "reason": "",
    "running": False,
    "plan": "p",
    "loading": None,
}
ODD = [
    {"schema": 1},
    {**STATUS, "devices": 5},
    {**STATUS, "host": {**STATUS["host"], "ram_available": None}},
    {**STATUS, "models": [{key: value for key, value in MODEL.items() if key != "name"}]},
    {**STATUS, "models": [{**MODEL, "last_run": {"steps": 1, "step_seconds": "a"}}]},
    {**STATUS, "models": "m"},
    {**STATUS, "notices": [None]},
    {**STATUS, "fleet": {"workers": [{}]}},
]


@pytest.mark.parametrize("status", ODD)
def test_a_status_that_is_none_is_an_error_of_the_server(status: dict[str, Any]) -> None:
    with pytest.raises(ServerError, match="the server's status cannot be read"):
        as_text(status)


def test_what_a_server_says_stays_on_its_line() -> None:
    notice = {"name": "m\x1b[2J", "text": "a\nRAM    0 B"}
    assert as_text({**STATUS, "notices": [notice]}).splitlines()[-1] == r"m\x1b[2J: a\nRAM    0 B"


class Odd(http.server.BaseHTTPRequestHandler):
    """Answers whatever its server has as ``body``."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.server.body)  # type: ignore[attr-defined]

    def log_message(self, *_: object) -> None:
        """Nothing of requests is of interest."""


@pytest.fixture
def odd() -> Iterator[http.server.HTTPServer]:
    with http.server.HTTPServer(("127.0.0.1", 0), Odd) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("body", [b"[" * 200_000, b"\xff", b"", b"[]", b"5", b'{"schema": 2}'])
def test_an_answer_that_is_no_status_is_an_error_of_the_server(odd: Any, body: bytes) -> None:
    odd.body = body
    with pytest.raises(ServerError):
        ask(f"127.0.0.1:{odd.server_port}")


@pytest.mark.parametrize("status", [*ODD, {**STATUS, "models": [{**MODEL, "compute_seconds": "a"}]}])
def test_the_commands_bear_a_server_that_says_odd_things(
    odd: Any, status: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    odd.body = json.dumps(status).encode()
    monkeypatch.setattr(server_status, "DEFAULT_URL", f"http://127.0.0.1:{odd.server_port}")
    assert main(["status"]) == 2
    assert "cannot be read" in capsys.readouterr().err
    specs = [TensorSpec(f"blocks.{block}.a.weight", (64, 64), 1.0) for block in range(4)]
    path = tmp_path / "m"
    path.write_bytes(encode_header(specs))
    assert main(["plan", str(path), "--vram", "2.501"]) == 0, "nobody asked for that server"
