"""MODELs on several GPUs at the same time, as tests make and run them."""

from __future__ import annotations

from typing import Any

import torch
from placing import place
from prompts import conditioning, guided

# Prompts so different in length that the host computes them one by one, on one device too. A CPU's kernels give other
# bits for a batch of two than for batches of one.
LONG = 23


def apart(model: Any, **options: Any) -> torch.Tensor:
    """Latents for two prompts that share no batch."""
    return guided(model, negative=conditioning(2, LONG), **options)


def parallel(model: Any, **inputs: Any) -> Any:
    return place(model, split="parallel", **inputs)[0]


def copies_of(model: Any) -> list[Any]:
    """Its patchers on other GPUs."""
    return model.get_additional_models_with_key("multigpu")


def runs_of(model: Any) -> list[int]:
    """How many steps ran on each device in the last run."""
    return [one.streamer.snapshot().run.counters.steps for one in (model, *copies_of(model))]
