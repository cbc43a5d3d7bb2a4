"""Prompts with guidance through the host's own nodes, and the comparison of a streamed MODEL with the host's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from sampling import SIDE, TOKENS

import nodes as host_nodes

Conditioning = list[list[Any]]
Change = Callable[[Any], Any]
Run = Callable[[Any], torch.Tensor]

# Of "Async Offload Settings", as the node has them at first.
SETTINGS: dict[str, Any] = {
    "mode": "auto",
    "copy_streams": 0,
    "prefetch_depth": 0,
    "vram_limit_gb": 0.0,
    "pin_memory": "auto",
    "pinned_limit_gb": 0.0,
    "reserve_vram_gb": 0.0,
    "packing": "auto",
}


def output(result: Any) -> Any:
    """A node's first output: a V3 node gives its outputs in a NodeOutput, an older one in a tuple."""
    return (result.args if hasattr(result, "args") else result)[0]


def conditioning(seed: int, tokens: int = TOKENS) -> Conditioning:
    """What a text encoder would give, made of random numbers."""
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(1, tokens, 768, generator=generator)
    return [[context, {"pooled_output": torch.randn(1, 768, generator=generator)}]]


def latent(side: int = SIDE, batch: int = 1) -> dict[str, torch.Tensor]:
    return {"samples": torch.zeros(batch, 16, side, side)}


def guided(
    model: Any,
    steps: int = 3,
    sampler: str = "euler",
    positive: Conditioning | None = None,
    negative: Conditioning | None = None,
    image: dict[str, torch.Tensor] | None = None,
    cfg: float = 2.5,
) -> torch.Tensor:
    """Latents by the host's KSampler for two different prompts, so that both are computed."""
    with torch.inference_mode():
        result = host_nodes.common_ksampler(
            model,
            7,
            steps,
            cfg,
            sampler,
            "simple",
            positive or conditioning(1),
            negative or conditioning(2),
            image or latent(),
        )
    return result[0]["samples"]


@functools.cache
def unchanged(native: Any, run: Run) -> torch.Tensor:
    """What the host's own MODEL gives without a change: computed once for all tests that run it in the same way."""
    return run(native)


def check_same(model: Any, native: Any, change: Change, run: Run = guided) -> None:
    """``change``, a node's work on a MODEL, alters the latents, and the same way whether the model is streamed or not.

    The streamed model really streams, also with the change, and its clone without it is not affected.
    """
    with torch.inference_mode():
        theirs, ours = change(native), change(model)
    plain, expected = unchanged(native, run), run(theirs)
    assert not torch.equal(plain, expected), "the node changes nothing here, so this would show nothing"
    check_streams(lambda: run(ours), model, expected)
    check_streams(lambda: run(model), model, plain)


def check_streams(run: Callable[[], torch.Tensor], model: Any, expected: torch.Tensor) -> None:
    """``run`` gives what is expected, and ``model`` streams meanwhile."""
    before = model.status()["counters"]["streamed_bytes"]
    result = run()
    assert torch.isfinite(expected).all()
    assert torch.equal(result, expected)
    assert model.status()["counters"]["streamed_bytes"] > before
