"""Models of 16 bits that stream packed: how they are loaded, and what their plans have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sampling import sample

# A MODEL as its fixture loads it: LoadInHalf(packing, file's name, settings).
LoadInHalf = Callable[..., Any]
Run = Callable[[], torch.Tensor]


def packed_names(model: Any) -> set[str]:
    """Names of the units that stream from a packed copy now."""
    streamer = model.streamer
    assert streamer.plan is not None
    for unit in streamer.plan.packed:
        assert streamer.site.weight_copies.copies(unit).packed is not None
    return {streamer.blocks.units[unit].name for unit in streamer.plan.packed}


def check_packed(model: Any, expected: torch.Tensor, run: Run | None = None, times: int = 2) -> set[str]:
    """Prompts give ``expected``, the last with packed weights from its first step on; returns what was packed."""
    for _ in range(times):
        assert torch.equal(run() if run is not None else sample(model), expected)
    names = packed_names(model)
    assert names
    return names
