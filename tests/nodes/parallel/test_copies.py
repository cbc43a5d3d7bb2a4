"""GPU Placement with split=parallel: the GPUs work on one step at the same time, and the latents are the host's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.model_management as mm
import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_hooks import (
    ConditioningSetProperties,
    CreateHookKeyframe,
    CreateHookLoraModelOnly,
    SetHookKeyframes,
)
from failing import failing
from moving import between_steps
from parallel import LONG, STEPS, apart, close_all, copies_of, parallel, runs_of
from placing import FIRST, SECOND, Machine, place
from prompts import conditioning, guided
from sampling import LORA, MB, MODEL, sample_with_hook, with_lora
from weightstream.nodes.host import contracts, devices
from weightstream.nodes.loader import load_streamed
from weightstream.nodes.model import streamed_model
from weightstream.nodes.model.offload import Mode, OffloadSettings
from weightstream.nodes.parallel.verified import verdicts
from weightstream.nodes.settings import with_settings
from weightstream.nodes.tell.notices import describe_notices
from weightstream.streaming import LocalShare, PackingMode, PinBudget, State, VirtualMemory
from weightstream.streaming.sharing.pages import why_not_here

import nodes as host_nodes


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    verdicts.clear()
    yield
    close_all()


def check_parallel(model: Any, expected: torch.Tensor, run: Callable[[Any], torch.Tensor] = apart) -> None:
    """It gives what is expected, also when that was verified, and both GPUs have run all of its steps then."""
    assert torch.equal(run(model), expected)
    assert torch.equal(run(model), expected)
    runs = runs_of(model)
    assert model.streamed.alone == ""
    assert runs[0] == runs[1] == model.streamed.together > 1


def test_two_gpus_compute_a_prompt_each(loaded: Any, said: list[str], native: ModelPatcher) -> None:
    expected = apart(native)
    model = parallel(loaded)
    assert said == ["MODEL on gpu:0 and gpu:1 at the same time (parallel)"]
    (copy,) = copies_of(model)
    assert (model.load_device, copy.load_device) == (FIRST, SECOND)
    check_parallel(model, expected)
    assert describe_notices() == []
    check_parallel(parallel(loaded), expected)
    assert copies_of(parallel(loaded))[0].streamer is copy.streamer, "what is known is not made anew"
    assert torch.equal(apart(loaded), expected), "the incoming model is as it was"


@pytest.fixture
def budget(monkeypatch: pytest.MonkeyPatch) -> PinBudget:
    """For the models of one test alone, as is ``share``."""
    budget = PinBudget()
    monkeypatch.setattr(streamed_model, "pins", budget)
    return budget


@pytest.fixture
def share(monkeypatch: pytest.MonkeyPatch) -> LocalShare:
    """For the models of one test alone."""
    share = LocalShare()
    monkeypatch.setattr(streamed_model, "local_share", share)
    return share


@pytest.mark.skipif(why_not_here() is not None, reason="no sealed memory files here")
@pytest.mark.parametrize("strength", [0.0, 0.6])
def test_what_streams_is_page_locked_once(
    loaded: Any, machine: Machine, native: ModelPatcher, share: LocalShare, budget: PinBudget, strength: float
) -> None:
    def prepared(model: Any) -> Any:
        return with_lora(model, strength) if strength else model

    expected = apart(prepared(native))
    mm.unload_all_models()
    machine(2, 14 * MB)
    model = prepared(parallel(loaded))
    both = (model, *copies_of(model))
    for _ in range(3):
        assert torch.equal(apart(model), expected)
        for one in both:
            one.streamer.finish_building()
    snapshots = [one.streamer.snapshot() for one in both]
    shared = [now.shared_bytes for now in snapshots]
    assert min(shared) > 10 * MB
    assert max(shared) <= share.nbytes < min(sum(shared), model.streamer.model_bytes), "not twice, not more than it is"
    assert share.taken > 0
    own = sum(now.pinned_bytes - now.shared_bytes for now in snapshots)
    assert budget.locked == share.nbytes + own, "what both have is counted once"
    both[1].streamer.close()
    assert share.nbytes == shared[0], "the first GPU has its own still"
    assert torch.equal(apart(model), expected)
    for one in both:
        one.streamer.close()
    assert (share.nbytes, share.copies, budget.locked, budget.used) == (0, 0, 0, 0)


@pytest.mark.skipif(why_not_here() is not None, reason="no sealed memory files here")
def test_packed_copies_are_there_once_too(
    models: Path, machine: Machine, native_in_half: ModelPatcher, share: LocalShare, budget: PinBudget
) -> None:
    expected = apart(native_in_half)
    machine(2, 40 * MB)
    with torch.inference_mode():
        loaded = load_streamed(str(models / MODEL), {"dtype": torch.bfloat16})
    model = parallel(with_settings(loaded, OffloadSettings(mode=Mode.STREAM, packing=PackingMode.ON)))
    for _ in range(3):
        assert torch.equal(apart(model), expected)
    both = (model, *copies_of(model))
    assert all(one.streamer.plan.packed for one in both)
    snapshots = [one.streamer.snapshot() for one in both]
    assert model.streamed.alone == ""
    assert share.nbytes < sum(now.shared_bytes for now in snapshots) <= 2 * share.nbytes
    assert budget.locked == share.nbytes + sum(now.pinned_bytes - now.shared_bytes for now in snapshots)


def test_where_nothing_can_be_shared_each_has_its_own(
    loaded: Any, machine: Machine, native: ModelPatcher, share: LocalShare, caplog: pytest.LogCaptureFixture
) -> None:
    expected = apart(native)
    machine(2, 14 * MB)
    share.give_up("this system has none")
    check_parallel(parallel(loaded), expected)
    assert share.copies == 0
    assert "each have page-locked copies of their own: this system has none" in caplog.text


def test_a_lora_that_changes_between_prompts(loaded: Any, native: ModelPatcher) -> None:
    model = parallel(loaded)
    for strength in (0.5, 0.9):
        assert torch.equal(apart(with_lora(model, strength)), apart(with_lora(native, strength)))
    check_parallel(model, apart(native))
    before = parallel(with_lora(loaded, 0.7))
    check_parallel(before, apart(with_lora(native, 0.7)))


def test_gpus_of_unequal_memory_plan_for_themselves(loaded: Any, machine: Machine, native: ModelPatcher) -> None:
    expected = apart(native)
    memories = machine(2)
    memories[0].budget, memories[1].budget = 64 * MB, 14 * MB
    model = parallel(loaded)
    check_parallel(model, expected)
    plans = [one.streamer.plan for one in (model, *copies_of(model))]
    assert [bool(plan.segments) for plan in plans] == [False, True]
    assert all(memory.allocated <= memory.budget for memory in memories)


@pytest.mark.parametrize("behind", [False, True])
def test_limits_hold_on_each_gpu(loaded: Any, native: ModelPatcher, behind: bool) -> None:
    settings = OffloadSettings(vram_limit=13 * MB)
    model = loaded if behind else with_settings(loaded, settings)
    model = parallel(model)
    model = with_settings(model, settings) if behind else model
    check_parallel(model, apart(native))
    assert [one.streamer.config.vram_limit for one in (model, *copies_of(model))] == [13 * MB] * 2
    assert all(one.streamer.device_bytes <= 13 * MB for one in (model, *copies_of(model)))


def test_a_model_of_another_loader(foreign: ModelPatcher, machine: Machine, native: ModelPatcher) -> None:
    machine(3)
    model = parallel(foreign, devices="gpu:2,gpu:0")
    assert [one.load_device.index for one in (model, *copies_of(model))] == [2, 0]
    check_parallel(model, apart(native))


# -- regions, hooks, ControlNet ----------------------------------------------------------------------------------------


def regional(model: Any) -> torch.Tensor:
    """Two regions that overlap, and a prompt for all of it."""
    with torch.inference_mode():
        left = host_nodes.ConditioningSetArea().append(conditioning(3), 64, 64, 0, 0, 0.8)[0]
        right = host_nodes.ConditioningSetArea().append(conditioning(4), 32, 64, 16, 0, 1.3)[0]
    return guided(model, positive=[*conditioning(1), *left, *right], negative=conditioning(2, LONG))


def test_regions(loaded: Any, machine: Machine, native: ModelPatcher) -> None:
    """Whether in parallel or not, which the order of sums decides, the latents are those of one device."""
    expected = regional(native)
    machine(3)
    model = parallel(loaded)
    for _ in range(2):
        assert torch.equal(regional(model), expected)
    assert model.streamed.alone == "" or "other bits than on one GPU" in model.streamed.alone


def hooked(model: Any) -> torch.Tensor:
    """A LoRA on the positive prompt, whose strength changes in the run."""
    frames = None
    for strength, start in ((1.0, 0.0), (1.6, 0.4), (0.0, 0.8)):
        (frames,) = CreateHookKeyframe().create_hook_keyframe(strength, start, frames)
    hooks = CreateHookLoraModelOnly().create_hook_model_only(LORA, 0.7)[0]
    hooks = SetHookKeyframes().set_hook_keyframes(hooks, frames)[0]
    (positive,) = ConditioningSetProperties().set_properties(conditioning(1), 1.0, "default", hooks=hooks)
    return guided(model, steps=5, positive=positive, negative=conditioning(2, LONG))


@pytest.mark.parametrize("mode", list(comfy.hooks.EnumHookMode))
def test_hooks(loaded: Any, machine: Machine, native: ModelPatcher, mode: comfy.hooks.EnumHookMode) -> None:
    expected, plain = sample_with_hook(native, mode), apart(native)
    machine(2, 40 * MB)
    model = parallel(loaded)
    check_parallel(model, expected, lambda model: sample_with_hook(model, mode))
    expected = hooked(native)
    check_parallel(model, expected, hooked)
    assert copies_of(model)[0].prompt_has_hooks, "the host tells the MODEL alone"
    check_parallel(model, plain)
    assert not copies_of(model)[0].prompt_has_hooks


def test_a_hook_that_changes_where_a_step_is_verified(loaded: Any, machine: Machine, native: ModelPatcher) -> None:
    """A region begins at that step, so it runs on one GPU first, and the host tells that one of the change."""

    def run(model: Any) -> torch.Tensor:
        frames = None
        for strength, start in ((1.0, 0.0), (2.5, 0.5)):
            (frames,) = CreateHookKeyframe().create_hook_keyframe(strength, start, frames)
        hooks = CreateHookLoraModelOnly().create_hook_model_only(LORA, 0.7)[0]
        hooks = SetHookKeyframes().set_hook_keyframes(hooks, frames)[0]
        (negative,) = ConditioningSetProperties().set_properties(conditioning(2, LONG), 1.0, "default", hooks=hooks)
        with torch.inference_mode():
            area = host_nodes.ConditioningSetArea().append(conditioning(3), 32, 64, 0, 0, 0.8)[0]
            late = host_nodes.ConditioningSetTimestepRange().set_range(area, 0.5, 1.0)[0]
        return guided(model, steps=4, positive=[*conditioning(1), *late], negative=negative)

    expected = run(native)
    machine(2, 40 * MB)
    model = parallel(loaded)
    assert torch.equal(run(model), expected)
    assert (model.streamed.alone, model.streamed.together) == ("", 4)


# -- where it cannot be ------------------------------------------------------------------------------------------------


def test_one_gpu_falls_back(loaded: Any, machine: Machine, said: list[str], native: ModelPatcher) -> None:
    model = parallel(loaded, devices="gpu:1")
    assert said == ["MODEL does not work in parallel, that takes two GPUs; MODEL on gpu:1"]
    assert torch.equal(apart(model), apart(native))
    machine(1)
    assert copies_of(parallel(loaded, devices="gpu:0,gpu:1")) == []
    assert said[1].startswith(
        "gpu:1 is not there (this machine has gpu:0); MODEL does not work in parallel, that takes"
    )


def test_a_model_that_no_loader_gives_again(
    loaded: Any, said: list[str], native: ModelPatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded, "cached_patcher_init", None)
    model = parallel(loaded)
    why = "its loader does not give it once more as it is"
    assert said == [f"MODEL does not work in parallel, {why}; MODEL on gpu:0, gpu:1"], "it is split, as with auto"
    assert torch.equal(apart(model), apart(native))


def test_a_model_that_somebody_has_changed(loaded: Any, said: list[str], native: ModelPatcher) -> None:
    loaded.model.diffusion_model.img_in.bias = torch.nn.Parameter(
        loaded.model.diffusion_model.img_in.bias.detach().clone() + 1
    )
    model = parallel(loaded)
    assert "MODEL does not work in parallel, its loader does not give it once more as it is" in said[0]
    assert torch.equal(apart(model), apart(loaded))


def test_another_node_has_split_it(loaded: Any, said: list[str], native: ModelPatcher) -> None:
    model = parallel(parallel(loaded))
    assert "runs on several GPUs at once" in said[1]
    check_parallel(model, apart(native))


def test_a_host_without_it(loaded: Any, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ModelPatcher, "match_multigpu_clones")
    contracts.why_not_parallel.cache_clear()
    try:
        parallel(loaded)
    finally:
        contracts.why_not_parallel.cache_clear()
    assert "cannot do that (ModelPatcher.match_multigpu_clones is gone); MODEL on gpu:0, gpu:1" in said[0]


def test_something_attached_that_no_loader_gives_again(loaded: Any, foreign: ModelPatcher, said: list[str]) -> None:
    other = foreign.clone()
    other.cached_patcher_init = None
    model = loaded.clone()
    model.set_additional_models("somebody's", [other])
    parallel(model)
    assert "Flux, which is attached to it, cannot be loaded on another GPU" in said[0]
    behind = parallel(loaded)
    behind.set_additional_models("somebody's", [other])
    apart(behind)
    assert behind.streamed.alone.startswith("what is attached to it cannot be had on another GPU (RuntimeError: ")
    assert copies_of(behind), "they are there for the next run"


def test_a_layer_of_the_first_gpu_that_a_node_behind_has_put_functions_into(loaded: Any, native: ModelPatcher) -> None:
    """The host would put these into the models of the other GPUs, where they would compute with the first one's."""

    def doubled(model: Any) -> Any:
        model = model.clone()
        layer = model.model.diffusion_model.img_in

        def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
            return type(self).forward(self, x) * 2

        model.add_object_patch("diffusion_model.img_in.forward", forward.__get__(layer))
        return model

    expected = apart(doubled(native))
    assert not torch.equal(expected, apart(native))
    model = doubled(parallel(loaded))
    assert torch.equal(apart(model), expected)
    assert "(object_patches) refers to the modules of the first GPU's model" in model.streamed.alone
    check_parallel(parallel(loaded), apart(native))


