"""MODELs on several GPUs at the same time, as tests make and run them."""

from __future__ import annotations

from typing import Any

import comfy.model_management as mm
import torch
from placing import place
from prompts import conditioning, guided
from weightstream.nodes.model.streamed_model import streamed_models

# Prompts so different in length that the host computes them one by one, on one device too. A CPU's kernels give other
# bits for a batch of two than for batches of one.
LONG = 23
# One that is run both ways, and one that is known.
STEPS = 2


def apart(model: Any, **options: Any) -> torch.Tensor:
    """Latents for two prompts that share no batch."""
    return guided(model, **{"steps": STEPS, "negative": conditioning(2, LONG)} | options)


def parallel(model: Any, **inputs: Any) -> Any:
    return place(model, split="parallel", **inputs)[0]


def copies_of(model: Any) -> list[Any]:
    """Its patchers on other GPUs."""
    return model.get_additional_models_with_key("multigpu")


def close_all() -> None:
    """What GPUs share in this process is freed, before other tests count it."""
    mm.unload_all_models()
    for model in streamed_models():
        if model.beside:
            model.streamer.close()


def runs_of(model: Any) -> list[int]:
    """How many steps ran on each device in the last run."""
    return [one.streamer.snapshot().run.counters.steps for one in (model, *copies_of(model))]
