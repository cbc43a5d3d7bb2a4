"""A Python program in a process of its own, which ends with the process that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from .config import FRONT_VARIABLE
from .errors import WorkerStartError

# Runs a script that ends when standard input does. A thread that reads is the one way that works on all systems.
WATCHED = """
import os, runpy, sys, threading

def end():
    while os.read(0, 1024):
        pass
    os._exit(0)

threading.Thread(target=end, name="weightstream-fleet-end", daemon=True).start()
del sys.argv[0]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
LOG_TAIL_LINES = 15
END_SECONDS = 10.0


class Child:
    """A script, or a folder with a ``__main__.py``.

    Its standard input is a pipe that nothing is written to. It closes with this process, however that ends, and so does
    the child: none is left over to hold a GPU.

    Args:
        python: the interpreter.
        script: what it runs.
        environ: added to the environment.
        log: the file that its output is added to.
        folder: where it runs, for relative paths; the script's, if it is not there.
    """

    def __init__(self, python: str, script: Path, environ: Mapping[str, str], log: Path, folder: str = "") -> None:
        inherited = {name: value for name, value in os.environ.items() if name != FRONT_VARIABLE}
        self._python = python
        self._script = script
        self._environ = {**inherited, **environ, "PYTHONUNBUFFERED": "1"}
        self._log = log
        self._folder = folder if os.path.isdir(folder) else os.fspath(script.parent)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, arguments: Sequence[str]) -> None:
        """Start it with these arguments.

        Raises:
            WorkerStartError: there is no such program.
        """
        self._log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(self._log, "ab") as log:
                self._process = subprocess.Popen(
                    [self._python, "-s", "-c", WATCHED, os.fspath(self._script), *arguments],
                    cwd=self._folder,
                    env=self._environ,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=os.name != "nt",
                )
        except OSError as error:
            raise WorkerStartError(f"{self._python} cannot be run: {error}") from error

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def why_ended(self) -> str | None:
        """How it ended, with the end of its log; None while it runs."""
        if self._process is None:
            return "it was not started"
        code = self._process.poll()
        if code is None:
            return None
        ending = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"its process ended ({ending})\nthe end of {self._log}:\n{self._tail()}"

    def stop(self) -> None:
        """End it; at once where it does not end by itself. Does nothing where it does not run."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        deadline = time.monotonic() + END_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if process.poll() is None:
            _kill(process)
            process.wait()

    def _tail(self) -> str:
        lines = self._log.read_text("utf-8", "replace").splitlines() if self._log.exists() else []
        return "\n".join(lines[-LOG_TAIL_LINES:])


def _kill(process: subprocess.Popen[bytes]) -> None:
    if os.name == "nt":
        process.kill()
    else:  # With all that it has started.
        os.killpg(process.pid, signal.SIGKILL)
