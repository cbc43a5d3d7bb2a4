"""A MODEL whose blocks run on several devices: latents are the host's, and every device has its part of the memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.model_management as mm
import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_lora_extract import LORAType, calc_lora_model
from comfy_extras.nodes_model_merging import ModelSubtract
from sampling import MB, MODEL, Patched, sample, sample_with_hook, with_lora
from weightstream.nodes.host import devices
from weightstream.nodes.loader import load_streamed
from weightstream.nodes.model.offload import Mode, OffloadSettings
from weightstream.nodes.model.parts import split_blocks
from weightstream.nodes.model.patcher import StreamedModelPatcher
from weightstream.nodes.settings import with_settings
from weightstream.nodes.twins import split
from weightstream.nodes.twins.split import split_over
from weightstream.streaming import State, UnsupportedModelError, VirtualMemory

from tools.checkpoints import write_flux

Split = Callable[..., StreamedModelPatcher]


@pytest.fixture
def memories(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[VirtualMemory]]:
    def make(*budgets: int) -> list[VirtualMemory]:
        found = [VirtualMemory(budget, f"gpu:{number}") for number, budget in enumerate(budgets)]
        devices.read_environment()
        monkeypatch.setattr(devices._virtual, "devices", tuple(found))
        return found

    return make


@pytest.fixture
def split_over_devices(models: Path, memories: Callable[..., list[VirtualMemory]]) -> Split:
    def load(*budgets: int, shares: list[float] | None = None, **options: Any) -> StreamedModelPatcher:
        memories(*budgets)
        with torch.inference_mode():
            patcher = load_streamed(str(models / MODEL), {}, **options)
            split_blocks(patcher, [torch.device("cpu", number) for number in range(len(budgets))], shares)
            return patcher

    return load


def modes(model: StreamedModelPatcher) -> list[str]:
    return [streamer.snapshot().mode for streamer in model.streamers]


# Virtual devices, and whether anything streams then. The model takes 38 MB in float32.
BUDGETS = {
    "it fits": ((30 * MB, 30 * MB), False),
    "it streams": ((14 * MB, 14 * MB), True),
    "three": ((12 * MB, 10 * MB, 10 * MB), True),
    "unequal": ((16 * MB, 10 * MB), True),
}


@pytest.mark.parametrize("case", BUDGETS)
def test_latents_are_the_hosts_with_and_without_lora(
    split_over_devices: Split, plain: torch.Tensor, plain_with_lora: Patched, case: str
) -> None:
    budgets, streams = BUDGETS[case]
    expected = {0.0: plain, 0.7: plain_with_lora(0.7)}
    model = split_over_devices(*budgets)
    for strength in (0.0, 0.7, 0.7, 0.0):
        for _ in range(2):
            latent = sample(with_lora(model, strength) if strength else model)
            assert torch.equal(latent, expected[strength]), strength
    assert ("streamed" in modes(model)) is streams
    for streamer, budget in zip(model.streamers, budgets, strict=True):
        assert 0 < streamer.backend.peak <= budget
        assert streamer.counters.steps >= 24
    mm.unload_all_models()
    assert [streamer.device_bytes for streamer in model.streamers] == [0] * len(budgets)
    assert torch.equal(sample(model), expected[0.0])


def test_every_device_has_the_share_that_was_asked_for(split_over_devices: Split, plain: torch.Tensor) -> None:
    model = split_over_devices(60 * MB, 60 * MB, shares=[3, 1])
    assert torch.equal(sample(model), plain)
    blocks = [streamer.outline.model_bytes - streamer.outline.rest_bytes for streamer in model.streamers]
    assert blocks[0] / sum(blocks) == pytest.approx(0.75, abs=0.1)
    assert [streamer.backend.name for streamer in model.streamers] == ["gpu:0", "gpu:1"]


def test_the_host_takes_memory_on_the_device_where_it_is_needed(split_over_devices: Split, plain: torch.Tensor) -> None:
    model = split_over_devices(30 * MB, 30 * MB)
    assert torch.equal(sample(model), plain)
    part = model.parts[0]
    loaded = [entry.model for entry in mm.current_loaded_models]
    assert part in loaded
    before, ours = part.loaded_size(), model.loaded_size()
    freed = part.partially_unload(part.offload_device, before // 2)
    assert freed >= before // 2
    assert model.loaded_size() == ours
    assert torch.equal(sample(model), plain)
    mm.unload_model_and_clones(part)
    part.detach()
    assert part.streamer.state is State.UNLOADED
    with torch.inference_mode():
        mm.load_models_gpu([model])  # Alone, as some nodes do.
    assert torch.equal(sample(model), plain)


@pytest.mark.parametrize("mode", [comfy.hooks.EnumHookMode.MinVram, comfy.hooks.EnumHookMode.MaxSpeed])
def test_hooks_write_to_the_weights_of_all_devices(
    split_over_devices: Split, native: ModelPatcher, plain: torch.Tensor, mode: Any
) -> None:
    expected = sample_with_hook(native, mode)
    model = split_over_devices(14 * MB, 14 * MB)
    for _ in range(2):
        assert torch.equal(sample_with_hook(model, mode), expected)
        assert torch.equal(sample(model), plain)


def test_saved_weights_are_those_of_all_devices(split_over_devices: Split, native: ModelPatcher) -> None:
    model = split_over_devices(14 * MB, 14 * MB)
    sample(model)
    with torch.inference_mode():
        ours, theirs = model.model_state_dict_for_saving(), native.model_state_dict_for_saving()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert model.get_key_patches().keys() == native.get_key_patches().keys()


def test_clones_have_parts_with_their_patches(split_over_devices: Split) -> None:
    model = split_over_devices(14 * MB, 14 * MB)
    patched = with_lora(model, 0.5)
    assert patched.parts[0] is not model.parts[0]
    assert patched.parts[0].model is model.parts[0].model
    assert patched.parts[0]._owner is patched
    assert model.parts[0]._owner is model


def test_an_interrupt_leaves_nothing_bound(split_over_devices: Split, plain: torch.Tensor) -> None:
    model = split_over_devices(14 * MB, 14 * MB)
    sample(model)

    def interrupt(*_: object) -> None:
        raise mm.InterruptProcessingException

    block = model.streamed.placed[3][0]
    handle = block.register_forward_pre_hook(interrupt)
    with pytest.raises(mm.InterruptProcessingException):
        sample(model)
    handle.remove()
    boundary = model.streamed.boundary
    assert (boundary._visits, len(boundary._mirrors)) == ([], 0)
    assert torch.equal(sample(model), plain)


# -- any MODEL over several devices ------------------------------------------------------------------------------------


def over(
    model: ModelPatcher, count: int, split: str = "auto", ratio: list[float] | None = None
) -> StreamedModelPatcher:
    with torch.inference_mode():
        return split_over(model, [torch.device("cpu", number) for number in range(count)], split, ratio, None).patcher


@pytest.fixture(params=["streamed", "by the host"])
def incoming(
    request: pytest.FixtureRequest, models: Path, memories: Callable[..., list[VirtualMemory]]
) -> ModelPatcher:
    memories(14 * MB, 14 * MB)
    with torch.inference_mode():
        if request.param == "streamed":
            return load_streamed(str(models / MODEL), {})
        return comfy.sd.load_diffusion_model(str(models / MODEL))


def test_what_comes_in_is_left_as_it_is(incoming: ModelPatcher, plain: torch.Tensor, plain_with_lora: Patched) -> None:
    model = over(with_lora(incoming, 0.7), 2)
    assert torch.equal(sample(model), plain_with_lora(0.7))
    assert len(model.streamers) == 2
    assert torch.equal(sample(incoming), plain)
    assert torch.equal(sample(with_lora(over(incoming, 2), 0.7)), plain_with_lora(0.7))


def test_what_did_not_change_is_not_loaded_anew(incoming: ModelPatcher, plain: torch.Tensor) -> None:
    first = over(incoming, 2, "ratio", [2, 1])
    assert over(with_lora(incoming, 0.3), 2, "ratio", [2, 1]).model is first.model
    other = over(incoming, 2, "equal")
    assert other.model is not first.model
    for model in (first, other, first):
        assert torch.equal(sample(model), plain)


def test_settings_behind_it_hold_for_all_devices(incoming: ModelPatcher, plain: torch.Tensor) -> None:
    model = over(incoming, 2)
    for mode, name in ((Mode.SYNC, "synchronous"), (Mode.STREAM, "streamed")):
        changed = with_settings(model, OffloadSettings(mode=mode))
        assert torch.equal(sample(changed), plain)
        assert modes(changed) == [name] * 2
    off = with_settings(model, OffloadSettings(mode=Mode.OFF))
    assert not isinstance(off, StreamedModelPatcher)
    assert off.get_additional_models() == []
    assert torch.equal(sample(off), plain)


def test_another_device_gets_the_whole_model(incoming: ModelPatcher, plain: torch.Tensor) -> None:
    model = over(incoming, 2)
    with torch.inference_mode():
        whole = model.deepclone_multigpu(torch.device("cpu", 1))
    assert whole.parts == []
    assert torch.equal(sample(whole), plain)


@pytest.mark.parametrize("case", BUDGETS)
def test_blocks_compute_with_weights_on_their_device(split_over_devices: Split, case: str) -> None:
    budgets, _ = BUDGETS[case]
    model = split_over_devices(*budgets)
    wrong: set[str] = set()

    def check(streamer: Any, name: str, module: torch.nn.Module) -> None:
        for key, weight in module.named_parameters(recurse=False):
            if weight.untyped_storage().data_ptr() not in streamer.backend._live:
                wrong.add(f"{name}.{key}")

    names = {module: name for name, module in model.model.named_modules()}
    for streamer in model.streamers:
        for block in streamer.blocks.blocks:
            for module in block.module.modules():
                module.register_forward_pre_hook(lambda m, _, streamer=streamer: check(streamer, names[m], m))
    for _ in range(2):
        sample(model)
    assert wrong == set()


def test_what_streams_is_built_ahead_on_all_devices(incoming: ModelPatcher) -> None:
    model = over(incoming, 2)
    for streamer in model.streamers:
        streamer.site.supply.builder.wait(lambda: None)
        streamer.site.weight_copies.adopt()
        assert 0 < streamer.snapshot().pageable_bytes + streamer.snapshot().pinned_bytes <= streamer.model_bytes
    if isinstance(incoming, StreamedModelPatcher):
        assert incoming.streamer.snapshot().pageable_bytes == 0, "nobody runs it"


def test_a_split_goes_with_the_model_that_came_in(incoming: ModelPatcher) -> None:
    function, arguments = incoming.cached_patcher_init
    with torch.inference_mode():
        source = function(*arguments)
    model = over(source, 2)
    sample(model)
    references = [weakref.ref(one) for one in (source.model, model.model, *model.streamers, model.streamed.boundary)]
    mm.unload_all_models()
    del source, model
    gc.collect()
    mm.cleanup_models_gc()
    assert [reference() for reference in references] == [None] * len(references)
    assert len(split._splits) == 0


@pytest.mark.parametrize("limit", [None, 13 * MB])
def test_settings_in_front_of_it_hold_and_may_change(
    incoming: ModelPatcher, plain: torch.Tensor, limit: int | None
) -> None:
    for mode, name in ((Mode.STREAM, "streamed"), (Mode.SYNC, "synchronous"), (Mode.STREAM, "streamed")):
        changed = over(with_settings(incoming, OffloadSettings(mode=mode, vram_limit=limit)), 2)
        assert torch.equal(sample(changed), plain)
        assert modes(changed) == [name] * 2
        assert max(streamer.device_bytes for streamer in changed.streamers) <= (limit or 14 * MB)


def test_two_nodes_may_split_one_model_differently(incoming: ModelPatcher, plain: torch.Tensor) -> None:
    first, second = over(incoming, 2, "equal"), over(incoming, 2, "ratio", [3, 2])
    for _ in range(2):
        assert over(incoming, 2, "equal").model is first.model
        assert over(incoming, 2, "ratio", [3, 2]).model is second.model
        assert torch.equal(sample(first), plain)
        assert torch.equal(sample(second), plain)
    third = over(incoming, 2, "ratio", [2, 3])
    assert over(incoming, 2, "equal").model is not first.model, "the oldest has gone"
    assert over(incoming, 2, "ratio", [2, 3]).model is third.model


def test_a_file_that_is_gone(tmp_path: Path, memories: Callable[..., list[VirtualMemory]]) -> None:
    memories(60 * MB, 60 * MB)
    write_flux(tmp_path / "gone.safetensors")
    with torch.inference_mode():
        streamed = load_streamed(str(tmp_path / "gone.safetensors"), {})
        taken_over = with_settings(comfy.sd.load_diffusion_model(str(tmp_path / "gone.safetensors")), OffloadSettings())
    (tmp_path / "gone.safetensors").rename(tmp_path / "renamed.safetensors")
    for model in (streamed, taken_over):
        with pytest.raises(UnsupportedModelError, match=r"it cannot be loaded once more .*Error"):
            over(model, 2)


def test_a_model_that_was_changed_after_it_was_split(
    models: Path, memories: Callable[..., list[VirtualMemory]]
) -> None:
    memories(60 * MB, 60 * MB)
    with torch.inference_mode():
        foreign = comfy.sd.load_diffusion_model(str(models / MODEL))
    before = over(foreign, 2)
    sample(before)
    with torch.no_grad():
        foreign.model.diffusion_model.double_blocks[0].img_mlp[0].weight.data.mul_(1.5)
    after = over(foreign, 2)
    assert after.model is not before.model
    assert torch.equal(sample(after), sample(foreign))


# -- nodes that load the MODEL alone -----------------------------------------------------------------------------------


def difference(one: ModelPatcher, other: ModelPatcher) -> dict[str, torch.Tensor]:
    """By the host's node that extracts a LoRA."""
    with torch.inference_mode():
        model = ModelSubtract().merge(one, other, 1.0)[0]
        name = "diffusion_model."
        return calc_lora_model(model, 4, name, name, {}, LORAType.FULL_DIFF, bias_diff=True)