# -- what happens in a run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", [0, 1])
def test_a_gpu_that_runs_out_of_memory_streams_more(loaded: Any, native: ModelPatcher, on: int) -> None:
    model, expected = parallel(loaded), apart(native)
    check_parallel(model, expected)
    one = (model, *copies_of(model))[on]
    with failing(one.model.diffusion_model.double_blocks[1], 1, 2) as failed:
        assert torch.equal(apart(model), expected)
    assert failed == [1, 2]
    assert model.streamed.alone == ""
    check_parallel(model, expected)


@pytest.mark.parametrize("verified", [False, True])
def test_a_gpu_without_room_leaves_the_run_to_the_first(loaded: Any, native: ModelPatcher, verified: bool) -> None:
    model, expected = parallel(loaded), apart(native)
    if verified:
        check_parallel(model, expected)
    (copy,) = copies_of(model)
    with failing(copy.model.diffusion_model.double_blocks[1], *range(1, 100)):
        assert torch.equal(apart(model), expected)
    assert model.streamed.alone == "there is no room for it on all of gpu:0, gpu:1"
    assert [notice["kind"] for notice in describe_notices()] == ["fallback"]
    check_parallel(model, expected)
    assert describe_notices() == []


def test_gpus_run_by_turns_block_by_block(loaded: Any, native: ModelPatcher) -> None:
    """Of two prompts, so that two threads do not wait for the interpreter's lock in each operation."""
    model, expected = parallel(loaded), apart(native)
    check_parallel(model, expected)
    order: list[tuple[int, int]] = []
    handles = []
    for number, one in enumerate((model, *copies_of(model))):
        net = one.model.diffusion_model
        for depth, block in enumerate((*net.double_blocks, *net.single_blocks)):
            handles.append(block.register_forward_pre_hook(lambda *_, at=(number, depth): order.append(at)))
    assert torch.equal(apart(model), expected)
    for handle in handles:
        handle.remove()
    blocks = len(order) // (2 * STEPS)
    for step in range(STEPS):
        of_step = order[step * 2 * blocks : (step + 1) * 2 * blocks]
        assert sorted(of_step) == [(number, depth) for number in range(2) for depth in range(blocks)]
        # One may be some blocks ahead of the other, which begins later, or not far from the end.
        begun = next(place for place, (number, _) in enumerate(of_step) if number != of_step[0][0])
        ended = next(place for place, (_, depth) in enumerate(of_step) if depth == blocks - 1)
        both_run = [number for number, _ in of_step[begun:ended]]
        assert all(one != other for one, other in pairwise(both_run)), of_step


