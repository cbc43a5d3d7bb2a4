"""Tokens of one prompt on several GPUs: the host's latents, and one GPU by name where they cannot be divided."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.controlnet
import comfy.hooks
import comfy.model_management as mm
import comfy.patcher_extension
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_hooks import (
    ConditioningSetProperties,
    CreateHookKeyframe,
    CreateHookLoraModelOnly,
    SetHookKeyframes,
)
from controlnets import write_controlnet
from failing import failing
from moving import between_steps
from parallel import STEPS, copies_of, parallel, runs_of
from placing import Machine
from prompts import Conditioning, conditioning, guided, latent
from sampling import LORA, MB, sample_with_hook, with_lora
from weightstream.nodes.host.hosts import WrappersMP
from weightstream.nodes.model.patcher import StreamedModelPatcher
from weightstream.nodes.parallel import verified
from weightstream.nodes.parallel.verified import verdicts
from weightstream.nodes.tell.notices import describe_notices

import nodes as host_nodes

# With fewer tokens a CPU's kernels give other bits for half of them.
SIDE, TOKENS = 16, 16


@pytest.fixture(autouse=True)
def nothing_known() -> None:
    verdicts.clear()


def one_prompt(model: Any, positive: Any = None, **options: Any) -> torch.Tensor:
    """Latents for one prompt: with this guidance the host leaves the negative one out."""
    options = {"image": latent(SIDE), "cfg": 1.0, "steps": STEPS} | options
    return guided(model, positive=positive or conditioning(1, TOKENS), **options)


Run = Callable[[Any], torch.Tensor]


def check_divided(model: Any, expected: torch.Tensor, run: Run = one_prompt) -> None:
    """It gives what is expected, also when that was verified, and all GPUs have run all steps."""
    for _ in range(2):
        assert torch.equal(run(model), expected)
        assert model.streamed.alone == ""
    runs = runs_of(model)
    assert min(runs) == max(runs) > 1
    assert model.streamed.together == runs[0]


def check_whole(model: Any, native: Any, why: str, run: Run = one_prompt) -> None:
    """It gives what the host gives, on one GPU, and says why."""
    expected = run(native)
    for _ in range(2):
        assert torch.equal(run(model), expected)
    assert why in model.streamed.alone
    assert [why in notice["text"] for notice in describe_notices() if notice["kind"] == "fallback"] == [True]


def test_two_gpus_have_half_of_the_tokens_each(loaded: Any, native: ModelPatcher) -> None:
    model = parallel(loaded)
    check_divided(model, one_prompt(native))
    assert all(one.streamer.snapshot().run.counters.streamed_bytes > 0 for one in (model, *copies_of(model)))
    assert torch.equal(one_prompt(loaded), one_prompt(native)), "the incoming model is as it was"


def test_three_gpus(loaded: Any, machine: Machine, native: ModelPatcher) -> None:
    def run(model: Any) -> torch.Tensor:
        return one_prompt(model, conditioning(1, 24), image=latent(24))

    expected = run(native)
    machine(3)
    check_divided(parallel(loaded), expected, run)


def test_four_gpus_in_teams_of_two(loaded: Any, machine: Machine, native: ModelPatcher) -> None:
    """Two prompts so different in length that the host computes them one by one, each on two GPUs."""

    def run(model: Any) -> torch.Tensor:
        return one_prompt(model, negative=conditioning(2, 5 * TOKENS), cfg=2.0)

    expected = run(native)
    machine(4)
    model = parallel(loaded)
    tokens: list[list[int]] = []
    for one in (model, *copies_of(model)):
        seen: list[int] = []
        tokens.append(seen)
        block = one.model.diffusion_model.single_blocks[0]
        block.linear1.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].shape[1]))
    check_divided(model, expected, run)
    images = (SIDE // 2) ** 2
    last = [seen[-1] for seen in tokens]
    assert sorted(last) == sorted([(TOKENS + images) // 2] * 2 + [(5 * TOKENS + images) // 2] * 2)
    assert last[0] == last[1] != last[2] == last[3]
    # Of one prompt all four have a part.
    check_divided(model, one_prompt(native))
    assert {seen[-1] for seen in tokens} == {(TOKENS + images) // 4}


@pytest.mark.parametrize(("devices", "compiled"), [(2, False), (2, True), (4, False)], ids=["two", "compiled", "teams"])
def test_no_two_threads_compute_at_once(
    loaded: Any,
    machine: Machine,
    native: ModelPatcher,
    monkeypatch: pytest.MonkeyPatch,
    devices: int,
    compiled: bool,
) -> None:
    """The host's attention has settings that are the process's: two at once may get each other's kernel."""
    if compiled:
        monkeypatch.setattr(StreamedModelPatcher, "_is_compiled", lambda _: True)

    def run(model: Any) -> torch.Tensor:
        return one_prompt(model, negative=conditioning(2, 5 * TOKENS), cfg=2.0)

    expected = run(native)
    machine(devices)
    model = parallel(loaded)
    running, both = threading.Lock(), []

    def begin(*_: Any) -> None:
        both.append(not running.acquire(blocking=False))
        time.sleep(0.001)  # Another thread could run now.

    def end(*_: Any) -> None:
        if not both[-1]:
            running.release()

    handles = []
    for one in (model, *copies_of(model)):
        net = one.model.diffusion_model
        for layer in (net.img_in, *(block.img_attn.qkv for block in net.double_blocks), net.single_blocks[1].linear1):
            handles += [layer.register_forward_pre_hook(begin), layer.register_forward_hook(end)]
    check_divided(model, expected, run)
    for handle in handles:
        handle.remove()
    assert len(both) > 20
    assert not any(both)