def test_a_lora_that_is_extracted(split_over_devices: Split, native: ModelPatcher, tmp_path: Path) -> None:
    write_flux(tmp_path / "other.safetensors", seed=5)
    with torch.inference_mode():
        other = comfy.sd.load_diffusion_model(str(tmp_path / "other.safetensors"))
    expected = difference(native, other)
    mm.unload_all_models()
    found = difference(split_over_devices(60 * MB, 60 * MB), other)
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.allclose(found[name].float(), expected[name].float(), atol=1e-2), name


def test_parts_have_the_patches_of_the_clone_that_is_loaded_alone(
    split_over_devices: Split, plain: torch.Tensor
) -> None:
    model = split_over_devices(60 * MB, 60 * MB)
    patched = with_lora(model, 0.7)
    sample(patched)
    with torch.inference_mode():
        mm.load_models_gpu([model])
    assert [part.streamed.loaded() for part in model.parts] == model.parts
    assert torch.equal(sample(model), plain)


def test_a_part_whose_model_nobody_has_any_more_is_unloaded(split_over_devices: Split, native: ModelPatcher) -> None:
    """On GPUs the host has the part in its list for as long as somebody holds it."""
    model = split_over_devices(30 * MB, 30 * MB)
    sample(model)
    (part,), gone = model.parts, weakref.ref(model.model)
    del model
    gc.collect()
    assert gone() is None
    assert part.streamer.state is State.LOADED
    mm.unload_all_models()
    part.detach()
    assert part.loaded_size() == 0
