"""A real ComfyUI without a page: started, asked, stopped.

``HeadlessHost`` is what the demo, the tests and the benchmarks talk to. It runs ComfyUI's ``main.py`` with a base
folder of its own, so nothing of the user's models, outputs or settings is read or written.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

PACK_ROOT = Path(__file__).absolute().parent.parent
PACK_NAME = "weightstream"
# What ComfyUI loads of the pack. The rest (tests, benchmarks, tools) stays behind, as in a published one.
PACK_PARTS = ("__init__.py", "pyproject.toml", "fleet", "nodes", "streaming", "web", "locales", "example_workflows")
MODEL_FOLDERS = ("checkpoints", "clip", "controlnet", "diffusion_models", "loras", "text_encoders", "unet", "vae")

POLL_S = 0.05
LOG_TAIL_LINES = 40


class HostError(RuntimeError):
    """The host did not start, died, or did not answer in time."""


class NoAnswer(HostError):
    """The host's process lives, and did not answer this request."""


class PromptRejected(HostError):
    """The host refused a prompt before running it. ``node_errors`` is the host's own account, by node id."""

    def __init__(self, message: str, node_errors: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.node_errors = node_errors


class PromptFailed(HostError):
    """A node raised. ``node_id``, ``node_type`` and ``exception_type`` say which and what."""

    def __init__(self, details: Mapping[str, Any]) -> None:
        self.node_id = str(details.get("node_id"))
        self.node_type = str(details.get("node_type"))
        self.exception_type = str(details.get("exception_type"))
        self.exception_message = str(details.get("exception_message", "")).strip()
        self.traceback = "".join(details.get("traceback", ()))
        super().__init__(f"node {self.node_id} ({self.node_type}): {self.exception_type}: {self.exception_message}")


class PromptInterrupted(HostError):
    """The prompt was interrupted before it was complete."""


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_port(port: int) -> None:
    """Refuse a port on which somebody listens already; 0 stands for any that is free.

    Raises:
        HostError: it is taken, or this user may not have it.
    """
    with socket.socket() as probe:
        if os.name != "nt":  # There it would let two programs have one port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise HostError(f"port {port} cannot be used ({error.strerror}); choose another one with --port") from None


def copy_pack(custom_nodes: Path, source: Path = PACK_ROOT) -> Path:
    """Copy the pack as ComfyUI would find it installed. Copied and not linked: links need rights on Windows."""
    target = custom_nodes / PACK_NAME
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for part in PACK_PARTS:
        if (source / part).is_dir():
            shutil.copytree(source / part, target / part, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        elif (source / part).is_file():
            shutil.copy2(source / part, target / part)
    return target


class HeadlessHost:
    """ComfyUI in a child process, with this pack installed; a context manager.

    ``base`` is the host's base folder (models, outputs, custom nodes) and is kept. ``arguments`` go to ``main.py`` as
    they are; ``environ`` is added to the environment, and a value of None removes a variable. ``page``: serve ComfyUI's
    real page, for a browser. ``port``: where it listens; 0 takes one that is free.
    """

    def __init__(
        self,
        comfyui: str | os.PathLike[str],
        base: str | os.PathLike[str],
        *,
        python: str | os.PathLike[str] = sys.executable,
        cpu: bool = False,
        arguments: Sequence[str] = (),
        environ: Mapping[str, str | None] | None = None,
        pack: bool = True,
        page: bool = False,
        port: int = 0,
        start_timeout_s: float = 180.0,
    ) -> None:
        self.comfyui = Path(comfyui).absolute()
        self.base = Path(base).absolute()
        self.python = os.fspath(python)
        self.arguments = [*(["--cpu"] if cpu else []), *arguments]
        self.environ = dict(environ or {})
        self.pack = pack
        self.page = page
        self.start_timeout_s = start_timeout_s
        self.wanted_port = port
        self.port = port
        self.log_path = self.base / "comfyui.log"
        self._process: subprocess.Popen[bytes] | None = None

    # life cycle

    def __enter__(self) -> HeadlessHost:
        self.prepare()
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def prepare(self) -> None:
        """Make the folders and put the pack in its place. Repeated calls renew the pack's copy and keep the rest."""
        for name in MODEL_FOLDERS:
            self.models(name).mkdir(parents=True, exist_ok=True)
        for name in ("custom_nodes", "input", "output", "temp", "user"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        if not self.page:
            (self.base / "page").mkdir(exist_ok=True)
            (self.base / "page" / "index.html").write_text("<!doctype html><title>headless</title>\n", "utf-8")
        if self.pack:
            copy_pack(self.base / "custom_nodes")

    def start(self) -> None:
        """Start the process and return when it answers."""
        self.port = self.wanted_port or free_port()
        with open(self.log_path, "wb") as log:
            self._process = subprocess.Popen(
                self._command(),
                cwd=self.comfyui,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A group of its own, so that stop() reaches whatever the host started.
                start_new_session=os.name != "nt",
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
        self._wait_until_up()

    def stop(self) -> None:
        """End the process and its children. Does nothing when it is not running."""
        process, self._process = self._process, None
        if process is None:
            return
        _end_group(process, hard=False)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            _end_group(process, hard=True)
            process.wait(10)

    def _command(self) -> list[str]:
        return [
            self.python,
            "-s",
            os.fspath(self.comfyui / "main.py"),
            "--base-directory",
            os.fspath(self.base),
            "--database-url",
            # In memory: a database in the ComfyUI folder would be shared, and locked, by hosts that run at once.
            "sqlite:///:memory:",
            "--listen",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--disable-auto-launch",
            "--disable-api-nodes",
            # Without it ComfyUI needs its page's package, and nobody looks at the page here.
            *(() if self.page else ("--front-end-root", os.fspath(self.base / "page"))),
            *self.arguments,
        ]

    def _environment(self) -> dict[str, str]:
        merged = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", **self.environ}
        return {name: value for name, value in merged.items() if value is not None}

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + self.start_timeout_s
        while True:
            with contextlib.suppress(NoAnswer):
                self.get("/system_stats", timeout_s=5)
                return
            if time.monotonic() > deadline:
                raise HostError(f"ComfyUI did not answer within {self.start_timeout_s:.0f} s\n{self.log_tail()}")
            time.sleep(POLL_S)

    def _check_alive(self) -> None:
        code = None
        if self._process is not None:
            # A connection breaks a moment before its process can be seen to have ended.
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._process.wait(0.1)
        if self._process is None or code is not None:
            raise HostError(f"ComfyUI is not running (exit code {code}); the end of its log:\n{self.log_tail()}")

    # folders and log

    def models(self, kind: str) -> Path:
        """The folder of one kind of model, ``diffusion_models`` for example."""
        return self.base / "models" / kind

    @property
    def output(self) -> Path:
        return self.base / "output"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """Everything that the host has printed so far."""
        return self.log_path.read_text("utf-8", "replace") if self.log_path.exists() else ""

    def log_tail(self, lines: int = LOG_TAIL_LINES) -> str:
        return "\n".join("    " + line for line in self.log.splitlines()[-lines:])

    # requests

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str, timeout_s: float = 30.0) -> Any:
        """The JSON at ``path``."""
        return self._request(path, None, timeout_s)

    def post(self, path: str, body: Mapping[str, Any] | None = None, timeout_s: float = 30.0) -> Any:
        """Post JSON; returns the answer's JSON, or None for an empty answer."""
        return self._request(path, dict(body or {}), timeout_s)

    def _request(self, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with _opener.open(request, timeout=timeout_s) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise _rejection(path, error) from None
        except (OSError, http.client.HTTPException) as error:
            self._check_alive()
            raise NoAnswer(f"{path}: no answer: {error}") from error
        return json.loads(text) if text else None

    def submit(self, prompt: Mapping[str, Any]) -> str:
        """Queue an API prompt and return its id at once. Raises PromptRejected if the host finds it invalid."""
        return self.post("/prompt", {"prompt": prompt})["prompt_id"]

    def wait(self, prompt_id: str, timeout_s: float = 600.0) -> dict[str, Any]:
        """The history entry of a queued prompt, once it is complete."""
        deadline = time.monotonic() + timeout_s
        while True:
            # Without an answer: a host that died has raised by now, one that is busy is asked again.
            with contextlib.suppress(NoAnswer):
                if entry := self.get(f"/history/{prompt_id}").get(prompt_id):
                    return _checked(entry)
            if time.monotonic() > deadline:
                raise HostError(f"prompt {prompt_id} took more than {timeout_s:.0f} s\n{self.log_tail()}")
            time.sleep(POLL_S)

    def run(self, prompt: Mapping[str, Any], timeout_s: float = 600.0) -> dict[str, Any]:
        """Queue an API prompt, wait for it, and return its history entry."""
        return self.wait(self.submit(prompt), timeout_s)

    def interrupt(self) -> None:
        """Interrupt what runs now."""
        self.post("/interrupt")

    def free(self) -> None:
        """What the page's "Free model and node cache" does. The host acts on it soon after this returns."""
        # This flag implies "unload_models". Sent together they race: the host wakes for the first, misses the second.
        self.post("/free", {"free_memory": True})

    def output_file(self, item: Mapping[str, str]) -> Path:
        """The file of one item in a history entry's outputs."""
        return self.output / item.get("subfolder", "") / item["filename"]


# The host is on this machine: a proxy from the environment must not get these requests.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _rejection(path: str, error: urllib.error.HTTPError) -> HostError:
    """An HTTP error as ours; for a refused prompt with every node's own complaint in the text."""
    text = error.read().decode("utf-8", "replace")
    try:
        body = json.loads(text)
    except ValueError:
        body = None
    if not isinstance(body, dict) or "node_errors" not in body:
        return HostError(f"{path}: HTTP {error.code}: {text[:500]}")
    lines = [f"prompt refused: {_complaint(body.get('error'))}"]
    for node_id, node in (body["node_errors"] or {}).items():
        lines += [f"node {node_id} ({node.get('class_type')}): {_complaint(what)}" for what in node.get("errors", ())]
    return PromptRejected("\n".join(lines), body["node_errors"] or {})


def _complaint(what: Any) -> str:
    if not isinstance(what, Mapping):
        return str(what)
    return ": ".join(str(what[key]) for key in ("message", "details") if what.get(key))


def _checked(entry: dict[str, Any]) -> dict[str, Any]:
    """A history entry, or the error that it tells of."""
    for kind, details in entry.get("status", {}).get("messages", ()):
        if kind == "execution_error":
            raise PromptFailed(details)
        if kind == "execution_interrupted":
            raise PromptInterrupted(f"interrupted in node {details.get('node_id')} ({details.get('node_type')})")
    return entry


def _end_group(process: subprocess.Popen[bytes], *, hard: bool) -> None:
    if os.name == "nt":
        # Without /F taskkill only asks windows to close, and the host has none.
        subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True, check=False)
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL if hard else signal.SIGTERM)
