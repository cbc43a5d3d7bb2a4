"""What models hold, and that nothing of it is left."""

from __future__ import annotations

import gc
import time
from typing import Any

import comfy.model_management as mm
from weightstream.nodes.host import devices

# Longer than threads need to see that nobody wants what they read.
SETTLED_SECONDS = 0.6


def held_by_others() -> int:
    """Page-locked bytes, without those of models that earlier tests have left to the garbage collector."""
    gc.collect()
    used, since = devices.pins.used, time.monotonic()
    while time.monotonic() < since + SETTLED_SECONDS:
        time.sleep(0.02)
        if devices.pins.used != used:
            used, since = devices.pins.used, time.monotonic()
    return used


def check_nothing_is_held(memory: Any, before: int) -> None:
    """The models of the test are gone: so is what they held."""
    mm.unload_all_models()
    mm.cleanup_models_gc()
    gc.collect()
    give_up = time.monotonic() + 5
    while devices.pins.used > before and time.monotonic() < give_up:
        time.sleep(0.01)  # Threads that read or build hold memory until they have seen that nobody wants it.
    assert (memory.allocated, devices.pins.used) == (0, before)
