"""What the pack registers with ComfyUI."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .fleet.front import install_front
from .gpu_placement import GpuPlacement
from .host import contracts, devices
from .loader import StreamedModelLoader
from .page import routes
from .page.status import own_status
from .report import StreamingReport
from .settings import AsyncOffloadSettings


class WeightStreamExtension(ComfyExtension):
    """The nodes of the pack."""

    async def on_load(self) -> None:
        contracts.announce_host()
        devices.read_environment()
        front = install_front()
        routes.add_routes(front.status.opened if front is not None else own_status)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [StreamedModelLoader, AsyncOffloadSettings, GpuPlacement, StreamingReport]
