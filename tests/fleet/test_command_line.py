"""How a fleet is started: what is refused before anything starts, and who may use it."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from weightstream.fleet import command_line
from weightstream.fleet.config import FRONT_VARIABLE, FleetConfig
from weightstream.fleet.errors import FleetConfigError
from weightstream.nodes.fleet.access import guard

ROOT = Path(__file__).resolve().parents[2]
COMFYUI = os.environ.get("COMFYUI_PATH", "")


def run(*arguments: str, module: bool = False) -> subprocess.CompletedProcess[str]:
    program = ["-m", "fleet"] if module else [os.fspath(ROOT / "fleet")]
    return subprocess.run([sys.executable, *program, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("module", [True, False])
def test_it_says_what_it_takes(module: bool) -> None:
    said = run("--help", module=module)
    assert said.returncode == 0
    assert "--workers" in said.stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--comfyui", "/nowhere"], "/nowhere is no folder of ComfyUI"),
        (["--workers", "-1", "--comfyui", COMFYUI], "-1 workers: expected 1 or more"),
        (["--most-waiting", "0", "--comfyui", COMFYUI], "a queue for 0 prompts"),
        (["--silent-minutes", "-1", "--comfyui", COMFYUI], "-1 minutes of silence"),
        (["--silent-minutes", "nan", "--comfyui", COMFYUI], "nan minutes of silence"),
        (["--comfyui", COMFYUI, "--", "--port", "1"], "--port behind --: the fleet sets that itself"),
        (["--comfyui", COMFYUI, "--", "--listen=0.0.0.0"], "--listen behind --"),
        (["--comfyui", COMFYUI, "--", "--disable-all-custom-nodes"], "--disable-all-custom-nodes behind --"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(arguments: list[str], reason: str) -> None:
    said = run(*arguments)
    assert said.returncode == 2
    assert reason in said.stderr


@pytest.fixture
def installed(tmp_path: Path) -> list[str]:
    """ComfyUI's arguments with which it finds this pack."""
    (tmp_path / "custom_nodes").mkdir()
    (tmp_path / "custom_nodes" / "any-name").symlink_to(ROOT, target_is_directory=True)
    return ["--base-directory", os.fspath(tmp_path)]


def test_a_comfyui_that_would_not_load_the_pack_is_refused(tmp_path: Path) -> None:
    """It would start without a fleet, and without a token."""
    (tmp_path / "custom_nodes" / "another").mkdir(parents=True)
    for arguments in ([], ["--base-directory", os.fspath(tmp_path)], [f"--base-directory={tmp_path}"]):
        said = run("--comfyui", COMFYUI, "--port", "0", "--", *arguments)
        assert said.returncode == 2
        assert "does not hold this pack" in said.stderr


def test_an_address_that_is_not_of_this_machine_is_refused(installed: list[str]) -> None:
    said = run("--comfyui", COMFYUI, "--listen", "203.0.113.1", "--", *installed)
    assert said.returncode == 2
    assert "203.0.113.1:8188 cannot be listened on" in said.stderr


