"""What patches and blocks of a MODEL over several devices write to, in the host's own sampler, on virtual devices."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from failing import failing
from placing import Machine, place
from sampling import MB, sample

Change = Callable[[Any], Any]
BLOCKS = [*(("double_block", number) for number in range(2)), *(("single_block", number) for number in range(4))]


def around_blocks(act: Callable[[dict[str, Any]], None], after: Change = lambda model: model) -> Change:
    """Have ``act`` done to what each block gets, before it."""

    def change(model: Any) -> Any:
        model = model.clone()

        def patch(args: dict[str, Any], extra: dict[str, Any]) -> Any:
            act(args)
            return extra["original_block"](args)

        for kind, number in BLOCKS:
            model.set_model_patch_replace(patch, "dit", kind, number)
        return after(model)

    return change


def scaled_attention(model: Any) -> Any:
    model.set_model_patch(lambda x, extra: x * extra["scale"].to(x.device), "attn1_output_patch")
    return model


def write_options(args: dict[str, Any]) -> None:
    args["transformer_options"].setdefault("scale", torch.ones(1)).mul_(1.03)


def write_mask(args: dict[str, Any]) -> None:
    """One memory for the masks of all blocks."""
    options = args["transformer_options"]
    tokens = args["img"].shape[1] + (args["txt"].shape[1] if "txt" in args else 0)
    mask = options.setdefault("mask", torch.zeros(1, 1, tokens, tokens))
    mask.zero_()
    mask[..., : 4 + int(options["block_index"])] = 0.5
    args["attn_mask"] = mask


def write_view(args: dict[str, Any]) -> None:
    args["vec"][:, :32].mul_(1.1)


CHANGES: dict[str, Change] = {
    "vec": around_blocks(lambda args: args["vec"].mul_(1.02)),
    "a view of vec": around_blocks(write_view),
    "pe": around_blocks(lambda args: args["pe"].mul_(0.99)),
    "img": around_blocks(lambda args: args["img"].mul_(1.01)),
    "options": around_blocks(write_options, scaled_attention),
    "mask": around_blocks(write_mask),
}


def caching(model: Any) -> Any:
    """Blocks keep what they have given in options, and write to it in the next step."""
    model = model.clone()
    caches = model.model_options["transformer_options"]["caches"] = [{} for _ in range(4)]
    for number in range(4):
        name = f"diffusion_model.single_blocks.{number}.forward"
        before = model.get_model_object(name)

        def forward(self: Any, x: Any, *args: Any, before: Any = before, number: int = number, **kwargs: Any) -> Any:
            x = before(x, *args, **kwargs)
            cache = kwargs["transformer_options"]["caches"][number]
            if "x" not in cache:
                cache["x"] = x * 0.5
            cache["x"].mul_(0.75).add_(x)
            return x + cache["x"] * 0.1

        model.add_object_patch(name, types.MethodType(forward, model.get_model_object(name).__self__))
    assert caches is model.model_options["transformer_options"]["caches"]
    return model


@pytest.fixture(params=[(16 * MB,) * 2, (13 * MB,) * 3], ids=["two devices", "three devices"])
def split(loaded: Any, machine: Machine, request: pytest.FixtureRequest) -> Any:
    machine(len(request.param), request.param[0])
    model = place(loaded, split="equal")[0]
    assert len(model.streamers) == len(request.param)
    return model


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_written_to_between_blocks(change: str, split: Any, native: ModelPatcher) -> None:
    changed = CHANGES[change]
    plain, expected = sample(native, steps=2), sample(changed(native), steps=2)
    assert not torch.equal(plain, expected)
    assert torch.equal(sample(changed(split), steps=2), expected)
    assert torch.equal(sample(split, steps=2), plain)


def test_what_blocks_keep_from_step_to_step(split: Any, native: ModelPatcher) -> None:
    expected = sample(caching(native))
    assert torch.equal(sample(caching(split)), expected)


@pytest.mark.parametrize("device", [0, 1])
def test_what_blocks_keep_when_a_step_runs_again(device: int, split: Any, native: ModelPatcher) -> None:
    """What is kept is where the block ran that failed, or would have."""
    expected, model = sample(caching(native)), caching(split)
    last = model.streamers[device].blocks.blocks[-1].module
    with failing(last, 1) as failed:
        assert torch.equal(sample(model), expected)
    assert failed == [1]
