"""Weights of a MODEL are moved while it is sampled: what was in effect is in effect in the next step, or it fails."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.hooks
import comfy.model_management as mm
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import PatcherInjection, WrappersMP
from comfy_extras.nodes_hooks import (
    ConditioningSetProperties,
    CreateHookKeyframe,
    CreateHookLoraModelOnly,
    SetHookKeyframes,
)
from moving import (
    OF_ONE_DEVICE,
    OF_TWO_DEVICES,
    Act,
    around_a_step,
    between_steps,
    home_gives_way,
    inside_of_a_step,
    loads_its_own_and_ours_again,
    originals_stay,
    parts_give_all,
    parts_give_way,
    unload_everything,
    unload_the_home,
    unload_the_parts,
    unpatch_the_parts,
)
from placing import Machine
from prompts import conditioning, guided
from sampling import LORA, MB, SIDE, TOKENS, sample, with_lora
from weightstream.nodes.host import devices
from weightstream.nodes.model.patcher import StreamedModelPatcher
from weightstream.nodes.twins.split import split_over
from weightstream.streaming import State, WeightsMovedError

Load = Callable[..., Any]
OnDevices = Callable[..., StreamedModelPatcher]
MODES = (comfy.hooks.EnumHookMode.MaxSpeed, comfy.hooks.EnumHookMode.MinVram)


@pytest.fixture
def on_devices(loaded: StreamedModelPatcher, machine: Machine) -> OnDevices:
    """The tiny FLUX on so many devices: it streams on one, and on two with 14 MB each."""

    def make(count: int, budget: int = 14) -> StreamedModelPatcher:
        if count == 1:
            machine(1, 24 * MB)
            return loaded
        machine(count, budget * MB)
        return split_over(loaded, [torch.device("cpu", number) for number in range(count)], "equal", None, None)[0]

    return make


def hooked(model: Any, mode: comfy.hooks.EnumHookMode = MODES[0], both: bool = False) -> torch.Tensor:
    """Sample with a LoRA on the first prompt, and of another strength on the second, which both change on the way."""
    model = model.clone()
    model.hook_mode = mode

    def prompt(seed: int, strength: float) -> Any:
        hooks, frames = CreateHookLoraModelOnly().create_hook_model_only(LORA, strength)[0], None
        for part, start in ((1.0, 0.0), (1.8, 0.4), (0.5, 0.8)):
            (frames,) = CreateHookKeyframe().create_hook_keyframe(part, start, frames)
        hooks = SetHookKeyframes().set_hook_keyframes(hooks, frames)[0]
        return ConditioningSetProperties().set_properties(conditioning(seed), 1.0, "default", hooks=hooks)[0]

    return guided(model, steps=4, positive=prompt(1, 0.8), negative=prompt(2, -0.4) if both else None)


@pytest.fixture(scope="module")
def expected(native: ModelPatcher) -> Callable[..., torch.Tensor]:
    """What the host's own MODEL gives with a LoRA on it, by :func:`hooked` or :func:`sample`."""
    patched, known = with_lora(native, 0.7), dict[Any, torch.Tensor]()

    def ask(run: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
        key = (run, arguments)
        if key not in known:
            known[key] = run(patched, *arguments)
        return known[key]

    return ask


WAYS = [(1, act) for act in OF_ONE_DEVICE] + [(2, act) for act in OF_TWO_DEVICES]
BUDGETS = [(1, 24, act) for act in OF_ONE_DEVICE] + [(2, mb, act) for act in OF_TWO_DEVICES for mb in (14, 30)]


@pytest.mark.parametrize(("count", "budget", "act"), BUDGETS)
def test_hooks_and_patches_stay_in_effect_between_steps(
    on_devices: OnDevices, plain: torch.Tensor, expected: Callable[..., torch.Tensor], count: int, budget: int, act: Act
) -> None:
    model = on_devices(count, budget)
    sample(model)
    with originals_stay(model):
        for at, mode, both in ((1, MODES[0], False), (2, MODES[1], True)):
            moved = between_steps(with_lora(model, 0.7), act, at)
            assert torch.equal(hooked(moved, mode, both), expected(hooked, mode, both))
        assert torch.equal(sample(model), plain), "nothing is left of them"


@pytest.mark.parametrize("count", [1, 2])
def test_patches_stay_in_effect_from_the_first_step_to_the_last(
    on_devices: OnDevices, expected: Callable[..., torch.Tensor], count: int
) -> None:
    model = on_devices(count)
    for at in range(3):
        moved = between_steps(with_lora(model, 0.7), unload_everything, at)
        assert torch.equal(sample(moved), expected(sample))


@pytest.mark.parametrize(
    ("count", "act"), [*WAYS, (1, loads_its_own_and_ours_again), (2, loads_its_own_and_ours_again)]
)
def test_a_step_in_which_weights_go_runs_again(
    on_devices: OnDevices, expected: Callable[..., torch.Tensor], count: int, act: Act
) -> None:
    model = on_devices(count)
    with originals_stay(model):
        assert torch.equal(hooked(inside_of_a_step(with_lora(model, 0.7), act)), expected(hooked))


OF_PARTS = (unload_the_parts, unpatch_the_parts, parts_give_all)
KINDS = (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)


@pytest.mark.parametrize("act", OF_PARTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrapper_that_takes_a_part_away_in_each_try_of_a_step_does_not_end_it(
    on_devices: OnDevices, expected: Callable[..., torch.Tensor], kind: str, act: Act
) -> None:
    model = on_devices(2, 30)
    with originals_stay(model):
        moved = around_a_step(with_lora(model, 0.7), kind, act, at=(2, 4))
        assert torch.equal(hooked(moved), expected(hooked))
    assert not any(part.streamed.held for part in model.parts)


@pytest.mark.parametrize("act", [unload_the_parts, unpatch_the_parts])
def test_a_part_that_was_taken_away_goes_when_the_step_is_over(
    on_devices: OnDevices, native: ModelPatcher, plain: torch.Tensor, act: Act
) -> None:
    model = on_devices(2, 30)
    moved = around_a_step(model, WrappersMP.DIFFUSION_MODEL, act)
    assert torch.equal(sample(moved, steps=2), sample(native, steps=2))
    assert [part.streamer.state for part in model.parts] == [State.UNLOADED]
    assert torch.equal(sample(model), plain)
    assert [part.streamer.state for part in model.parts] == [State.LOADED]


@pytest.mark.parametrize(("count", "act"), WAYS)
def test_a_model_that_is_moved_before_its_root_is_called_is_loaded_again(
    on_devices: OnDevices, expected: Callable[..., torch.Tensor], count: int, act: Act
) -> None:
    model = on_devices(count)
    with originals_stay(model):
        moved = around_a_step(with_lora(model, 0.7), WrappersMP.APPLY_MODEL, act, (1, 2))
        assert torch.equal(hooked(moved), expected(hooked))


@pytest.mark.parametrize("act", [unload_the_parts, parts_give_all])
def test_a_part_that_is_taken_away_in_each_step_is_there_in_each(
    on_devices: OnDevices, plain: torch.Tensor, act: Act
) -> None:
    model = on_devices(2, 30)

    def take(model: Any) -> None:
        if model.is_whole:
            act(model)

    assert torch.equal(sample(inside_of_a_step(model, take, always=True)), plain)


@pytest.mark.parametrize("act", [unload_everything, home_gives_way])
def test_a_model_whose_weights_go_in_each_step_fails_with_the_reason(
    on_devices: OnDevices, plain: torch.Tensor, act: Act
) -> None:
    model = on_devices(1)
    sample(model)

    def take(model: Any) -> None:
        if model.is_whole:
            act(model)

    with pytest.raises(WeightsMovedError, match=r"weights of tiny-flux\S* were taken off .* in the middle of a step"):
        sample(inside_of_a_step(model, take, always=True))
    assert torch.equal(sample(model), plain)


@pytest.mark.parametrize("act", [parts_give_way, unload_the_parts])
def test_a_part_that_cannot_be_loaded_at_once_keeps_hooks(
    on_devices: OnDevices,
    expected: Callable[..., torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    act: Act,
) -> None:
    model = on_devices(2, 30)
    weights = model.parts[0].streamer.site.weight_copies
    carry_out, refusals = weights.carry_out, []

    def refuse_once(*arguments: Any) -> None:
        if not refusals:
            refusals.append(arguments)
            raise torch.OutOfMemoryError("no room")
        carry_out(*arguments)

    def act_and_refuse(model: Any) -> None:
        act(model)
        monkeypatch.setattr(weights, "carry_out", refuse_once)

    with originals_stay(model):
        assert torch.equal(hooked(between_steps(with_lora(model, 0.7), act_and_refuse)), expected(hooked))
    assert refusals


@pytest.mark.parametrize("count", [1, 2])
def test_master_copies_with_hooks_in_them_stay(on_devices: OnDevices, native: ModelPatcher, count: int) -> None:
    model, expected = on_devices(count), hooked(native, both=True)
    sample(model)
    held: list[int] = []

    def others_need_memory(ours: Any) -> None:
        for streamer in ours.streamers:
            held.append(streamer.snapshot().pinned_bytes)
            devices.pins.make_room(1 << 50, streamer)  # Of all others.
            held.append(streamer.give_up_masters(1 << 50))

    with originals_stay(model):
        assert torch.equal(hooked(between_steps(model, others_need_memory), both=True), expected)
    assert held[0] > 0
    assert set(held[1::2]) == {0}


def test_another_clone_that_is_loaded_in_between_is_in_effect_as_with_the_host(
    on_devices: OnDevices, native: ModelPatcher
) -> None:
    def run(model: Any, streams: bool) -> torch.Tensor:
        other = with_lora(model, -0.9)

        def load_another(running: Any) -> None:
            mm.load_models_gpu([other])
            if streams:
                home_gives_way(other)

        return sample(between_steps(with_lora(model, 0.7), load_another), steps=4)

    expected = run(native, streams=False)
    assert not torch.equal(expected, sample(with_lora(native, 0.7), steps=4))
    for count in (1, 2):
        assert torch.equal(run(on_devices(count), streams=True), expected)


def test_injections_and_object_patches_are_back(streamed: Load, native: ModelPatcher) -> None:
    with torch.inference_mode(False):
        torch.manual_seed(0)
        layer = torch.nn.Linear(64, 256)

    def changed(model: Any) -> Any:
        model = with_lora(model, 0.7)
        model.add_object_patch("diffusion_model.img_in", layer)
        return model

    ours, state, seen = changed(streamed()), ["out"], list[str]()
    injection = PatcherInjection(lambda _: state.append("in"), lambda _: state.append("out"))
    ours.set_injections("test", [injection])
    sampled = inside_of_a_step(between_steps(ours, unload_everything), lambda _: seen.append(state[-1]), always=True)
    assert torch.equal(sample(sampled, steps=4), sample(changed(native), steps=4))
    assert seen == ["in"] * 4


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("act", [unload_everything, unload_the_home])
def test_a_model_that_is_called_by_itself_is_loaded_again(on_devices: OnDevices, count: int, act: Act) -> None:
    model = with_lora(on_devices(count), 0.7)
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(1, 16, SIDE, SIDE, generator=generator), torch.randn(1, TOKENS, 768, generator=generator)
    call = partial(model.model.apply_model, x, torch.tensor([0.5]), c_crossattn=context, y=context[:, 0])
    with torch.inference_mode():
        mm.load_models_gpu([model])
        expected = call()
        act(model)
        assert model.streamer.state is State.UNLOADED
        for _ in range(3):
            assert torch.equal(call(), expected)
        assert model in [loaded.model for loaded in mm.current_loaded_models]
    assert model.streamed._guard is None


def test_a_part_without_room_is_no_reason_to_run_without_it(on_devices: OnDevices) -> None:
    model = with_lora(on_devices(2, 30), 0.7)
    x, context = torch.zeros(1, 16, SIDE, SIDE), torch.zeros(1, TOKENS, 768)
    with torch.inference_mode():
        mm.load_models_gpu([model])
        unload_the_parts(model)
        model.parts[0].streamer.backend.store.budget = 1
        with pytest.raises(RuntimeError, match="there is no room for that part"):
            model.model.apply_model(x, torch.tensor([0.5]), c_crossattn=context, y=context[:, 0])
