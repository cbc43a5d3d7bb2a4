from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import pytest
import torch
from comfy.ldm.flux.model import Flux
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_model_advanced import ModelSamplingFlux
from sampling import MB, MODEL, Patched, sample, with_lora
from weightstream.nodes.loader import load_streamed
from weightstream.nodes.model.patcher import StreamedModelPatcher
from weightstream.nodes.model.patches import HostPatches
from weightstream.streaming import CpuBackend, UnsupportedModelError, VirtualMemory

import nodes as host_nodes

Load = Callable[..., StreamedModelPatcher]


def press(patcher: StreamedModelPatcher, nbytes: int) -> bool:
    """Ask the model for memory as the host's ``free_memory`` does; true when it went altogether."""
    entry = next(loaded for loaded in mm.current_loaded_models if loaded.model.is_clone(patcher))
    gone = entry.model_unload(nbytes)
    if gone:
        mm.current_loaded_models.remove(entry)
    return gone


def test_the_model_streams_and_the_latents_are_the_hosts(streamed: Load, native: ModelPatcher) -> None:
    model = streamed()
    for seed in (3, 4):
        assert torch.equal(sample(model, seed), sample(native, seed))
    status = model.status()
    assert status["mode"] == "streamed"
    assert status["streamed_blocks"] == 6
    assert status["counters"]["steps"] == 6
    assert status["counters"]["misses"] == 0
    assert status["device_peak_bytes"] <= 24 * MB


@pytest.mark.parametrize("limit", [14 * MB, 24 * MB, 28 * MB, 33 * MB, None])
def test_any_limit_gives_the_same_latents(streamed: Load, plain: torch.Tensor, limit: int | None) -> None:
    model = streamed(64 * MB, vram_limit=limit)
    assert torch.equal(sample(model), plain)
    assert model.status()["device_peak_bytes"] <= (limit or 64 * MB)
    assert model.loaded_size() == model.status()["device_bytes"]
    assert (model.status()["mode"] == "resident") is (limit is None)


@pytest.mark.parametrize("limit", [24 * MB, 33 * MB, None])
def test_lora_on_changed_and_off(
    streamed: Load, plain: torch.Tensor, plain_with_lora: Patched, limit: int | None
) -> None:
    model = streamed(64 * MB, vram_limit=limit)
    for strength in (1.0, 0.4, 0.4, -0.7):
        expected = plain_with_lora(strength)
        assert not torch.equal(expected, plain)
        assert torch.equal(sample(with_lora(model, strength)), expected)
    assert torch.equal(sample(model), plain)
    assert model.status()["counters"]["misses"] == 0


def test_two_loras_at_once(streamed: Load, native: ModelPatcher) -> None:
    def twice(base: ModelPatcher) -> ModelPatcher:
        return with_lora(with_lora(base, 0.5), -0.2)

    assert torch.equal(sample(twice(streamed())), sample(twice(native)))


def test_clones_take_turns(streamed: Load, native: ModelPatcher) -> None:
    model = streamed(64 * MB, vram_limit=33 * MB)
    pairs = [(model, native), (with_lora(model, 0.8), with_lora(native, 0.8)), (model.clone(), native)]
    expected = [sample(theirs) for _, theirs in pairs]
    for _ in range(2):
        for (ours, _), latent in zip(pairs, expected, strict=True):
            assert torch.equal(sample(ours), latent)
    # One set of weights serves all of them.
    assert len({id(ours.streamer) for ours, _ in pairs}) == 1


def test_a_clone_stays_streamed_and_the_original_untouched(streamed: Load) -> None:
    model = streamed()
    clone = with_lora(model, 1.0)
    assert type(clone) is StreamedModelPatcher
    assert clone.patches
    assert not model.patches
    assert not clone.is_dynamic()


