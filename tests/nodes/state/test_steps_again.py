"""A step that is run again gives what it would have given the first time, whatever nodes keep from step to step."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from failing import OUT_OF_MEMORY, failing
from families import FAMILIES
from family_models import build_tiny, whole
from family_models import streamed as stream_family
from placing import Machine, place
from prompts import Change, guided, output
from sampling import MB
from weightstream.nodes.model.patcher import StreamedModelPatcher
from weightstream.nodes.state import step_memory
from weightstream.streaming import StepNotRepeatedError

Load = Callable[..., StreamedModelPatcher]
WRAPPERS = comfy.patcher_extension.WrappersMP

OTHER_DEVICE = RuntimeError("Expected all tensors to be on the same device")


class Residual:
    """A patch that works out something once in a step and uses it up, as the host's patches for Z-Image do."""

    def __init__(self) -> None:
        self.temp_data: tuple[int, torch.Tensor] | None = None
        self.strength = 0.01

    def __call__(self, args: dict[str, Any]) -> dict[str, Any]:
        if self.temp_data is None:
            self.temp_data = (0, args["img"].mean() * self.strength)
        number, value = self.temp_data
        args["img"] += value * (number + 1)
        self.temp_data = (number + 1, value) if number < 2 else None
        self.strength *= 1.1
        return args


def by_residual(model: Any) -> Any:
    model = model.clone()
    model.set_model_patch(Residual(), "double_block")
    return model


def by_counter(model: Any) -> Any:
    model, count = model.clone(), 0

    def patch(args: dict[str, Any]) -> dict[str, Any]:
        nonlocal count
        count += 1
        return {**args, "img": args["img"] * (1 + 0.01 * count)}

    model.set_model_patch(patch, "post_input")
    return model


def by_noise(model: Any) -> Any:
    model = model.clone()
    model.set_model_patch(
        lambda args: {**args, "img": args["img"] + 0.01 * torch.randn_like(args["img"])}, "post_input"
    )
    return model


