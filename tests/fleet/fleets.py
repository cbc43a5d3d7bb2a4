"""Fleets that tests start, with virtual devices for GPUs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from servers import TINY

from tools import demo
from tools.fleet_host import FleetHost

DEVICE = "1x24MB"


def make_fleet(folder: Path, workers: int, **options: Any) -> FleetHost:
    """A fleet with the demo's models, which does not run yet."""
    # Ray gives out as many GPUs as it is told, if this does not say that there are none.
    environ = {"WEIGHTSTREAM_VIRTUAL": DEVICE, "CUDA_VISIBLE_DEVICES": None}
    host = FleetHost(os.environ["COMFYUI_PATH"], folder, cpu=True, workers=workers, environ=environ, **options)
    host.prepare()
    demo.write_models(host, TINY)
    return host


@contextlib.contextmanager
def fleet(folder: Path, workers: int, **options: Any) -> Iterator[FleetHost]:
    """A fleet with the demo's models."""
    with make_fleet(folder, workers, **options) as host:
        yield host