def test_parts_as_the_user_says(loaded: Any, machine: Machine, native: ModelPatcher) -> None:
    def run(model: Any) -> torch.Tensor:
        return one_prompt(model, conditioning(1, 64), image=latent(32))

    expected = run(native)
    model = parallel(loaded, ratio="3,1")
    rows: list[int] = []
    block = copies_of(model)[0].model.diffusion_model.single_blocks[0]
    handle = block.linear1.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    check_divided(model, expected, run)
    handle.remove()
    assert set(rows) == {(64 + 256) // 4}
    known = len(verdicts._found)
    check_divided(parallel(loaded, ratio="1,1"), expected, run)
    assert len(verdicts._found) == known + 1, "other parts are another kind"


def test_images_of_a_batch(loaded: Any, native: ModelPatcher) -> None:
    def run(model: Any) -> torch.Tensor:
        return one_prompt(model, image=latent(SIDE, batch=2))

    check_divided(parallel(loaded), run(native), run)


def test_with_a_lora(loaded: Any, native: ModelPatcher) -> None:
    model = parallel(loaded)
    for strength in (0.7, 0.4):
        check_divided(with_lora(model, strength), one_prompt(with_lora(native, strength)))
    check_divided(model, one_prompt(native))


def test_two_prompts_go_to_a_gpu_each_and_one_is_divided(loaded: Any, native: ModelPatcher) -> None:
    """As where a negative prompt is for some of the steps."""
    with torch.inference_mode():
        (negative,) = host_nodes.NODE_CLASS_MAPPINGS["ConditioningSetTimestepRange"]().set_range(
            conditioning(2, 23), 0.0, 0.5
        )

    def run(model: Any) -> torch.Tensor:
        return one_prompt(model, negative=negative, cfg=2.0, steps=4)

    check_divided(parallel(loaded), run(native), run)


def test_two_prompts_that_give_other_bits_apart_are_divided(
    loaded: Any, native: ModelPatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on some CPUs, where batches of one and two differ."""
    compared: list[bool] = []

    def differs_twice(one: torch.Tensor, other: torch.Tensor) -> bool:
        compared.append(torch.equal(one, other))
        return len(compared) > 2 and compared[-1]

    monkeypatch.setattr(verified, "_same_bits", differs_twice)

    def run(model: Any) -> torch.Tensor:
        return one_prompt(model, negative=conditioning(2, TOKENS), cfg=2.0, steps=3)

    model, expected = parallel(loaded), run(native)
    assert torch.equal(run(model), expected)
    assert model.streamed.alone == ""
    assert runs_of(model) == [7, 4], "the first step ran both ways twice, the second once"
    check_divided(model, expected, run)


def test_controlnet(loaded: Any, native: ModelPatcher, tmp_path: Path) -> None:
    write_controlnet(tmp_path / "control.safetensors")
    with torch.inference_mode():
        control = comfy.controlnet.load_controlnet(str(tmp_path / "control.safetensors"))
        apply = host_nodes.ControlNetApplyAdvanced().apply_controlnet
        hint = torch.rand(1, 8 * SIDE, 8 * SIDE, 3, generator=torch.Generator().manual_seed(5))
        positive = apply(conditioning(1, TOKENS), conditioning(2, TOKENS), control, hint, 0.9, 0.0, 1.0)[0]
    plain = one_prompt(native)
    expected = one_prompt(native, positive)
    assert not torch.equal(expected, plain)
    check_divided(parallel(loaded), expected, lambda model: one_prompt(model, positive))


def test_attention_of_another_node(loaded: Any, native: ModelPatcher) -> None:
    def halved(attend: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        return attend(*args, **kwargs) * 0.5

    def changed(model: Any) -> Any:
        model = model.clone()
        model.model_options["transformer_options"]["optimized_attention_override"] = halved
        return model

    expected = one_prompt(changed(native))
    assert not torch.equal(expected, one_prompt(native))
    check_divided(changed(parallel(loaded)), expected)
    check_divided(parallel(changed(loaded)), expected)


def test_attention_of_another_node_that_looks_at_queries_later_in_a_run(loaded: Any, native: ModelPatcher) -> None:
    """As sparse attention does, which begins after some steps with all."""

    def sparse(attend: Callable[..., torch.Tensor], q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        late = float(kwargs["transformer_options"]["sigmas"].max()) < 0.9
        return attend(q, *args, **kwargs) * (1.5 if late and q.shape[2] < args[0].shape[2] else 0.5)

    def changed(model: Any) -> Any:
        model = model.clone()
        model.model_options["transformer_options"]["optimized_attention_override"] = sparse
        return model

    model, expected = changed(parallel(loaded)), one_prompt(changed(native), steps=4)
    for _ in range(2):
        assert torch.equal(one_prompt(model, steps=4), expected)
    assert 0 < model.streamed.together < 4


# -- one GPU, by name --------------------------------------------------------------------------------------------------


def patched(model: Any) -> Any:
    model = model.clone()
    model.set_model_attn1_output_patch(lambda out, _: out * 0.9)
    return model


def replaced(model: Any) -> Any:
    model = model.clone()
    model.set_model_patch_replace(lambda args, more: more["original_block"](args), "dit", "double_block", 1)
    return model


def wrapped(model: Any) -> Any:
    def around(executor: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        return executor(*args, **kwargs) * 1.1

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "somebody's", around)
    return model


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (patched, "a node has put attn1_output_patch into its blocks"),
        (replaced, "a node has put dit into its blocks"),
        (wrapped, "a node (somebody's) runs code around its steps"),
    ],
)
def test_what_would_see_a_part_of_the_tokens(
    loaded: Any, native: ModelPatcher, change: Callable[[Any], Any], why: str
) -> None:
    check_whole(change(parallel(loaded)), change(native), why)


def test_hooks(loaded: Any, machine: Machine, native: ModelPatcher) -> None:
    machine(2, 40 * MB)
    mode = comfy.hooks.EnumHookMode.MinVram
    expected = sample_with_hook(native, mode)
    assert torch.equal(sample_with_hook(parallel(loaded), mode), expected)


def with_hook(entry: Conditioning, strength: float) -> Conditioning:
    """A prompt that a LoRA hangs on."""
    (frames,) = CreateHookKeyframe().create_hook_keyframe(strength, 0.0)
    hooks = CreateHookLoraModelOnly().create_hook_model_only(LORA, 1.0)[0]
    hooks = SetHookKeyframes().set_hook_keyframes(hooks, frames)[0]
    return ConditioningSetProperties().set_properties(entry, 1.0, "default", hooks=hooks)[0]


def test_a_hook_that_did_nothing_when_the_step_was_verified(
    loaded: Any, machine: Machine, native: ModelPatcher
) -> None:
    """The host puts it on the first GPU alone."""
    machine(2, 40 * MB)
    model = parallel(loaded)
    for strength in (0.0, 1.0):
        positive = with_hook(conditioning(1, TOKENS), strength)
        assert torch.equal(one_prompt(model, positive), one_prompt(native, positive))
        assert model.streamed.alone == "a LoRA hangs on its conditioning"


def test_a_hook_of_a_prompt_that_has_ended_is_on_no_gpu(loaded: Any, machine: Machine, native: ModelPatcher) -> None:
    """The host leaves it on the GPU to which it gave that prompt."""
    machine(2, 40 * MB)
    model = parallel(loaded)
    for negative in (conditioning(2, 23), with_hook(conditioning(2, 23), 1.0)):
        with torch.inference_mode():
            (ending,) = host_nodes.NODE_CLASS_MAPPINGS["ConditioningSetTimestepRange"]().set_range(negative, 0.0, 0.5)

        def run(model: Any, ending: Conditioning = ending) -> torch.Tensor:
            return one_prompt(model, negative=ending, cfg=2.0, steps=4)

        check_divided(model, run(native), run)


def test_other_bits_for_a_part_of_the_tokens(loaded: Any, native: ModelPatcher) -> None:
    """As a CPU's kernels give for two tokens of text."""

    def run(model: Any) -> torch.Tensor:
        return one_prompt(model, conditioning(1, 4), image=latent(8))

    model = parallel(loaded)
    check_whole(model, native, "a step gave other bits than on one GPU", run)
    check_divided(model, one_prompt(native))


def test_bits_that_are_close_are_enough_where_the_user_says_so(loaded: Any, native: ModelPatcher) -> None:
    def run(model: Any) -> torch.Tensor:
        return one_prompt(model, conditioning(1, 4), image=latent(8))

    model = parallel(loaded, parallel_bits="close")
    expected = run(native)
    found = run(model)
    assert not torch.equal(found, expected)
    assert torch.allclose(found, expected, atol=1e-3)
    assert runs_of(model) == [STEPS, STEPS]


# -- what happens in a run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", [0, 1])
@pytest.mark.parametrize("known", [False, True])
def test_all_begin_a_step_again_where_a_gpu_runs_out_of_memory(
    loaded: Any, native: ModelPatcher, on: int, known: bool
) -> None:
    """Twice: the second time it gives up some of the weights that are on it."""
    model, expected = parallel(loaded), one_prompt(native)
    if known:
        check_divided(model, expected)
    block = (model, *copies_of(model))[on].model.diffusion_model.single_blocks[1]
    # The first GPU alone runs a step before, to compare with.
    first = 1 if on == 0 and not known else 0
    with failing(block, first, first + 1) as failed:
        assert torch.equal(one_prompt(model), expected)
    assert failed == [first, first + 1]
    assert model.streamed.alone == ""
    check_divided(model, expected)


def test_a_gpu_that_never_has_room_leaves_the_run_to_the_first(loaded: Any, native: ModelPatcher) -> None:
    model, expected = parallel(loaded), one_prompt(native)
    block = copies_of(model)[0].model.diffusion_model.single_blocks[1]
    with failing(block, *range(100)):
        assert torch.equal(one_prompt(model), expected)
    assert model.streamed.alone == "there is no room for it on all of gpu:0, gpu:1"
    check_divided(model, expected)


def test_other_errors_are_not_hidden(loaded: Any, native: ModelPatcher) -> None:
    model = parallel(loaded)
    (copy,) = copies_of(model)
    block = copy.model.diffusion_model.double_blocks[0]
    with failing(block, 0, error=RuntimeError("the device is gone")), pytest.raises(RuntimeError, match="is gone"):
        one_prompt(model)
    check_divided(model, one_prompt(native))


@pytest.mark.parametrize("on", [0, 1])
def test_an_interrupt_ends_both(loaded: Any, native: ModelPatcher, on: int) -> None:
    model, expected = parallel(loaded), one_prompt(native)
    check_divided(model, expected)
    block = (model, *copies_of(model))[on].model.diffusion_model.single_blocks[0]

    def interrupt(*_: object) -> None:
        raise mm.InterruptProcessingException

    handle = block.register_forward_pre_hook(interrupt)
    with pytest.raises(mm.InterruptProcessingException):
        one_prompt(model)
    handle.remove()
    assert not any(one.streamer.running for one in (model, *copies_of(model)))
    check_divided(model, expected)


@pytest.mark.parametrize("on", [0, 1])
def test_a_copy_that_is_unloaded_between_steps_is_loaded_again(loaded: Any, native: ModelPatcher, on: int) -> None:
    expected = one_prompt(native)
    placed = parallel(loaded)

    def unload(model: Any) -> None:
        one = next(one for one in mm.loaded_models() if one.model is (placed, *copies_of(placed))[on].model)
        mm.unload_model_and_clones(one, unload_additional_models=False)

    assert torch.equal(one_prompt(between_steps(placed, unload)), expected)
    check_divided(placed, expected)
