"""A LoRA that hangs on a text encoder and changes with the steps, where weights are moved meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count, pairwise
from typing import Any

import comfy.hooks
import comfy.model_management as mm
import comfy.sd
import pytest
import torch
from comfy_extras.nodes_hooks import CreateHookKeyframe, SetClipHooks, SetHookKeyframes
from moving import Act, home_gives_way, originals_stay, unload_everything
from text_encoders import PROMPTS, random_patches, tokens_of
from weightstream.nodes.model.offload import OffloadSettings
from weightstream.nodes.model.text_encoder import with_patcher
from weightstream.nodes.settings import with_settings
from weightstream.streaming import VirtualMemory

HOOKED, PATCHED = 0.9, 0.4


def with_hooks(clip: comfy.sd.CLIP, patches: dict[str, tuple]) -> comfy.sd.CLIP:
    """``clip`` with patches, and the same as hooks of three strengths."""
    clip = clip.clone()
    clip.add_patches(patches, PATCHED)
    hook, hooks, frames = comfy.hooks.WeightHook(HOOKED, HOOKED), comfy.hooks.HookGroup(), None
    hook.weights_clip, hook.need_weight_init = patches, False
    hooks.add(hook)
    for strength, start in ((1.0, 0.0), (1.7, 0.4), (0.3, 0.8)):
        (frames,) = CreateHookKeyframe().create_hook_keyframe(strength, start, frames)
    (hooks,) = SetHookKeyframes().set_hook_keyframes(hooks, frames)
    return SetClipHooks().apply_hooks(clip, schedule_clip=True, apply_to_conds=True, hooks=hooks)[0]


def encode(clip: comfy.sd.CLIP) -> list[torch.Tensor]:
    """One for each strength."""
    with torch.inference_mode():
        return [found for found, _ in clip.encode_from_tokens_scheduled(tokens_of(clip, PROMPTS[0]))]


@pytest.fixture
def ours(clip: comfy.sd.CLIP, virtual_device: Callable[[int], VirtualMemory]) -> comfy.sd.CLIP:
    virtual_device(clip.patcher.model_size() * 2 // 3)
    with torch.inference_mode():
        return with_patcher(clip, with_settings(clip.patcher, OffloadSettings()))


@pytest.mark.parametrize("act", [unload_everything, home_gives_way])
def test_hooks_and_patches_stay_in_effect(
    clip: comfy.sd.CLIP, ours: comfy.sd.CLIP, monkeypatch: pytest.MonkeyPatch, act: Act
) -> None:
    patches = random_patches(clip)
    expected = encode(with_hooks(clip, patches))
    assert len(expected) == 3
    assert not any(torch.equal(one, other) for one, other in pairwise(expected))
    hooked, calls = with_hooks(ours, patches), count()
    encoder = ours.cond_stage_model
    call = encoder.encode_token_weights

    def encode_and_act(*arguments: Any) -> Any:
        output = call(*arguments)
        if next(calls) in (0, 4):
            act(hooked.patcher)
        return output

    monkeypatch.setattr(encoder, "encode_token_weights", encode_and_act)
    with originals_stay(ours.patcher):
        for _ in range(2):
            found = encode(hooked)
            assert all(map(torch.equal, found, expected))


def test_an_encoder_that_is_called_by_itself_is_loaded_again(clip: comfy.sd.CLIP, ours: comfy.sd.CLIP) -> None:
    patched, tokens = ours.clone(), tokens_of(ours, PROMPTS[0])
    patched.add_patches(random_patches(clip), PATCHED)
    with torch.inference_mode():
        patched.load_model()
        expected = patched.cond_stage_model.encode_token_weights(tokens)[0]
        mm.unload_all_models()
        assert torch.equal(patched.cond_stage_model.encode_token_weights(tokens)[0], expected)
    assert patched.patcher in [loaded.model for loaded in mm.current_loaded_models]
