"""What a step of a model that is split over GPUs would take if they computed at the same time (docs/parallel.md).

Pure: everything comes in as values.

[Note: what is compared]
Split, GPUs compute one after the other, and each brings over its link what it lacks of its own blocks. In parallel each
computes a part of a step, and brings what it lacks of the whole model. So that is faster where compute is the limit,
and slower where links are. What a step took is measured; what it would take is not, and so has to be clearly less. Not
counted is that ComfyUI launches the kernels of all GPUs, which may take longer than they compute (docs/parallel.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...streaming.estimating.estimate import known_number

# What a GPU computes of a step besides its part: two H200 take 0.553 of one's time (FLUX at 2048^2, docs/parallel.md).
BESIDES = 0.053
# Of what a step takes now; what is no clearer is not worth a word.
WORTH = 0.85


@dataclass(frozen=True)
class Gpu:
    """One of the GPUs of a split model.

    Attributes:
        room: bytes of its memory for weights.
        rate: bytes per second that come to it; None where nothing was measured.
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


def seconds_together(weights: float, shrunk: float, compute: float | None, gpus: Sequence[Gpu]) -> float | None:
    """Return the seconds of a step in which ``gpus`` compute at the same time; None where too little is known.

    Args:
        weights: bytes of the model.
        shrunk: which part of the bytes of a weight crosses a link: less than 1 where they are packed.
        compute: seconds of a step on one of them, everything resident.
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
    return max(computed * (1 / len(gpus) + BESIDES), copied)
