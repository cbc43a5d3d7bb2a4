"""Samplers of every kind, and what happens between and inside of prompts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_custom_sampler import (
    BasicGuider,
    BasicScheduler,
    CFGGuider,
    DualCFGGuider,
    KSamplerSelect,
    RandomNoise,
    SamplerCustomAdvanced,
    SamplerSASolver,
)
from comfy_extras.nodes_perpneg import PerpNegGuider
from prompts import check_same, check_streams, conditioning, guided, latent, output
from sampling import MB, MODEL, Patched, sample, with_lora
from weightstream.nodes.loader import load_streamed
from weightstream.streaming import VirtualMemory

Load = Callable[..., Any]

GUIDERS: dict[str, Callable[[Any], Any]] = {
    "BasicGuider": lambda model: BasicGuider.execute(model, conditioning(1)),
    "CFGGuider": lambda model: CFGGuider.execute(model, conditioning(1), conditioning(2), 3.0),
    "DualCFGGuider": lambda model: DualCFGGuider.execute(
        model, conditioning(1), conditioning(2), conditioning(3), 3.0, 2.0, "nested"
    ),
    "PerpNegGuider": lambda model: PerpNegGuider.execute(
        model, conditioning(1), conditioning(2), conditioning(3), 3.0, 0.7
    ),
}


def sample_custom(model: Any, guider: str = "CFGGuider", sampler: Any = None, steps: int = 3) -> torch.Tensor:
    """Latents by the host's SamplerCustomAdvanced and the nodes that it takes its inputs from."""
    with torch.inference_mode():
        return output(
            SamplerCustomAdvanced.execute(
                output(RandomNoise.execute(11)),
                output(GUIDERS[guider](model)),
                sampler or output(KSamplerSelect.execute("euler")),
                output(BasicScheduler.execute(model, "simple", steps, 1.0)),
                latent(),
            )
        )["samples"]


@pytest.mark.parametrize("guider", GUIDERS)
def test_custom_samplers(streamed: Load, native: ModelPatcher, guider: str) -> None:
    run = partial(sample_custom, guider=guider)
    model, expected = streamed(), run(native)
    check_streams(lambda: run(model), model, expected)
    check_same(model, native, partial(with_lora, strength=0.6), run)


# The middle ones call the model several times in a step, the last ones keep what earlier steps gave.
SAMPLERS = [
    "euler_ancestral",
    "heun",
    "dpm_2",
    "dpmpp_2s_ancestral",
    "seeds_2",
    "dpmpp_2m",
    "uni_pc",
    "lcm",
    "res_multistep",
]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers(streamed: Load, native: ModelPatcher, sampler: str) -> None:
    model, expected = streamed(), guided(native, sampler=sampler)
    check_streams(lambda: guided(model, sampler=sampler), model, expected)


def test_a_sampler_that_corrects_itself(streamed: Load, native: ModelPatcher) -> None:
    def run(model: Any) -> torch.Tensor:
        sampler = output(SamplerSASolver.execute(model, 1.0, 0.2, 0.8, 1.0, 3, 4, True, False))
        return sample_custom(model, sampler=sampler, steps=4)

    model = streamed()
    check_streams(lambda: run(model), model, run(native))


def test_positive_and_negative_run_one_by_one(
    streamed: Load, native: ModelPatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the host sees no memory for both at once; in one batch before and after, so that shapes change."""
    model, together = streamed(), guided(native)
    check_streams(lambda: guided(model), model, together)
    before = model.status()["counters"]["steps"]
    with monkeypatch.context() as patch:
        patch.setattr(ModelPatcher, "get_free_memory", lambda self, device: 0)
        patch.setattr(type(model), "get_free_memory", lambda self, device: 0)
        apart = guided(native)
        check_streams(lambda: guided(model), model, apart)
    assert model.status()["counters"]["steps"] - before == 6
    check_streams(lambda: guided(model), model, together)


def test_prompts_of_different_lengths_and_batches(streamed: Load, native: ModelPatcher) -> None:
    """Two prompts of different lengths do not share a batch; images of other sizes are other shapes."""
    model = streamed()
    for tokens, side, batch in ((4, 8, 1), (6, 8, 1), (4, 10, 2), (2, 6, 3), (4, 8, 1)):
        run = partial(guided, negative=conditioning(2, tokens), image=latent(side, batch))
        check_streams(lambda run=run: run(model), model, run(native))


@pytest.mark.parametrize("block", [0, 3, 5])
@pytest.mark.parametrize("patched", [False, True])
def test_an_interrupt_in_a_block(streamed: Load, native: ModelPatcher, block: int, patched: bool) -> None:
    model = with_lora(streamed(), 0.5) if patched else streamed()
    expected = guided(with_lora(native, 0.5) if patched else native)
    diffusion_model = model.model.diffusion_model
    layer = (*diffusion_model.double_blocks, *diffusion_model.single_blocks)[block]
    for _ in range(2):  # In the first step, when weights are on their way, and in a later one.
        handle = layer.register_forward_pre_hook(lambda *_: mm.interrupt_current_processing())
        with pytest.raises(mm.InterruptProcessingException):
            guided(model)
        handle.remove()
        check_streams(lambda: guided(model), model, expected)


def test_two_models_that_do_not_fit_together(
    models: Path, virtual_device: Callable[[int], VirtualMemory], plain: torch.Tensor, plain_with_lora: Patched
) -> None:
    """Prompts of two models, one after another, on a device that has not the room for both."""
    memory = virtual_device(30 * MB)
    with torch.inference_mode():
        first, second = (load_streamed(str(models / MODEL), {}) for _ in range(2))
    assert first.model_size() + second.model_size() > memory.budget
    for _ in range(3):
        check_streams(lambda: sample(first), first, plain)
        assert memory.allocated <= memory.budget
        check_streams(lambda: sample(with_lora(second, 0.7)), second, plain_with_lora(0.7))
        assert memory.allocated <= memory.budget
    assert first.streamer is not second.streamer