@pytest.mark.parametrize("on", [0, 1])
def test_an_interrupt_leaves_nothing_at_work(loaded: Any, native: ModelPatcher, on: int) -> None:
    model, expected = parallel(loaded), apart(native)
    check_parallel(model, expected)
    both = [model, *copies_of(model)]
    begun = threading.Event()

    def interrupt(*_: object) -> None:
        assert begun.is_set(), "they take turns, block by block"
        raise mm.InterruptProcessingException

    def go_on(*_: object) -> None:
        begun.set()
        time.sleep(0.3)

    there, here = (one.model.diffusion_model for one in (both[on], both[1 - on]))
    handles = [
        there.single_blocks[0].register_forward_pre_hook(interrupt),
        here.double_blocks[0].register_forward_pre_hook(go_on),
    ]
    with pytest.raises(mm.InterruptProcessingException):
        apart(model)
    assert not any(one.streamer.running for one in both), "the other GPU's step is over too"
    assert not mm.processing_interrupted()
    for handle in handles:
        handle.remove()
    check_parallel(model, expected)


def test_other_errors_are_not_hidden(loaded: Any) -> None:
    model = parallel(loaded)
    (copy,) = copies_of(model)
    block = copy.model.diffusion_model.double_blocks[0]
    with failing(block, 0, error=RuntimeError("the device is gone")), pytest.raises(RuntimeError, match="is gone"):
        apart(model)


