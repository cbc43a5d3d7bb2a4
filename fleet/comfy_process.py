"""One ComfyUI on a port of the loopback interface."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from .child import Child
from .errors import WorkerStartError


class ComfyProcess(Child):
    """ComfyUI's ``main.py``, as a child. It does not answer yet when :meth:`start` returns."""

    def __init__(
        self, python: str, main: Path, arguments: Sequence[str], environ: Mapping[str, str], log: Path, folder: str
    ) -> None:
        super().__init__(python, main, environ, log, folder)
        self._main = main
        self._arguments = arguments
        self.port = 0

    def start(self, arguments: Sequence[str] = ()) -> None:
        if not self._main.is_file():
            raise WorkerStartError(f"there is no ComfyUI at {self._main} on {socket.gethostname()}")
        self.port = free_port()
        listen = ("--listen", "127.0.0.1", "--port", str(self.port))
        super().start([*self._arguments, *arguments, *listen])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
