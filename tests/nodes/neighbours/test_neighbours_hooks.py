"""LoRA that hangs on the conditioning and changes while sampling, made by the host's hook nodes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.hooks
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_hooks import (
    CombineHooks,
    ConditioningSetDefaultAndCombine,
    ConditioningSetProperties,
    CreateHookKeyframe,
    CreateHookKeyframesInterpolated,
    CreateHookLoraModelOnly,
    SetHookKeyframes,
)
from prompts import check_streams, conditioning, guided
from sampling import LORA, MB, SIDE, with_lora

Load = Callable[..., Any]
Hooks = comfy.hooks.HookGroup


def lora_hooks(strength: float) -> Hooks:
    return CreateHookLoraModelOnly().create_hook_model_only(LORA, strength)[0]


def with_keyframes() -> Hooks:
    """On at first, then stronger, then off."""
    frames = None
    for strength, start in ((1.0, 0.0), (1.6, 0.4), (0.0, 0.8)):
        (frames,) = CreateHookKeyframe().create_hook_keyframe(strength, start, frames)
    return SetHookKeyframes().set_hook_keyframes(lora_hooks(0.7), frames)[0]


def interpolated() -> Hooks:
    (frames,) = CreateHookKeyframesInterpolated().create_hook_keyframes(0.1, 1.4, "linear", 0.0, 1.0, 5)
    return SetHookKeyframes().set_hook_keyframes(lora_hooks(0.9), frames)[0]


def two_at_once() -> Hooks:
    return CombineHooks().combine_hooks(with_keyframes(), lora_hooks(-0.3))[0]


HOOKS = {"interpolated": interpolated, "two": two_at_once}


def hooked(model: Any, make: Callable[[], Hooks], mode: comfy.hooks.EnumHookMode) -> torch.Tensor:
    model = model.clone()
    model.hook_mode = mode
    (positive,) = ConditioningSetProperties().set_properties(conditioning(1), 1.0, "default", hooks=make())
    return guided(model, steps=4, positive=positive)


@pytest.mark.parametrize("mode", list(comfy.hooks.EnumHookMode))
@pytest.mark.parametrize("hooks", HOOKS)
def test_scheduled_hooks(streamed: Load, native: ModelPatcher, hooks: str, mode: comfy.hooks.EnumHookMode) -> None:
    run = partial(hooked, make=HOOKS[hooks], mode=mode)
    model, plain, expected = streamed(64 * MB, vram_limit=28 * MB), guided(native, steps=4), run(native)
    assert not torch.equal(plain, expected)
    check_streams(lambda: run(model), model, expected)
    check_streams(lambda: run(with_lora(model, 0.4)), model, run(with_lora(native, 0.4)))
    check_streams(lambda: guided(model, steps=4), model, plain)


def test_a_default_prompt_for_where_no_hook_acts(streamed: Load, native: ModelPatcher) -> None:
    def run(model: Any) -> torch.Tensor:
        mask = torch.zeros(1, SIDE, SIDE)
        mask[:, : SIDE // 2] = 1.0
        (half,) = ConditioningSetProperties().set_properties(
            conditioning(1), 1.0, "default", mask=mask, hooks=with_keyframes()
        )
        (both,) = ConditioningSetDefaultAndCombine().set_default_and_combine(half, conditioning(3))
        return guided(model, steps=4, positive=both)

    model, expected = streamed(), run(native)
    assert not torch.equal(expected, guided(native, steps=4))
    check_streams(lambda: run(model), model, expected)
