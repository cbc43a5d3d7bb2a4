"""Fleets that tests start as a user does, by ``python -m fleet``, with virtual devices for GPUs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from servers import TINY

from tools import demo
from tools.host import PACK_NAME, HeadlessHost

DEVICE = "1x24MB"


class FleetHost(HeadlessHost):
    """The ComfyUI in front of a fleet.

    ``workers``: how many; ``fleet_arguments``: more of the command line.
    """

    def __init__(self, base: Path, workers: int, fleet_arguments: Sequence[str] = (), **options: Any) -> None:
        # Ray gives out as many GPUs as it is told, if this does not say that there are none.
        environ = {"WEIGHTSTREAM_VIRTUAL": DEVICE, "CUDA_VISIBLE_DEVICES": None}
        super().__init__(os.environ["COMFYUI_PATH"], base, environ={**environ, **options.pop("environ", {})}, **options)
        self._fleet_arguments = [*("--workers", str(workers)), *fleet_arguments]

    def _command(self) -> list[str]:
        page = () if self.page else ("--front-end-root", os.fspath(self.base / "page"))
        return [
            self.python,
            os.fspath(self.base / "custom_nodes" / PACK_NAME / "fleet"),
            *("--comfyui", os.fspath(self.comfyui), "--port", str(self.port)),
            *self._fleet_arguments,
            "--",
            *("--base-directory", os.fspath(self.base), "--cpu", "--disable-api-nodes", *page),
            *("--database-url", "sqlite:///:memory:"),
            *self.arguments,
        ]

    @property
    def fleet(self) -> dict[str, Any]:
        """What the status says of the workers."""
        return demo.read_status(self)["fleet"]

    def worker_pids(self) -> list[int]:
        """The processes of the workers' ComfyUIs."""
        return sorted(worker["pid"] for worker in self.fleet["workers"] if worker["pid"] is not None)


@contextlib.contextmanager
def fleet(folder: Path, workers: int, **options: Any) -> Iterator[FleetHost]:
    """A fleet with the demo's models."""
    host = FleetHost(folder, workers, **options)
    host.prepare()
    demo.write_models(host, TINY)
    with host:
        yield host
