"""``dev.py serve``: the page's address, what the page finds there, and an end that leaves nothing running."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tools import serve
from tools.examples import EXAMPLES
from tools.serve import DEMO, SAVED, TEMPLATE
from tools.workflow import Workflow, choices, inputs_of

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 180
# The host is on this machine: a proxy from the environment must not get these requests.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


# Who runs these tests in the background may have Ctrl-C ignored, and a program's children inherit that.
WITH_CTRL_C = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


class Server:
    """``dev.py serve`` in a process group of its own, as a terminal would start it."""

    def __init__(self, *arguments: str) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-c", WITH_CTRL_C, str(ROOT / "dev.py"), "serve", *arguments],
            env={**os.environ, "WEIGHTSTREAM_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            start_new_session=os.name != "nt",
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        self._said = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as out:
            for line in out:
                self.lines.append(line)
                if "Ctrl-C ends it" in line:
                    self._said.set()
        self._said.set()

    def address(self) -> str:
        """Of the page, once the server says it."""
        assert self._said.wait(WAIT_S)
        [found] = re.findall(r"^  page +(\S+)$", "".join(self.lines), re.MULTILINE) or ["nothing"]
        assert found.startswith("http://"), "".join(self.lines)
        return found

    def interrupt(self) -> int:
        """What Ctrl-C does: the terminal tells the whole group."""
        if os.name == "nt":
            self.process.send_signal(signal.CTRL_BREAK_EVENT)
        else:
            os.killpg(self.process.pid, signal.SIGINT)
        code = self.process.wait(60)
        self._reader.join(10)
        return code


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server("--folder", str(tmp_path), "--", "--preview-method", "none")
    yield server
    if server.process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            server.interrupt()


def get(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with OPENER.open(request, timeout=30) as answer:
        return json.load(answer)


def finished(url: str, prompt_id: str) -> dict[str, Any]:
    """The history of a prompt, once it is complete."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if entry := get(f"{url}/history/{prompt_id}").get(prompt_id):
            return entry
        time.sleep(0.1)
    raise AssertionError(f"{prompt_id} did not end")


@pytest.mark.skipif(os.name == "nt", reason="a console is needed to send Ctrl-C to a group there")
def test_a_page_with_a_workflow_that_runs(server: Server, tmp_path: Path) -> None:
    url = server.address()
    info = get(f"{url}/object_info")
    assert "WeightStreamModelLoader" in info

    saved = get(f"{url}/userdata/{urllib.parse.quote('workflows/' + SAVED, safe='')}")
    assert SAVED in get(f"{url}/userdata?dir=workflows")
    assert get(f"{url}/api/workflow_templates/weightstream/{TEMPLATE}.json") == saved
    for node in saved["nodes"]:
        for name, files in file_choices(info.get(node["type"])):
            assert set(node["widgets_values"]) & set(files), (node["type"], name)

    entry = finished(url, get(f"{url}/prompt", {"prompt": as_prompt(DEMO, info)})["prompt_id"])
    assert entry["status"]["status_str"] == "success", entry["status"]
    assert entry["outputs"]["save"]["images"]
    assert "streamed in" in entry["outputs"]["report"]["text"][0]

    listed = get(f"{url}/workflow_templates")["weightstream"]
    assert set(listed) == {TEMPLATE, *(example.name for example in EXAMPLES)}

    assert server.interrupt() == 0
    assert "Traceback" not in "".join(server.lines)
    assert "2 virtual device(s)" in "".join(server.lines)
    assert "Starting server" in "".join(server.lines), "the host's log is passed on"
    with pytest.raises(OSError, match="refused"):
        get(f"{url}/object_info")


def test_a_port_that_is_taken_is_said_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COMFYUI_PATH")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert serve.main(["--folder", str(tmp_path / "folder"), "--port", str(port)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"serve: port {port} cannot be used (")
    assert "--port" in said.err
    assert (said.out, list(tmp_path.iterdir())) == ("", [])


def as_prompt(workflow: Workflow, info: dict[str, Any]) -> dict[str, Any]:
    """The same workflow for the host's API."""
    prompt = {}
    for name, node in workflow.nodes.items():
        inputs = {item: default for item, default in defaults(info[node.kind]) if default is not None}
        links = {item: [source, place] for item, (source, place) in node.links.items()}
        prompt[name] = {"class_type": node.kind, "inputs": {**inputs, **node.values, **links}}
    return prompt


def defaults(info: dict[str, Any]) -> list[tuple[str, Any]]:
    found = []
    for name, (kind, options) in inputs_of(info).items():
        offered = choices(kind, options)
        found.append((name, options.get("default", offered[0] if offered else None)))
    return found


def file_choices(info: dict[str, Any] | None) -> list[tuple[str, list[str]]]:
    """The inputs of a node that name a file of models, with the files that are there."""
    found = []
    for name, spec in (info or {}).get("input", {}).get("required", {}).items():
        if name in ("unet_name", "clip_name", "lora_name", "vae_name"):
            found.append((name, spec[0] if isinstance(spec[0], list) else spec[1]["options"]))
    return found