@pytest.mark.parametrize("on", [0, 1])
def test_a_copy_that_is_unloaded_between_steps_is_loaded_again(
    loaded: Any, native: ModelPatcher, on: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = apart(native, steps=3)
    mm.unload_all_models()
    placed = parallel(loaded)
    load, asked = mm.load_models_gpu, []

    def listen(models: Any, *rest: Any, **named: Any) -> None:
        asked.append({one.load_device.index for one in models})
        load(models, *rest, **named)

    monkeypatch.setattr(mm, "load_models_gpu", listen)
    unloaded: list[str] = []

    def unload(model: Any) -> None:
        one = next(one for one in mm.loaded_models() if one.model is (placed, *copies_of(placed))[on].model)
        devices.unload(one)
        assert one.streamer.state is State.UNLOADED
        unloaded.append(one.streamed.gpu)

    model = between_steps(placed, unload)
    assert torch.equal(apart(model, steps=3), expected)
    assert unloaded == [f"gpu:{on}"]
    assert asked == [{0, 1}, {on}], "the other is in the middle of a step"
    check_parallel(placed, apart(native))


def test_a_gpu_that_is_taken_away(
    loaded: Any, machine: Machine, memories: tuple[VirtualMemory, ...], said: list[str], native: ModelPatcher
) -> None:
    expected = apart(native)
    check_parallel(parallel(loaded), expected)
    mm.unload_all_models()
    memories[1].budget = MB
    model = parallel(loaded)
    assert torch.equal(apart(model), expected)
    assert model.streamed.alone == "there is no room for it on all of gpu:0, gpu:1"
    memories[1].budget = 24 * MB
    check_parallel(model, expected)
    machine(1)
    assert torch.equal(apart(parallel(loaded)), expected)
    assert "that takes two GPUs" in said[-1]


@pytest.fixture
def memories(loaded: Any, machine: Machine) -> tuple[VirtualMemory, ...]:
    return machine(2)


def test_the_vae_and_clip_go_where_they_are_sent(loaded: Any, vae: comfy.sd.VAE, said: list[str]) -> None:
    _, _, placed = place(loaded, split="parallel", vae=vae, vae_device="gpu:1")
    assert placed.patcher.load_device == SECOND
    assert said == ["MODEL on gpu:0 and gpu:1 at the same time (parallel); VAE on gpu:1"]
