"""Out of memory in the host's own sampler: the prompt goes on, and its latents are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.hooks
import comfy.utils
import folder_paths
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from sampling import LORA, MB, SIDE, TOKENS, sample, with_lora
from weightstream.nodes.model.patcher import StreamedModelPatcher

import nodes as host_nodes

Load = Callable[..., StreamedModelPatcher]


def sample_with_hooks(model: Any) -> torch.Tensor:
    """As :func:`sampling.sample`, with a LoRA that hangs on the conditioning."""
    lora = comfy.utils.load_torch_file(folder_paths.get_full_path_or_raise("loras", LORA), safe_load=True)
    hooks = comfy.hooks.create_hook_lora(lora=lora, strength_model=1.0, strength_clip=1.0)
    generator = torch.Generator().manual_seed(1)
    extras = {"pooled_output": torch.randn(1, 768, generator=generator), "hooks": hooks}
    conditioning = [[torch.randn(1, TOKENS, 768, generator=generator), extras]]
    latent = {"samples": torch.zeros(1, 16, SIDE, SIDE)}
    with torch.inference_mode():
        result = host_nodes.common_ksampler(model, 3, 4, 1.0, "euler", "simple", conditioning, conditioning, latent)
    return result[0]["samples"]


def fail_in_calls(function: Callable[..., Any], *failing: int) -> Callable[..., Any]:
    """``function``, but out of memory in its first call (0) or others."""
    calls = iter(range(10**6))

    def call(*args: Any) -> Any:
        if next(calls) in failing:
            raise torch.OutOfMemoryError("no room")
        return function(*args)

    return call


@pytest.mark.parametrize("failing", [(1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)])
@pytest.mark.parametrize("run", [sample, sample_with_hooks, lambda model: sample(with_lora(model, 0.7))])
def test_a_step_is_run_again(
    streamed: Load, native: ModelPatcher, run: Callable[[Any], torch.Tensor], failing: tuple[int, ...]
) -> None:
    expected = run(native)
    model = streamed(64 * MB)
    fail = fail_in_calls(lambda *_: None, *failing)
    handle = model.model.diffusion_model.double_blocks[0].register_forward_pre_hook(fail)
    assert torch.equal(run(model), expected)
    handle.remove()
    assert torch.equal(run(model), expected)


def test_hooks_stay_when_a_reload_has_no_room(
    streamed: Load, native: ModelPatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = sample_with_hooks(native)
    model = streamed(64 * MB, vram_limit=28 * MB)
    assert torch.equal(sample_with_hooks(model), expected)
    weights = model.streamer.site.weight_copies
    handle = model.model.diffusion_model.double_blocks[0].register_forward_pre_hook(
        fail_in_calls(lambda *_: None, 1, 2)
    )
    # The first call is the prompt's own load; the second follows the step that failed twice.
    monkeypatch.setattr(weights, "carry_out", fail_in_calls(weights.carry_out, 0))
    assert torch.equal(sample_with_hooks(model), expected)
    handle.remove()


def test_no_room_in_a_load_means_a_smaller_plan(
    streamed: Load, plain: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = streamed(64 * MB)
    weights = model.streamer.site.weight_copies
    monkeypatch.setattr(weights, "carry_out", fail_in_calls(weights.carry_out, 0, 1))
    assert torch.equal(sample(model), plain)


def test_a_step_that_runs_again_has_all_that_a_controlnet_gave(streamed: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models take residuals out of the lists as they use them."""
    model = streamed(64 * MB)
    sample(model)
    seen: list[list[int]] = []

    def apply(x: torch.Tensor, t: Any, c_concat: Any, c_crossattn: Any, control: dict, options: dict) -> torch.Tensor:
        seen.append([control["output"].pop() for _ in range(2)])
        if len(seen) == 1:
            raise torch.OutOfMemoryError("no room")
        return x

    monkeypatch.setattr(model.model, "_apply_model", apply)
    model.model.current_patcher = model
    control = {"output": [1, 2]}
    model.model.apply_model(
        torch.zeros(1), torch.ones(1), control=control, transformer_options={"wrappers": model.wrappers}
    )
    assert seen == [[2, 1], [2, 1]]
