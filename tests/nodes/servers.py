"""Servers that tests start, share, and leave as empty as they were."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools import demo
from tools.host import HeadlessHost

# The demo's models, and a smaller picture: a prompt takes half the time.
TINY = dataclasses.replace(demo.SIZES["tiny"], pixels=64)


@contextlib.contextmanager
def started(folder: Path, virtual: str) -> Iterator[HeadlessHost]:
    """A server with these virtual devices and the demo's models, without a page."""
    environment = {"WEIGHTSTREAM_VIRTUAL": virtual, "CUDA_VISIBLE_DEVICES": ""}
    host = HeadlessHost(os.environ["COMFYUI_PATH"], folder, cpu=True, environ=environment)
    host.prepare()
    demo.write_models(host, TINY)
    with host:
        yield host


def free(host: HeadlessHost) -> dict[str, Any]:
    """Have the host forget what it has loaded and sampled, until no streamed model is left; its status then.

    It would answer a prompt like one before from its cache.
    """
    give_up = time.monotonic() + 30
    while demo.read_status(host)["models"] and time.monotonic() < give_up:
        host.free()
        # A host that is just collecting garbage after a prompt misses what it is told, and must be told again.
        again = time.monotonic() + 3
        while demo.read_status(host)["models"] and time.monotonic() < again:
            time.sleep(0.05)
    status = demo.read_status(host)
    assert status["models"] == []
    return status


class Running:
    """Stands in for :class:`HeadlessHost` in code that would start one like ``host``, which runs already."""

    def __init__(self, host: HeadlessHost) -> None:
        self._host = host

    def __call__(self, comfyui: str | os.PathLike[str], base: Path, **options: Any) -> Running:
        """What is asked for must be what runs."""
        assert Path(comfyui) == self._host.comfyui
        assert options.pop("cpu")
        assert options.pop("environ").items() <= self._host.environ.items()
        assert not options
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    def prepare(self) -> None:
        """All is in its place."""

    def __enter__(self) -> HeadlessHost:
        return self._host

    def __exit__(self, *_: object) -> None:
        """Others use it too."""
