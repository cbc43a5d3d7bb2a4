"""What was measured of models that have run since ComfyUI started. It outlives them: it predicts their next run.

By the name of a file and the name of a device. The compute of a step is that of the last plan: another size of picture
changes it. What comes over several links, or not from page-locked memory, says nothing of the bus.
"""

from __future__ import annotations

from ...streaming import Snapshot

_compute: dict[tuple[str, str], float] = {}
_bandwidth: dict[str, float] = {}


def keep_measured(name: str, device: str, now: Snapshot) -> None:
    """Keep what is measured of the model ``name`` that runs on ``device`` alone."""
    if now.compute_seconds is not None:
        _compute[name, device] = now.compute_seconds
    streams_well = now.mode == "streamed" and now.streamed_block_bytes > 0 and now.staged_bytes == 0
    if streams_well and now.bandwidth_bytes_per_second is not None:
        _bandwidth[device] = now.bandwidth_bytes_per_second


def measured_compute(name: str, device: str) -> float | None:
    """Seconds of a step with all weights in VRAM; None if that has not run."""
    return _compute.get((name, device))


def measured_bandwidth(device: str) -> float | None:
    """Bytes per second from page-locked memory to the device; None if nothing has streamed there."""
    return _bandwidth.get(device)
