"""In ComfyUI, with a model in bfloat16 that streams packed: pictures are those that come without packing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import comfy.hooks
import comfy.model_management
import pytest
import torch
from in_half import LoadInHalf
from sampling import sample, sample_with_hook, with_lora
from weightstream.streaming.config import PackingMode

# Strength of the LoRA, and how hooks come, where there are some.
Prompt = tuple[float, comfy.hooks.EnumHookMode | None]


def pictures(model: Any, prompts: Iterable[Prompt]) -> Iterator[torch.Tensor]:
    models = {0.0: model} | {strength: with_lora(model, strength) for strength in (0.7, 0.4)}
    for strength, mode in prompts:
        yield sample(models[strength]) if mode is None else sample_with_hook(models[strength], mode)


def test_hooks_and_loras_in_turn(streamed_in_half: LoadInHalf) -> None:
    plain, strong = (0.0, None), (0.7, None)
    prompts: list[Prompt] = [plain, strong, strong]
    for mode in comfy.hooks.EnumHookMode:
        prompts += [(0.0, mode), plain, (0.4, mode), strong]
    each = list(dict.fromkeys(prompts))
    expected = dict(zip(each, pictures(streamed_in_half(PackingMode.OFF), each), strict=True))
    model = streamed_in_half(PackingMode.ON)
    for prompt, found in zip(prompts, pictures(model, prompts), strict=True):
        assert torch.equal(found, expected[prompt]), prompt
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
