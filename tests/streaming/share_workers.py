"""Processes that share master copies (share_worker_program.py), and the broker that they share them through."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from weightstream.streaming.sharing.broker import Broker
from weightstream.streaming.sharing.pages import why_not_here
from weightstream.streaming.sharing.share import ask_status

LINUX = pytest.mark.skipif(why_not_here() is not None, reason="no sealed memory files here")
ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("share_worker_program.py")
# Many times what anything here takes.
WAIT_SECONDS = 60


def an_address() -> str:
    """One that nobody else has."""
    return f"@weightstream-test-{uuid.uuid4().hex}"


@contextmanager
def brokered(**settings: Any) -> Iterator[Broker]:
    """A broker that runs meanwhile, on a thread; it keeps nothing of what it was given."""
    broker = Broker(an_address(), **settings)
    thread = threading.Thread(target=broker.run, name="broker")
    thread.start()
    try:
        yield broker
    finally:
        broker.stop()
        thread.join(WAIT_SECONDS)
    assert not thread.is_alive()
    assert memory_files() == 0


def open_descriptors(process: int | str = "self") -> set[str]:
    """What memory files and sockets a process has open."""
    found = set()
    for entry in Path(f"/proc/{process}/fd").iterdir():
        try:
            target = os.readlink(entry)
        except OSError:
            continue  # It was closed meanwhile.
        if target.startswith(("/memfd:weightstream", "socket:")):
            found.add(f"{entry.name} {target}")
    return found


def memory_files(process: int | str = "self") -> int:
    """How many memory files of ours a process has open."""
    return sum("/memfd:weightstream" in one for one in open_descriptors(process))


def shared_spans() -> list[tuple[int, int]]:
    """Where shared memory is mapped, which is read-only."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "/memfd:weightstream" in line]
    assert {line[1] for line in lines} <= {"r--s", "rw-p"}, "what can be written to is private"
    spans = [line[0].split("-") for line in lines if line[1] == "r--s"]
    return [(int(begin, 16), int(end, 16)) for begin, end in spans]


class Worker:
    """A process that streams the model of a folder.

    Args:
        folder: of the model's file.
        address: of the broker; None shares nothing.
    """

    def __init__(self, folder: Path, address: str | None) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "WEIGHTSTREAM_SHARE"}
        if address is not None:
            environment["WEIGHTSTREAM_SHARE"] = address
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), str(ROOT), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def tell(self, name: str, **arguments: Any) -> None:
        """Have it do something, without waiting for it."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([name, arguments]) + "\n")
        self.process.stdin.flush()

    def hear(self) -> Any:
        """What it says next."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the worker has ended with {self.process.wait(WAIT_SECONDS)}"
        return json.loads(line)

    def ask(self, name: str, **arguments: Any) -> Any:
        self.tell(name, **arguments)
        return self.hear()

    def start(self, strengths: dict[str, float] | None = None, steps: int = 3, **settings: Any) -> list[str]:
        """Open and load the model, and run steps; returns what they give."""
        self.ask("open", **settings)
        self.ask("load", strengths=strengths)
        return self.ask("run", steps=steps)

    def kill(self) -> None:
        self.process.kill()
        self.end()

    def end(self) -> None:
        """Let it end, and wait for that."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(WAIT_SECONDS)


def fill_memory(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The system has no more memory for a copy once, after so many pieces that were written."""
    own, count = os.pwrite, itertools.count()

    def write(*arguments: Any) -> int:
        if next(count) == after:
            raise OSError(28, "No space left on device")
        return own(*arguments)

    monkeypatch.setattr(os, "pwrite", write)


def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds that another process brings about."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not holds():
        assert time.monotonic() < deadline, "it does not come about"
        time.sleep(0.002)


def status_of(broker: Broker) -> dict[str, Any]:
    return ask_status(broker.address)
