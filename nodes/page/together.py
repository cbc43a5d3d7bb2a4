"""What a step of a model that is split over GPUs would take if they computed at the same time (docs/parallel.md).

[Note: what is compared]
Split, GPUs compute one after the other, and each brings over its link what it lacks of its own blocks. In parallel each
computes a part of a step, and brings what it lacks of the whole model; and ComfyUI, one program, launches the kernels
of all. So that is faster where compute is the limit, and slower where links are, or where kernels are launched more
slowly than they run. What a step took is measured; what it would take is not, and so has to be clearly less. Of GPUs of
different kinds nothing is said: each would get as much to compute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...streaming import Snapshot
from ...streaming.estimating.estimate import known_number
from ..host.contracts import why_not_parallel
from ..model.measured import measured_bandwidth
from ..model.objections import objection
from ..model.parts import links
from ..model.streamed_model import StreamedModel
from ..parallel.dividing import why_whole
from .estimating import ASSUMED, rate_of
from .runs import run_that_counts
from .usage import DeviceUsage

# What a GPU computes of a step besides its part: two H200 take 0.553 of one's time (FLUX at 2048^2, docs/parallel.md).
BESIDES = 0.053
# Until the kernels of a block are launched, on one GPU: FLUX at 1024^2 on two H200, 57 blocks, takes 0.205 s a step.
LAUNCH_SECONDS = 0.0018
# As many GPUs compute prompts: the positive and the negative one.
PROMPTS = 2


@dataclass(frozen=True)
class Gpu:
    """One of the GPUs of a split model.

    Attributes:
        room: bytes of its memory for weights.
        rate: bytes per second that come to it; None where neither a measurement nor its link says so.
    """

    room: float
    rate: float | None


@dataclass(frozen=True)
class Together:
    """How the GPUs of a split model might work at the same time.

    Attributes:
        seconds: that a step would take.
        needs_guidance: whether that takes two prompts (``cfg`` above 1), since the tokens of one cannot be divided.
    """

    seconds: float
    needs_guidance: bool


def seconds_together(
    weights: float, shrunk: float, blocks: int, compute: float | None, gpus: Sequence[Gpu], at_once: int
) -> float | None:
    """Return the seconds of a step in which ``gpus`` compute at the same time; None where too little is known.

    Args:
        weights: bytes of the model.
        shrunk: which part of the bytes of a weight crosses a link: less than 1 where they are packed.
        blocks: of the model.
        compute: seconds of a step on one of them, everything resident.
        at_once: how many of them get a part of the work.
    """
    if (computed := known_number(compute)) is None or len(gpus) < 2:
        return None
    copied = 0.0
    rates = [rate for gpu in gpus if (rate := known_number(gpu.rate)) is not None]
    for gpu in gpus:
        if (missing := weights - gpu.room) <= 0:
            continue
        if not rates:
            return None
        # A GPU to which nothing has streamed yet is taken to have the slowest link.
        copied = max(copied, shrunk * missing / (known_number(gpu.rate) or min(rates)))
    return max(computed * (1 / at_once + BESIDES), at_once * blocks * LAUNCH_SECONDS, copied)


def together_of(
    model: StreamedModel, known: Sequence[tuple[StreamedModel, Snapshot]], usage: Mapping[str, DeviceUsage]
) -> Together | None:
    """How the GPUs of a model might work at the same time, whose blocks are given out to them.

    Args:
        known: models with how they stand, all parts of this one among them.
        usage: of devices, by their names.

    Returns:
        None for other parts of a model than the first, where it is not loaded, where that is known not to work, and
        where too little is known.
    """
    parts = [(part, now) for part, now in known if part.number == model.number]
    patcher = model.loaded()
    if model.boundary is None or patcher is None or any(now.mode == "off" for _, now in parts):
        return None
    gpus = [part.gpu for part, _ in parts]
    if objection(model.title) or why_not_parallel() or len({usage[gpu].name for gpu in gpus}) > 1:
        return None
    if any(part.streamer.config.synchronous for part, _ in parts):
        return None  # Then what is copied is no part of what is computed meanwhile.
    needs_guidance = bool(why_whole([patcher], patcher.model_options)) or _are_apart([part for part, _ in parts])
    # Three GPUs compute two prompts with guidance, and a third of the tokens without: which it is, is not known here.
    at_once = PROMPTS if needs_guidance or len(parts) == 3 else len(parts)
    kept = sum(now.resident_bytes + now.rest_bytes for _, now in parts)
    streamed = sum(now.streamed_weight_bytes for _, now in parts)
    copied = sum(now.streamed_block_bytes for _, now in parts)
    seconds = seconds_together(
        kept + streamed,
        copied / streamed if streamed else 1.0,
        sum(now.blocks for _, now in parts),
        _compute_of(model, parts),
        [_gpu_of(part, now, usage[part.gpu]) for part, now in parts],
        at_once,
    )
    return None if seconds is None else Together(seconds, needs_guidance)


def _compute_of(model: StreamedModel, parts: Sequence[tuple[StreamedModel, Snapshot]]) -> float | None:
    """Seconds of a step's compute. Where nothing streams to its first GPU, and so nothing was measured there, that is
    all of a step but the wait of the GPU that waits most."""
    home = next(now for part, now in parts if part is model)
    if home.compute_seconds is not None or (seconds := run_that_counts(home).step_seconds) is None:
        return home.compute_seconds
    return seconds * (1 - max(run_that_counts(now).waiting or 0.0 for _, now in parts))


def _gpu_of(part: StreamedModel, now: Snapshot, device: DeviceUsage) -> Gpu:
    config = part.streamer.config
    free = 0 if config.stream_all else max(0, (device.free or 0) - config.headroom_bytes)
    room = now.device_bytes + free
    rate, source = rate_of(now.bandwidth_bytes_per_second or measured_bandwidth(part.gpu), device.link)
    limit = room if config.vram_limit is None else config.vram_limit
    return Gpu(min(room, limit), None if source == ASSUMED else rate)


def _are_apart(parts: Sequence[StreamedModel]) -> bool:
    """Whether GPUs are known not to reach each other's memory."""
    devices = [part.streamer.backend.device for part in parts]
    return any(links.is_unsound(one, other) for one in devices for other in devices)
