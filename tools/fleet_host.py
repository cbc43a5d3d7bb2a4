"""A fleet as a user starts it, by the pack's own command line, for tests and benchmarks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

if __package__:
    from .demo import read_status
    from .host import PACK_NAME, HeadlessHost
else:  # For scripts, which put this folder on their path.
    from demo import read_status
    from host import PACK_NAME, HeadlessHost


class FleetHost(HeadlessHost):
    """The ComfyUI in front of a fleet.

    ``workers``: how many; 0 for one for each GPU. ``fleet_arguments``: more of the fleet's command line. ``arguments``
    are for ComfyUI, in front and in workers.
    """

    def __init__(
        self,
        comfyui: str | os.PathLike[str],
        base: str | os.PathLike[str],
        *,
        workers: int = 0,
        fleet_arguments: Sequence[str] = (),
        **options: Any,
    ) -> None:
        super().__init__(comfyui, base, **options)
        self._fleet_arguments = [*("--workers", str(workers)), *fleet_arguments]

    def _command(self) -> list[str]:
        page = () if self.page else ("--front-end-root", os.fspath(self.base / "page"))
        return [
            self.python,
            os.fspath(self.base / "custom_nodes" / PACK_NAME / "fleet"),
            *("--comfyui", os.fspath(self.comfyui), "--port", str(self.port)),
            *self._fleet_arguments,
            "--",
            *("--base-directory", os.fspath(self.base), "--disable-api-nodes", *page),
            *("--database-url", "sqlite:///:memory:"),
            *self.arguments,
        ]

    @property
    def workers(self) -> list[dict[str, Any]]:
        """What the status says of each worker."""
        return read_status(self)["fleet"]["workers"]
