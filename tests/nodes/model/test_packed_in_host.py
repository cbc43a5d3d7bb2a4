"""In ComfyUI, with a model in bfloat16 that streams packed: pictures are those that come without packing."""

from __future__ import annotations

from typing import Any

import comfy.hooks
import comfy.model_management
import pytest
import torch
from in_half import LoadInHalf
from sampling import sample, sample_with_hook, with_lora
from weightstream.streaming.config import PackingMode


@pytest.mark.parametrize("hook_mode", list(comfy.hooks.EnumHookMode))
def test_hooks_and_loras_in_turn(streamed_in_half: LoadInHalf, hook_mode: comfy.hooks.EnumHookMode) -> None:
    def pictures(model: Any) -> list[torch.Tensor]:
        strong, weak = with_lora(model, 0.7), with_lora(model, 0.4)
        plain = [sample(model), sample(strong), sample(strong)]
        return [*plain, sample_with_hook(model, hook_mode), sample(model), sample_with_hook(weak, hook_mode), *plain]

    expected = pictures(streamed_in_half(PackingMode.OFF))
    model = streamed_in_half(PackingMode.ON)
    assert all(map(torch.equal, pictures(model), expected))
    sample(with_lora(model, 0.7))
    assert model.streamer.plan.packed


@pytest.mark.parametrize("steps", [1, 2])
def test_what_a_node_writes_to_a_patched_weight_goes_when_the_model_is_unloaded(
    streamed_in_half: LoadInHalf, steps: int
) -> None:
    """As the host restores its backup; also if the weight was about to be packed."""
    model = with_lora(streamed_in_half(PackingMode.ON), 0.7)
    expected = sample(model, steps=1)
    if steps > 1:
        sample(model, steps=1)
    streamer = model.streamer
    streamed = tuple(f"{streamer.blocks.units[unit].name}.weight" for unit in streamer.plan.streamed)
    name = next(name for name in sorted(model.patches) if name.endswith("qkv.weight") and name.endswith(streamed))
    with torch.inference_mode():
        model.model.get_parameter(name).mul_(3)
        streamer.invalidate()
    for _ in range(2):
        sample(model, steps=3)
    assert streamer.plan.packed
    comfy.model_management.unload_all_models()
    assert torch.equal(sample(model, steps=1), expected)


def test_the_file_that_is_saved_has_the_patches(streamed_in_half: LoadInHalf) -> None:
    """Saving and merging read weights as they were loaded, and patches beside them."""
    plain, packed = (with_lora(streamed_in_half(packing), 0.7) for packing in (PackingMode.OFF, PackingMode.ON))
    for model in (plain, packed):
        for _ in range(2):
            sample(model)
    assert packed.streamer.plan.packed
    for key in plain.patches:
        expected, found = (model.get_key_patches(key)[key][0][0] for model in (plain, packed))
        assert torch.equal(expected.float(), found.float())
