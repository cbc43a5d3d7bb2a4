"""A MODEL, a CLIP and a VAE run on the device where they are placed."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.sd
import comfy_aimdo.host_buffer
import pytest
import torch
from comfy.model_patcher import ModelPatcher, ModelPatcherDynamic
from placing import CPU, FIRST, SECOND, Machine, place, place_clip, place_vae
from prompts import check_streams, guided
from sampling import MB, MODEL, sample, with_lora
from text_encoders import PROMPTS, encode, random_patches
from vaes import decode
from weightstream.nodes import gpu_placement
from weightstream.nodes.gpu_placement import STREAMS
from weightstream.nodes.model.offload import Mode, OffloadSettings
from weightstream.nodes.model.patcher import StreamedModelPatcher
from weightstream.nodes.model.text_encoder import with_patcher
from weightstream.nodes.settings import with_settings
from weightstream.nodes.twins import components
from weightstream.streaming import UnsupportedModelError

import nodes as host_nodes

# -- the MODEL ---------------------------------------------------------------------------------------------------------


def test_a_streamed_model_goes_to_the_gpu_that_is_named(
    loaded: Any, machine: Machine, native: ModelPatcher, said: list[str]
) -> None:
    memories = machine(2)
    expected = guided(native)
    second, _, _ = place(loaded, devices="gpu:1")
    assert second.streamer is loaded.streamer, "it was loaded a second time"
    for _ in range(2):
        check_streams(lambda: guided(second), second, expected)
        assert (memories[0].allocated, memories[1].allocated > 0) == (0, True)
    assert second.streamer.backend.device == SECOND
    assert loaded.load_device == CPU
    # Both of them, in turn, and back.
    for model, place_of in ((loaded, 0), (second, 1), (place(second, devices="gpu:0")[0], 0)):
        check_streams(lambda model=model: guided(model), model, expected)
        assert [memory.allocated > 0 for memory in memories] == [place_of == 0, place_of == 1]
    assert said == ["MODEL on gpu:1", "MODEL on gpu:0"]


def test_what_is_built_ahead_is_built_for_the_gpu_that_is_named(loaded: Any, native: ModelPatcher) -> None:
    second, _, _ = place(loaded, devices="gpu:1")
    assert loaded.streamer.backend.device == SECOND
    expected = sample(native)
    assert torch.equal(sample(second), expected)
    first, _, _ = place(second, devices="gpu:0")
    assert loaded.streamer.backend.device == SECOND, "it was taken off the device where it runs"
    assert torch.equal(sample(first), expected)
    assert loaded.streamer.backend.device == FIRST


def test_models_that_belong_to_it_come_along(loaded: Any, foreign: ModelPatcher) -> None:
    loaded.set_additional_models("other", [foreign])
    loaded.set_additional_models("multigpu", [foreign])
    moved, _, _ = place(loaded, devices="gpu:1")
    assert [model.load_device for model in moved.get_additional_models_with_key("other")] == [SECOND]
    assert moved.get_additional_models_with_key("multigpu") == [], "the host makes these for the device that it has"
    assert loaded.get_additional_models_with_key("other") == [foreign]


def test_where_weights_wait_for_their_turn(foreign: ModelPatcher, vae: comfy.sd.VAE, machine: Machine) -> None:
    machine(2)
    assert foreign.offload_device == foreign.load_device == CPU
    assert place(foreign, devices="gpu:1")[0].offload_device == CPU, "its loader has put it on the CPU"
    foreign.offload_device = foreign.load_device = torch.device("cpu", 0)  # As a GPU with --gpu-only.
    assert place(foreign, devices="gpu:1")[0].offload_device == SECOND
    foreign.offload_device = torch.device("meta")
    assert place(foreign, devices="gpu:1")[0].offload_device == torch.device("meta")
    vae.patcher.load_device = torch.device("cuda", 0)
    moved = place_vae(foreign, vae, "cpu").patcher
    assert (moved.load_device, moved.offload_device) == (CPU, CPU)


@pytest.mark.parametrize("strength", [0.0, 0.7])
def test_patches_go_along(loaded: Any, native: ModelPatcher, strength: float) -> None:
    expected = guided(with_lora(native, strength))
    before, _, _ = place(with_lora(loaded, strength), devices="gpu:1")
    after = with_lora(place(loaded, devices="gpu:1")[0], strength)
    for model in (before, after):
        check_streams(lambda model=model: guided(model), model, expected)


def test_a_model_of_another_loader_goes_there_too(
    foreign: ModelPatcher, machine: Machine, native: ModelPatcher
) -> None:
    machine(2)
    patched = with_lora(foreign, 0.7)
    moved, _, _ = place(patched, devices="gpu:1")
    assert moved.load_device == SECOND
    assert moved.model is not foreign.model
    assert place(foreign, devices="gpu:1")[0].model is moved.model, "it was built once more"
    assert torch.equal(sample(moved), sample(with_lora(native, 0.7)))
    assert torch.equal(sample(place(foreign, devices="gpu:1")[0]), sample(native))
    assert (foreign.load_device, patched.load_device) == (CPU, CPU)
    assert torch.equal(sample(foreign), sample(native))


def test_what_was_built_goes_with_the_model_that_came_in(models: Path, machine: Machine) -> None:
    machine(2)
    with torch.inference_mode():
        foreign = host_nodes.UNETLoader().load_unet(MODEL, "default")[0]
    moved, _, _ = place(foreign, devices="gpu:1")
    sample(moved)
    assert not any(loaded.is_dead() for loaded in mm.current_loaded_models)
    first, built = weakref.ref(foreign.model), weakref.ref(moved.model)
    mm.unload_all_models()
    del foreign, moved
    gc.collect()
    mm.cleanup_models_gc()
    assert (first(), built()) == (None, None)
    assert len(components._built) == 0


def test_a_model_that_is_placed_can_stream(foreign: ModelPatcher, machine: Machine, native: ModelPatcher) -> None:
    memories = machine(2)
    expected = sample(native)
    streamed = with_settings(place(foreign, devices="gpu:1")[0], OffloadSettings())
    assert torch.equal(sample(streamed), expected)
    assert (memories[0].allocated, memories[1].allocated > 0) == (0, True)
    back = with_settings(
        place(with_settings(foreign, OffloadSettings()), devices="gpu:1")[0], OffloadSettings(Mode.OFF)
    )
    assert back.load_device == SECOND
    assert back.model is not foreign.model
    assert torch.equal(sample(back), expected)


@pytest.mark.parametrize("factory", [None, (comfy.sd.load_diffusion_model, ("gone.safetensors",))])
def test_a_model_that_nobody_can_load_again_streams_there(
    foreign: ModelPatcher, machine: Machine, native: ModelPatcher, said: list[str], factory: tuple | None
) -> None:
    memories = machine(2, 24 * MB)
    foreign.cached_patcher_init = factory
    moved, _, _ = place(foreign, devices="gpu:1")
    assert torch.equal(sample(moved), sample(native))
    assert (memories[0].allocated, memories[1].allocated > 0) == (0, True)
    assert place(foreign, devices="gpu:1")[0].streamer is moved.streamer, "it was made once more"
    back, _, _ = place(moved, devices="gpu:0")
    assert torch.equal(sample(back), sample(native))
    assert said == ["MODEL on gpu:1" + STREAMS] * 2 + ["MODEL on gpu:0"]


def test_a_model_that_nobody_can_load_again_stays_where_nothing_streams_to(
    foreign: ModelPatcher, machine: Machine, said: list[str]
) -> None:
    machine(2)
    foreign.load_device = torch.device("cuda", 0)
    for factory in (None, (comfy.sd.load_diffusion_model, ("gone.safetensors",))):
        foreign.cached_patcher_init = factory
        with pytest.raises(UnsupportedModelError) as error:
            components.model_on(foreign, CPU)
        said.append(str(error.value))
    assert said[0] == "its loader has not left word how to load it once more"
    assert said[1].startswith("it cannot be loaded once more (FileNotFoundError: ")


def test_a_model_with_dynamic_vram_keeps_it_on_another_gpu(
    foreign: ModelPatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without a GPU there is no memory to hold.
    monkeypatch.setattr(comfy_aimdo.host_buffer, "HostBuffer", lambda *_: None)
    monkeypatch.setattr(ModelPatcherDynamic, "__del__", lambda patcher: None)
    gpus = torch.device("cuda", 0), torch.device("cuda", 1)
    calls = []

    def load_again(disable_dynamic: bool = False) -> ModelPatcher:
        calls.append(disable_dynamic)
        again = host_nodes.UNETLoader().load_unet(MODEL, "default")[0].model
        return (ModelPatcher if disable_dynamic else ModelPatcherDynamic)(again, gpus[0], CPU)

    patched = with_lora(ModelPatcherDynamic(foreign.model, gpus[0], CPU), 0.7)
    patched.cached_patcher_init = (load_again, ())
    moved, native = (components.patcher_on(patched, device) for device in (gpus[1], CPU))
    assert calls == [False, True]
    assert (type(moved), moved.load_device, moved.offload_device) == (ModelPatcherDynamic, gpus[1], CPU)
    assert gpus[1] in moved.model.dynamic_pins
    assert (type(native), native.load_device, native.offload_device) == (ModelPatcher, CPU, CPU)
    assert patched.patches.keys() == moved.patches.keys() == native.patches.keys() != set()
    assert len({id(patcher.model) for patcher in (patched, moved, native)}) == 3


def test_a_gpu_that_cannot_compute_in_its_dtype(
    foreign: ModelPatcher, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(2)
    other = torch.float16
    monkeypatch.setattr(mm, "unet_manual_cast", lambda weights, device, *_: other if device == SECOND else None)
    moved, _, _ = place(foreign, devices="gpu:1")
    assert moved.get_model_object("manual_cast_dtype") == other
    assert place(foreign, devices="gpu:0")[0] is foreign
    assert foreign.get_model_object("manual_cast_dtype") is None


# -- CLIP and VAE ------------------------------------------------------------------------------------------------------


def test_a_text_encoder_goes_where_it_shall(foreign: ModelPatcher, clip: comfy.sd.CLIP, machine: Machine) -> None:
    machine(2)
    clip.clip_layer(-2)
    clip.add_patches(random_patches(clip), 0.7)
    moved = place_clip(foreign, clip, "gpu:1")
    assert moved.patcher.load_device == SECOND
    assert moved.cond_stage_model is moved.patcher.model
    assert moved.cond_stage_model is not clip.cond_stage_model
    assert all(map(torch.equal, encode(moved, PROMPTS[1]), encode(clip, PROMPTS[1])))
    assert [loaded.device for loaded in mm.current_loaded_models if loaded.model is moved.patcher] == [SECOND]
    assert place_clip(foreign, clip, "gpu:1").cond_stage_model is moved.cond_stage_model
    assert place_clip(foreign, clip, "cpu") is clip


def test_a_streamed_text_encoder_streams_there(foreign: ModelPatcher, clip: comfy.sd.CLIP, machine: Machine) -> None:
    memories = machine(2, clip.patcher.model_size() * 2 // 3)
    streamed = with_patcher(clip, with_settings(clip.patcher, OffloadSettings()))
    moved = place_clip(foreign, streamed, "gpu:1")
    assert isinstance(moved.patcher, StreamedModelPatcher)
    assert moved.cond_stage_model is streamed.cond_stage_model, "it was loaded a second time"
    expected = encode(clip, PROMPTS[0])
    assert all(map(torch.equal, encode(moved, PROMPTS[0]), expected))
    assert moved.patcher.status()["counters"]["streamed_bytes"] > 0
    assert [memory.allocated > 0 for memory in memories] == [False, True]
    native = place_clip(foreign, moved, "cpu")
    assert (type(native.patcher), native.patcher.load_device) == (ModelPatcher, CPU)
    assert all(map(torch.equal, encode(native, PROMPTS[0]), expected))


def test_a_vae_goes_where_it_shall(foreign: ModelPatcher, vae: comfy.sd.VAE, machine: Machine) -> None:
    machine(2)
    moved = place_vae(foreign, vae, "gpu:1")
    assert (moved.device, moved.patcher.load_device) == (SECOND, SECOND)
    assert moved.first_stage_model is moved.patcher.model
    assert (vae.device, vae.patcher.load_device) == (CPU, CPU)
    assert torch.equal(decode(moved), decode(vae))
    assert [loaded.device for loaded in mm.current_loaded_models if loaded.model is moved.patcher] == [SECOND]
    assert place_vae(foreign, vae, "gpu:1").first_stage_model is moved.first_stage_model
    assert place_vae(foreign, vae, "gpu:0") is vae
    assert place_vae(foreign, vae, "default") is vae


def test_a_vae_without_weights_stays(foreign: ModelPatcher, machine: Machine, said: list[str]) -> None:
    machine(2)
    nothing = comfy.sd.VAE({"other": torch.zeros(1)})
    assert place(foreign, vae=nothing, devices="gpu:0", vae_device="gpu:1")[2] is nothing
    assert said == ["MODEL on gpu:0; VAE stays where its loader put it, it has no weights"]


@pytest.fixture
def other_kind(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device of another kind than the CPU, whose tensors have no values: whoever mixes the two fails."""
    device = torch.device("meta")
    free = mm.get_free_memory
    lots = 1 << 40

    def free_memory(dev: torch.device | None = None, torch_free_too: bool = False) -> Any:
        if dev is None or dev.type != "meta":
            return free(dev, torch_free_too)
        return (lots, lots) if torch_free_too else lots

    monkeypatch.setattr(mm, "get_free_memory", free_memory)
    monkeypatch.setattr(gpu_placement, "visible_gpus", lambda: {"gpu:0": CPU, "gpu:1": device})
    return device