def test_switching_a_lora_off_touches_changed_weights_only(streamed: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = streamed()
    patched = with_lora(model, 0.5)
    computed: list[str] = []
    compute = StreamedModelPatcher.patch_weight_to_device

    def record(self: StreamedModelPatcher, key: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        computed.append(key)
        return compute(self, key, *args, **kwargs)

    monkeypatch.setattr(StreamedModelPatcher, "patch_weight_to_device", record)
    sample(patched)
    assert sorted(computed) == sorted(patched.patches)
    computed.clear()
    sample(patched)
    sample(patched.clone())
    assert computed == []


def test_memory_pressure_between_two_samplings(streamed: Load, plain: torch.Tensor) -> None:
    model = streamed(64 * MB, vram_limit=33 * MB)
    first = sample(model)
    before = model.status()
    assert before["resident_bytes"] > 0
    assert not press(model, 4 * MB), "it was unloaded altogether"
    after = model.status()
    assert before["device_bytes"] - after["device_bytes"] >= 4 * MB
    assert model.loaded_size() == after["device_bytes"]
    assert after["resident_bytes"] < before["resident_bytes"]
    assert torch.equal(first, plain)
    # The host offers the memory again with the next prompt, and it is used again.
    assert torch.equal(sample(model), first)
    assert model.status()["resident_bytes"] == before["resident_bytes"]


def test_more_pressure_than_streaming_can_meet_unloads_the_model(streamed: Load, plain: torch.Tensor) -> None:
    model = streamed(64 * MB, vram_limit=33 * MB)
    sample(model)
    assert press(model, 30 * MB)
    assert model.status()["device_bytes"] == 0
    assert model.loaded_size() == 0
    assert torch.equal(sample(model), plain)


def test_pressure_with_a_lora(streamed: Load, plain_with_lora: Patched) -> None:
    model = with_lora(streamed(64 * MB), 0.6)
    expected = plain_with_lora(0.6)
    for amount in (3 * MB, 9 * MB, 2 * MB):
        assert torch.equal(sample(model), expected)
        press(model, amount)
        assert torch.equal(sample(model), expected)


@pytest.mark.parametrize("block", [0, 2, 5])
def test_an_interrupt_inside_a_block_and_a_good_run_after_it(streamed: Load, plain: torch.Tensor, block: int) -> None:
    model = streamed()
    sample(model)
    diffusion_model = model.model.diffusion_model
    layer = (*diffusion_model.double_blocks, *diffusion_model.single_blocks)[block]
    state = {name: value.clone() for name, value in model.model.state_dict().items()}
    handle = layer.register_forward_pre_hook(lambda *_: mm.interrupt_current_processing())
    with pytest.raises(mm.InterruptProcessingException):
        sample(model)
    handle.remove()
    for name, value in model.model.state_dict().items():
        assert torch.equal(value, state[name]), f"{name} was left bound to staging memory"
    assert torch.equal(sample(model), plain)


def test_a_freed_model_gives_all_memory_back(streamed: Load, virtual_device: Callable[[int], VirtualMemory]) -> None:
    model = streamed(64 * MB, vram_limit=28 * MB)
    sample(with_lora(model, 0.3))
    memory = model.streamer.backend.store
    assert memory.allocated > 0
    references = [weakref.ref(item) for item in (model, model.model, model.streamer, model.streamed)]
    del model
    gc.collect()
    assert [reference() for reference in references] == [None] * 4
    assert memory.allocated == 0


def test_unloading_everything_and_running_again(streamed: Load, plain: torch.Tensor) -> None:
    model = streamed()
    first = sample(model)
    mm.unload_all_models()
    assert model.status()["device_bytes"] == 0
    assert model.status()["mode"] == "off"
    assert model.model.device == model.offload_device
    assert torch.equal(sample(model), first)
    assert torch.equal(first, plain)


def test_a_second_model_takes_the_place_of_the_first(
    streamed: Load, plain: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = streamed(24 * MB)
    memory = first.streamer.backend.store
    second = streamed(24 * MB)
    second.streamer.backend.store = memory
    for model in (first, second, first):
        assert torch.equal(sample(model), plain)
        assert memory.allocated <= memory.budget


def test_a_failing_load_leaves_the_model_unloaded(
    streamed: Load, plain_with_lora: Patched, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_lora(streamed(), 0.5)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("adapter is damaged")

    with monkeypatch.context() as patch:
        patch.setattr(StreamedModelPatcher, "patch_weight_to_device", fail)
        with pytest.raises(RuntimeError, match="adapter is damaged"):
            sample(model)
    assert model.status()["device_bytes"] == 0
    assert torch.equal(sample(model), plain_with_lora(0.5))


def test_object_patches_of_other_nodes(streamed: Load, native: ModelPatcher, plain: torch.Tensor) -> None:
    def patched(base: ModelPatcher) -> ModelPatcher:
        # A V3 node gives its output in a NodeOutput, an older one in a tuple.
        result = ModelSamplingFlux.execute(base, 2.0, 0.3, 256, 256) if hasattr(ModelSamplingFlux, "execute") else None
        return (result.args if result is not None else ModelSamplingFlux().patch(base, 2.0, 0.3, 256, 256))[0]

    model = streamed()
    expected = sample(patched(native))
    assert not torch.equal(expected, plain)
    assert torch.equal(sample(patched(model)), expected)
    assert torch.equal(sample(model), plain)


def test_another_compute_dtype(streamed: Load, native: ModelPatcher, plain: torch.Tensor) -> None:
    def half(base: ModelPatcher) -> ModelPatcher:
        clone = base.clone()
        clone.set_model_compute_dtype(torch.bfloat16)
        return clone

    model = streamed()
    expected = sample(half(native))
    assert not torch.equal(expected, plain)
    assert torch.equal(sample(half(model)), expected)
    assert torch.equal(sample(model), plain)


def test_a_weight_wrapper_acts_on_streamed_weights(streamed: Load, native: ModelPatcher, plain: torch.Tensor) -> None:
    def negated(base: ModelPatcher) -> ModelPatcher:
        clone = base.clone()
        clone.add_weight_wrapper("diffusion_model.double_blocks.1.img_attn.proj.weight", torch.neg)
        return clone

    model = streamed()
    expected = sample(negated(native))
    assert not torch.equal(expected, plain)
    assert torch.equal(sample(negated(model)), expected)
    assert torch.equal(sample(model), plain)


def test_merging_reads_the_original_weights(streamed: Load) -> None:
    model = streamed()
    key = "diffusion_model.double_blocks.0.img_attn.qkv.weight"
    original = model.get_key_patches()[key][0][0].clone()
    patched = with_lora(model, 1.0)
    sample(patched)
    assert not torch.equal(patched.model.state_dict()[key], original)
    assert torch.equal(patched.get_key_patches()[key][0][0], original)


def test_the_factory_brings_the_streaming_back(streamed: Load, plain: torch.Tensor) -> None:
    model = streamed()
    factory, arguments = model.cached_patcher_init
    again = factory(*arguments, disable_dynamic=True)
    assert type(again) is StreamedModelPatcher
    assert again.streamer is not model.streamer
    mm.unload_all_models()
    deep = model.deepclone_multigpu()
    assert type(deep) is StreamedModelPatcher
    assert deep.streamer is not model.streamer
    assert torch.equal(sample(deep), plain)


def test_to_another_device_and_back(streamed: Load, plain: torch.Tensor) -> None:
    """A clone for another device gets a backend for it; here the other is one that nothing streams to."""
    model = streamed()
    sample(model)
    first = model.streamer.backend
    with pytest.raises(UnsupportedModelError, match="this is meta"):
        model.load(torch.device("meta"), full_load=True)
    model.streamer.move_to(CpuBackend(VirtualMemory(64 * MB)))
    assert first.allocated == 0
    assert torch.equal(sample(model), plain)


def test_several_small_models_give_way_together(models: Path, virtual_device: Callable[[int], VirtualMemory]) -> None:
    memory = virtual_device(60 * MB)
    patchers = [load_streamed(str(models / MODEL), {}, vram_limit=20 * MB) for _ in range(4)]
    for patcher in patchers:
        sample(patcher, steps=1)
        assert memory.allocated <= memory.budget


def test_forced_patches_and_letting_go_twice(streamed: Load, plain_with_lora: Patched) -> None:
    model = with_lora(streamed(), 0.5)
    with torch.inference_mode():
        mm.load_models_gpu([model], force_patch_weights=True)
        assert model.partially_unload(model.offload_device, 1) >= 0
        model.detach()
        model.detach()
        assert model.partially_unload(model.offload_device, 1) == 0
    assert model.loaded_size() == 0
    assert torch.equal(sample(model), plain_with_lora(0.5))


def test_a_patch_on_a_buffer(streamed: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """ModelMergeSimple patches every key, and some models have buffers among them, which ComfyUI leaves as they are."""
    build = Flux.__init__

    def with_buffer(self: Flux, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        self.register_buffer("pos_embed", torch.ones(4))

    monkeypatch.setattr(Flux, "__init__", with_buffer)
    ours = streamed()
    with torch.inference_mode():
        theirs = host_nodes.UNETLoader().load_unet(MODEL, "default")[0]
    found = []
    for model in (theirs, ours):
        clone = model.clone()
        clone.add_patches({"diffusion_model.pos_embed": ("diff", (torch.ones(4),))}, 1.0)
        mm.load_models_gpu([clone])
        found.append(clone.model.diffusion_model.pos_embed.tolist())
    assert found[0] == found[1]


@pytest.mark.parametrize("first", [True, False])
def test_a_patch_on_one_name_of_a_weight_with_two_is_refused(streamed: Load, first: bool) -> None:
    loaded = streamed()
    key = "diffusion_model.single_blocks.1.linear1.weight"
    value = next(value for value in loaded.streamer.blocks.values if value.name == key)
    names = (key, "other.name") if first else ("other.name", key)
    tied = dataclasses.replace(value, name=names[0], aliases=names[1:])
    HostPatches(loaded, [tied])
    with pytest.raises(UnsupportedModelError, match=r"linear1\.weight.* are one weight"):
        HostPatches(with_lora(loaded, 1.0), [tied])


def test_two_models_of_one_prompt_make_room_for_each_other(
    models: Path, virtual_device: Callable[[int], VirtualMemory], plain_with_lora: Patched
) -> None:
    memory = virtual_device(60 * MB)
    first, second = (with_lora(load_streamed(str(models / MODEL), {}), 0.5) for _ in range(2))
    mm.load_models_gpu([first, second])
    assert first.loaded_size() > 0
    assert second.loaded_size() > 0
    assert memory.allocated <= memory.budget
    expected = plain_with_lora(0.5)
    assert torch.equal(sample(first), expected)
    assert torch.equal(sample(second), expected)


def test_nothing_is_loaded_by_asking_for_memory(streamed: Load) -> None:
    model = streamed(64 * MB)
    for wanted in (-MB, 0, MB):
        assert model.partially_unload(model.offload_device, wanted) == 0
    assert model.loaded_size() == 0


def test_giving_way_makes_nothing_and_says_what_it_gave_up(streamed: Load, native: ModelPatcher) -> None:
    model = streamed(64 * MB)
    sample(model)
    assert model.status()["mode"] == "resident"
    assert not press(model, 5 * MB)
    status = model.status()
    assert status["pinned_bytes"] == status["pageable_bytes"] == 0
    assert status["explain"].startswith("gave up ")
    # No host asks for it to be loaded again: the next step sees to that, with what is left.
    model.model.current_patcher = model
    x = torch.zeros(1, 16, 16, 16)
    conditioning = {"c_crossattn": torch.zeros(1, 4, 768), "y": torch.zeros(1, 768), "guidance": torch.ones(1)}
    with torch.inference_mode():
        result = model.model.apply_model(
            x, torch.ones(1), transformer_options={"wrappers": model.wrappers}, **conditioning
        )
    assert model.status()["mode"] == "streamed"
    model.model.current_patcher = None
    mm.unload_all_models()
    mm.load_models_gpu([native])
    with torch.inference_mode():
        assert torch.equal(native.model.apply_model(x, torch.ones(1), **conditioning), result)


def test_originals_are_shown_after_unloading_too(streamed: Load) -> None:
    model = streamed()
    sample(with_lora(model, 1.0))
    mm.unload_all_models()
    key = "diffusion_model.double_blocks.0.img_attn.qkv.weight"
    before = model.model_state_dict()[key].clone()
    model.get_key_patches("diffusion_model.")
    assert torch.equal(model.model_state_dict()[key], before)
