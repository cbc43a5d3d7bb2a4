"""One MODEL over several devices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from comfy.model_patcher import ModelPatcher

from ..streaming import UnsupportedModelError


def split_over(
    model: ModelPatcher,
    devices: Sequence[torch.device],
    split: str,
    ratio: Sequence[float] | None,
    node_id: str | None,
) -> ModelPatcher:
    """A MODEL like ``model`` whose blocks lie on ``devices``, the preferred one first.

    Args:
        model: what came in.
        devices: two or more.
        split: ``auto``, ``equal`` or ``ratio``.
        ratio: the part of each device, where the user has said so.
        node_id: of the node that asks.

    Raises:
        UnsupportedModelError: it cannot be split; the message says why.
    """
    raise UnsupportedModelError("blocks of one model are not spread over several GPUs yet")