class Watch:
    """Where the weights of a model's layers, and what goes into them, are while they run."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.kinds: list[tuple[str, str]] = []
        for layer in model.modules():
            if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
                layer.register_forward_pre_hook(self.note)

    def note(self, layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        self.kinds.append((layer.weight.device.type, inputs[0].device.type))


def test_weights_and_compute_of_a_text_encoder_are_there(
    foreign: ModelPatcher, clip: comfy.sd.CLIP, other_kind: torch.device
) -> None:
    moved = place_clip(foreign, clip, "gpu:1")
    watches = Watch(moved.cond_stage_model), Watch(clip.cond_stage_model)
    with pytest.raises(NotImplementedError, match="meta tensor"):
        encode(moved, PROMPTS[0])  # What it gives has no values, and cannot leave the device.
    assert set(watches[0].kinds) == {("meta", "meta")}
    assert watches[1].kinds == []
    assert {weight.device.type for weight in clip.cond_stage_model.parameters()} == {"cpu"}
    encode(clip, PROMPTS[0])
    assert set(watches[1].kinds) == {("cpu", "cpu")}


def test_weights_and_compute_of_a_vae_are_there(
    foreign: ModelPatcher, vae: comfy.sd.VAE, other_kind: torch.device
) -> None:
    moved = place_vae(foreign, vae, "gpu:1")
    watches = Watch(moved.first_stage_model), Watch(vae.first_stage_model)
    with pytest.raises(NotImplementedError, match="meta tensor"):
        decode(moved)
    assert set(watches[0].kinds) == {("meta", "meta")}
    assert watches[1].kinds == []
    decode(vae)
    assert set(watches[1].kinds) == {("cpu", "cpu")}
