"""What the pack registers with ComfyUI."""

from __future__ import annotations

import os

from comfy_api.latest import ComfyExtension, io

from ..fleet.config import FRONT_VARIABLE
from .gpu_placement import GpuPlacement
from .host import contracts, devices
from .loader import StreamedModelLoader
from .page import routes
from .page.status import StatusSource, own_status
from .report import StreamingReport
from .settings import AsyncOffloadSettings


class WeightStreamExtension(ComfyExtension):
    """The nodes of the pack."""

    async def on_load(self) -> None:
        contracts.announce_host()
        devices.read_environment()
        routes.add_routes(_status_source())

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [StreamedModelLoader, AsyncOffloadSettings, GpuPlacement, StreamingReport]


def _status_source() -> StatusSource:
    """Whose status the routes tell: that of all workers, in front of a fleet, which begins here."""
    if not os.environ.get(FRONT_VARIABLE):
        return own_status
    from .fleet.front import install_front  # For a fleet alone.

    front = install_front()
    return front.status.opened if front is not None else own_status