def test_a_port_that_is_taken_is_said(installed: list[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = run("--comfyui", COMFYUI, "--port", str(port), "--", *installed)
    assert said.returncode == 2
    assert f"127.0.0.1:{port} cannot be listened on" in said.stderr


def test_without_ray_it_says_what_to_install(tmp_path: Path) -> None:
    """An interpreter that finds no Ray: with the standard library alone."""
    code = "import sys; sys.path[:] = [each for each in sys.path if 'site-packages' not in each]; "
    code += (
        f"sys.path.insert(0, {os.fspath(ROOT)!r}); from fleet.command_line import main; sys.exit(main(sys.argv[1:]))"
    )
    said = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert said.returncode == 2, said.stderr
    assert "pip install" in said.stderr


Config = Callable[..., FleetConfig]


@pytest.fixture
def config(installed: list[str]) -> Config:
    def make(*arguments: str, host: Sequence[str] = ()) -> FleetConfig:
        given = command_line.parser().parse_args(["--comfyui", COMFYUI, "--port", "0", *arguments])
        return command_line.make_config(given, [*installed, *host])

    return make


def test_others_need_a_token_which_is_made_up(config: Config) -> None:
    assert config().token == ""
    assert config("--listen", "127.0.0.1,::1").token == ""
    one, two = config("--listen", "0.0.0.0").token, config("--listen", "0.0.0.0").token
    assert len(one) >= 32
    assert one != two
    assert config("--listen", "0.0.0.0", "--token", "mine").token == "mine"


def test_arguments_reach_whom_they_are_about(config: Config, installed: list[str]) -> None:
    """The front has no GPU, and workers have no page."""
    host = ["--lowvram", "--tls-keyfile", "k.pem", "--tls-certfile=c.pem", "--fast"]
    made = config(host=host)
    assert made.host_arguments == (*installed, "--fast")
    assert made.worker_arguments == ("--lowvram",)
    given = command_line.parser().parse_args(["--port", "0"])
    front = command_line.command(made, given, [*installed, *host])
    assert [each for each in front if "pem" in each] == ["k.pem", "--tls-certfile=c.pem"]
    assert "--lowvram" not in front
    assert "--cpu" in front


def test_settings_come_through_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    given = FleetConfig("/comfy", "python", ("--cpu",), ("--x",), {"A": "b"}, 3, "host:1", 7, 0.5, "t")
    monkeypatch.setenv(FRONT_VARIABLE, given.to_json())
    assert FleetConfig.from_environment() == given
    assert given.silent_seconds == 30
    monkeypatch.delenv(FRONT_VARIABLE)
    assert FleetConfig.from_environment() is None


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"unknown": 1}', '{"comfyui": "x"}', '{"comfyui": 1, "python": 2, "workers": "many"}']
)
def test_settings_that_are_something_else_are_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(FRONT_VARIABLE, text)
    with pytest.raises(FleetConfigError, match=FRONT_VARIABLE):
        FleetConfig.from_environment()


# -- who may use it ----------------------------------------------------------------------------------------------------

TOKEN = "secret-token"


async def ask(token: str, *requests: tuple[str, dict[str, Any]]) -> list[tuple[int, str]]:
    """Status and text of each request, by one client that keeps its cookies."""

    async def hello(request: web.Request) -> web.Response:
        return web.Response(text=f"hello {request.query_string}".strip())

    app = web.Application(middlewares=[guard(FleetConfig("x", "y", token=token))])
    app.router.add_route("*", "/{path:.*}", hello)
    answers = []
    async with TestClient(TestServer(app)) as client:
        for method, options in requests:
            async with client.request(method, options.pop("path", "/"), **options) as answer:
                answers.append((answer.status, await answer.text()))
    return answers


def test_without_a_token_all_may() -> None:
    assert asyncio.run(ask("", ("GET", {}))) == [(200, "hello")]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("GET", {}),
        ("POST", {"path": "/prompt"}),
        ("POST", {"path": f"/prompt?token={TOKEN}"}),
        ("GET", {"headers": {"Authorization": "Bearer wrong"}}),
        ("GET", {"headers": {"Authorization": TOKEN}}),
        ("GET", {"path": "/?token=wrong"}),
        ("GET", {"path": "/?token="}),
        ("GET", {"cookies": {"weightstream_token": "wrong"}}),
        ("GET", {"headers": {"Authorization": "Bearer \u00e9"}}),
    ],
)
def test_who_does_not_know_the_token_may_not(method: str, options: dict[str, Any]) -> None:
    [(status, text)] = asyncio.run(ask(TOKEN, (method, options)))
    assert status == 401
    assert "Bearer TOKEN" in json.loads(text)["error"]


def test_who_knows_the_token_may() -> None:
    program = ("GET", {"headers": {"Authorization": f"Bearer {TOKEN}"}})
    browser = ("GET", {"path": f"/view?filename=a.png&token={TOKEN}"})
    answers = asyncio.run(ask(TOKEN, program, ("GET", {}), browser, ("POST", {"path": "/prompt"})))
    assert [status for status, _ in answers] == [200, 401, 200, 200], "a browser keeps it after its first visit"
    assert answers[2][1] == "hello filename=a.png"


def test_a_websocket_may_have_it_in_its_address() -> None:
    upgrade = {"Upgrade": "websocket", "Connection": "Upgrade"}
    right = ("GET", {"path": f"/ws?token={TOKEN}", "headers": upgrade, "allow_redirects": False})
    wrong = ("GET", {"path": "/ws?token=x", "headers": upgrade, "allow_redirects": False})
    assert [status for status, _ in asyncio.run(ask(TOKEN, right, wrong))] == [200, 401]