def by_wrapper(model: Any) -> Any:
    """It mixes in what it has given before, and writes into what it gets."""
    model = model.clone()

    def wrapper(executor: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        x.mul_(1.01)
        found = executor(x, *args, **kwargs)
        if (last := getattr(wrapper, "last", None)) is not None:
            found = 0.9 * found + 0.1 * last
        wrapper.last = found  # type: ignore[attr-defined]
        return found

    model.add_wrapper_with_key(WRAPPERS.DIFFUSION_MODEL, "mixes", wrapper)
    return model


def by_options(model: Any) -> Any:
    """A tensor of the options is written to in each block."""
    model = model.clone()
    model.model_options["transformer_options"]["scale"] = torch.ones(1)

    def patch(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        found = extra["original_block"](args)
        return {**found, "img": found["img"] * args["transformer_options"]["scale"].mul_(1.001)}

    model.set_model_patch_replace(patch, "dit", "double_block", 1)
    return model


def by_exchanged_forward(model: Any) -> Any:
    """A cache that exchanges the model's inner forward and keeps its state on the module."""
    model = model.clone()
    inner = model.model.diffusion_model

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        inner.calls = getattr(inner, "calls", 0) + 1
        return plain(*args, **kwargs) * (1 + 0.01 * inner.calls)

    def prepare(*_: Any) -> None:
        vars(inner).pop("calls", None)

    plain = inner.forward_orig
    model.add_object_patch("diffusion_model.forward_orig", forward)
    model.add_callback_with_key(comfy.patcher_extension.CallbacksMP.ON_PRE_RUN, "counts", prepare)
    return model


STATE: Any = ModuleType("state_of_a_pack")


def by_module(model: Any) -> Any:
    """A pack's variables in a module of their own."""
    model, STATE.count = model.clone(), 0
    sys.modules[STATE.__name__] = STATE

    def patch(args: dict[str, Any]) -> dict[str, Any]:
        STATE.count += 1
        return {**args, "img": args["img"] * (1 + 0.01 * STATE.count)}

    def begin(*_: Any) -> None:
        STATE.count = 0

    model.set_model_patch(patch, "post_input")
    model.add_callback_with_key(comfy.patcher_extension.CallbacksMP.ON_PRE_RUN, "counts", begin)
    return model


def by_table(model: Any) -> Any:
    """A table of models that a pack has seen."""
    model, inner = model.clone(), model.model.diffusion_model
    counts: weakref.WeakKeyDictionary[torch.nn.Module, int] = weakref.WeakKeyDictionary({inner: 0})

    def patch(args: dict[str, Any]) -> dict[str, Any]:
        counts[inner] += 1
        return {**args, "img": args["img"] * (1 + 0.01 * counts[inner])}

    model.set_model_patch(patch, "post_input")
    return model


def by_buffers(model: Any) -> Any:
    """A layer of a pack that counts, and one that keeps statistics."""
    model, layer = model.clone(), torch.nn.BatchNorm1d(256, affine=False).train()
    layer.register_buffer("count", torch.zeros(1))

    def patch(args: dict[str, Any]) -> dict[str, Any]:
        image = args["img"]
        layer.count.add_(1)
        normal = layer(image.float().transpose(1, 2)).transpose(1, 2).to(image)
        return {**args, "img": image + 0.01 * normal * layer.running_mean.to(image) * layer.count.to(image)}

    model.set_model_patch(patch, "post_input")
    return model


CHANGES: dict[str, Change] = {
    "EasyCache": lambda model: output(EasyCacheNode.execute(model, 1.5, 0.1, 0.95, False)),
    "LazyCache": lambda model: output(LazyCacheNode.execute(model, 1.5, 0.1, 0.95, False)),
    "a residual that is used up": by_residual,
    "a counter": by_counter,
    "noise": by_noise,
    "a wrapper that remembers": by_wrapper,
    "a tensor in options": by_options,
    "an inner forward that counts": by_exchanged_forward,
    "a module of a pack": by_module,
    "a table of models": by_table,
    "buffers": by_buffers,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_nodes_that_keep_a_state_see_each_step_once(streamed: Load, native: ModelPatcher, change: Change) -> None:
    check_again(streamed(64 * MB, vram_limit=33 * MB), native, change, failing_calls=(1, 4))


def test_a_weight_that_is_needed_elsewhere_changes_nothing(streamed: Load, native: ModelPatcher) -> None:
    """Blocks stream as a whole from the step on that runs again for it."""
    check_again(streamed(64 * MB, vram_limit=33 * MB), native, by_wrapper, failing_calls=(4,), error=OTHER_DEVICE)


@pytest.mark.parametrize("change", [CHANGES["EasyCache"], by_wrapper], ids=["EasyCache", "a wrapper"])
def test_they_do_so_on_two_devices(streamed: Load, native: ModelPatcher, machine: Machine, change: Change) -> None:
    model = streamed(64 * MB)
    machine(2, 40 * MB)
    model = place(model, split="equal")[0]
    assert len(model.streamers) == 2
    check_again(model, native, change, failing_calls=(1, 4))


def check_again(
    model: StreamedModelPatcher,
    native: ModelPatcher,
    change: Change,
    failing_calls: tuple[int, ...],
    error: Exception = OUT_OF_MEMORY,
) -> None:
    """With ``change`` the latents are those of the host, though a block fails when it is called for so many times."""
    run = partial(guided, steps=5)
    with torch.inference_mode():
        theirs, ours = change(native), change(model)
    expected = run(theirs)
    with failing(model.model.diffusion_model.single_blocks[2], *failing_calls, error=error) as failed:
        assert torch.equal(run(ours), expected)
    assert failed


FAMILY = FAMILIES["WAN21_CausalAR_T2V"]


def sample_frames(model: Any) -> torch.Tensor:
    """Latents of a video, frame by frame: keys and values of the frames before are kept between steps."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn((1, 16, 3, 8, 8), generator=generator)
    conditioning = [[torch.randn((1, 8, 64), generator=generator), {}]]
    sampler = comfy.samplers.ksampler("ar_video", {"num_frame_per_block": 1})
    sigmas = torch.tensor([1.0, 0.7, 0.3, 0.0])
    with torch.inference_mode():
        return comfy.sample.sample_custom(
            model, noise, 1.0, sampler, sigmas, conditioning, conditioning, torch.zeros_like(noise), seed=2
        )


@pytest.fixture
def frames() -> tuple[StreamedModelPatcher, torch.Tensor]:
    """A model that makes videos frame by frame, streamed, with room to give up; and what it should give."""
    model = build_tiny("WAN21_CausalAR_T2V", FAMILY)
    expected = sample_frames(whole(model))
    ours = stream_family("WAN21_CausalAR_T2V", model)
    ours.streamer.backend.store.budget *= 4
    assert torch.equal(sample_frames(ours), expected)
    return ours, expected


@pytest.mark.parametrize("call", [0, 3, 5, 7])
def test_keys_and_values_of_frames_before_are_kept_once(
    frames: tuple[StreamedModelPatcher, torch.Tensor], call: int
) -> None:
    model, expected = frames
    with failing(model.model.diffusion_model.blocks[-1], call) as failed:
        assert torch.equal(sample_frames(model), expected)
    assert failed == [call]


def test_a_step_that_cannot_be_run_again_says_why_and_the_next_prompt_goes_on(
    frames: tuple[StreamedModelPatcher, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values are too large to be copied."""
    model, expected = frames
    monkeypatch.setattr(step_memory, "SMALL_BYTES", 500)
    before = model.streamer.device_bytes
    with (
        failing(model.model.diffusion_model.blocks[-1], 3),
        pytest.raises(StepNotRepeatedError, match=r"transformer_options\['ar_state'\] leads to was written to"),
    ):
        sample_frames(model)
    assert torch.equal(sample_frames(model), expected)
    assert model.streamer.device_bytes <= before
