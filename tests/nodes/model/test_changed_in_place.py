"""What somebody has changed in place on a MODEL, CLIP or VAE is not lost where that is placed, split or given back."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import comfy.model_management as mm
import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from placing import CPU, SECOND, Machine, place, place_clip, place_vae
from sampling import MB, MODEL, sample
from text_encoders import PROMPTS, encode
from vaes import decode
from weightstream.nodes.gpu_placement import STREAMS
from weightstream.nodes.loader import load_streamed
from weightstream.nodes.model.offload import Mode, OffloadSettings
from weightstream.nodes.model.patcher import StreamedModelPatcher
from weightstream.nodes.settings import clip_with_settings, with_settings
from weightstream.nodes.twins.components import model_on
from weightstream.nodes.twins.takeover import anew, give_back
from weightstream.nodes.twins.vae import vae_on
from weightstream.streaming import UnsupportedModelError

pytestmark = pytest.mark.usefixtures("one_thread")

# -- the MODEL ---------------------------------------------------------------------------------------------------------


def louder(self: torch.nn.Module, *args: Any, **options: Any) -> torch.Tensor:
    return type(self).forward(self, *args, **options) * 1.05


def function(transformer: Any) -> None:
    for block in transformer.single_blocks:
        block.forward = MethodType(louder, block)


def hook(transformer: Any) -> None:
    transformer.single_blocks[1].linear2.register_forward_hook(lambda module, inputs, output: output * 1.2)


def number(transformer: Any) -> None:
    transformer.double_blocks[0].img_norm1.eps = 0.5


def layer(transformer: Any) -> None:
    transformer.single_blocks[2].pre_norm = torch.nn.Identity()


def weights(transformer: Any) -> None:
    one, two = transformer.single_blocks[0].linear1, transformer.single_blocks[3].linear1
    one.weight, two.weight = two.weight, one.weight


CHANGES: list[Callable[[Any], None]] = [function, hook, number, layer, weights]


def change_in_place(model: ModelPatcher, change: Callable[[Any], None]) -> ModelPatcher:
    with torch.inference_mode():
        change(model.model.diffusion_model)
    return model


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_of_the_hosts_loader(
    foreign: ModelPatcher, plain: torch.Tensor, machine: Machine, said: list[str], change: Callable[[Any], None]
) -> None:
    memories = machine(2)
    before = place(foreign, devices="gpu:1")[0]
    expected = sample(change_in_place(foreign, change))
    moved = place(foreign, devices="gpu:1")[0]
    assert torch.equal(sample(moved), expected)
    assert [memory.allocated > 0 for memory in memories] == [False, True]
    assert place(foreign, devices="gpu:1")[0].streamer is moved.streamer, "it was made once more"
    assert torch.equal(sample(before), plain), "what was placed before is what it was"
    assert said == ["MODEL on gpu:1", *["MODEL on gpu:1" + STREAMS] * 2]
    foreign.load_device = torch.device("cuda", 0)
    with pytest.raises(UnsupportedModelError, match="somebody has changed it since it was loaded"):
        model_on(foreign, CPU)


def test_weights_of_a_streamed_model_that_is_split(loaded: Any, foreign: ModelPatcher, machine: Machine) -> None:
    machine(2)
    expected = sample(change_in_place(foreign, weights))
    split = place(change_in_place(loaded, weights), devices="gpu:0,gpu:1", split="equal")[0]
    assert torch.equal(sample(split), expected)


@pytest.mark.parametrize("change", [function, hook, number, layer])
def test_a_streamed_model_that_is_split_or_given_back(
    loaded: Any, foreign: ModelPatcher, machine: Machine, change: Callable[[Any], None]
) -> None:
    machine(2)
    expected = sample(change_in_place(foreign, change))
    change_in_place(loaded, change)
    split = place(loaded, devices="gpu:0,gpu:1", split="equal")[0]
    assert torch.equal(sample(split), expected)
    assert len(split.streamers) == 2
    assert place(loaded, devices="gpu:0,gpu:1", split="equal")[0].streamer is split.streamer, "it was made once more"
    assert torch.equal(sample(place(split, devices="gpu:1")[0]), expected)
    assert with_settings(loaded, OffloadSettings(Mode.OFF)) is loaded, "the host's own would be without the change"


def test_a_model_that_is_given_back_is_the_one_that_came_in(foreign: ModelPatcher, machine: Machine) -> None:
    """Also where its file gives another one."""
    machine(1, 24 * MB)
    expected = sample(change_in_place(foreign, number))
    streamed = with_settings(foreign, OffloadSettings())
    back = with_settings(streamed, OffloadSettings(Mode.OFF))
    assert back.model is foreign.model
    assert torch.equal(sample(back), expected)


def test_a_file_that_was_cut_short_is_not_touched(models: Path, tmp_path: Path, machine: Machine) -> None:
    machine(2)
    path = Path(shutil.copy(models / MODEL, tmp_path / "own.safetensors"))
    with torch.inference_mode():
        model = load_streamed(str(path), {})
    model.streamer.finish_building()
    os.truncate(path, path.stat().st_size // 2)
    for use in (anew, give_back):
        arguments = (model, None) if use is anew else (model,)
        with pytest.raises(UnsupportedModelError, match="its file is another now"):
            use(*arguments)


# Of a pack that compiles models: what it has made of which.
COMPILED: dict[int, Any] = {}


def compiled_by_table(executor: Any, *args: Any, **options: Any) -> Any:
    transformer = executor.class_obj.diffusion_model
    own, stand_in = transformer.final_layer, COMPILED.get(id(transformer.final_layer))
    if stand_in is None:
        return executor(*args, **options)
    transformer._modules["final_layer"] = stand_in
    try:
        return executor(*args, **options)
    finally:
        transformer._modules["final_layer"] = own


class Compiled(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> torch.Tensor:
        return self.inner(*args) * 1.5


def test_a_wrapper_that_finds_its_modules_in_a_table(
    foreign: ModelPatcher, machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine(2, 24 * MB)
    plain = sample(foreign)
    model = foreign.clone()
    final = model.model.diffusion_model.final_layer
    monkeypatch.setitem(COMPILED, id(final), Compiled(final))
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "compiled by a table", compiled_by_table)
    expected = sample(model)
    assert not torch.equal(expected, plain)
    with caplog.at_level("INFO"):
        passed = with_settings(model, OffloadSettings())
    assert passed is model
    assert "wrappers refers to modules of the model that was loaded" in caplog.text
    assert place(model, devices="gpu:1")[0] is model
    assert torch.equal(sample(passed), expected)
    assert isinstance(with_settings(foreign, OffloadSettings()), StreamedModelPatcher), "which has no such wrapper"


# -- CLIP and VAE ------------------------------------------------------------------------------------------------------


def test_a_text_encoder(foreign: ModelPatcher, clip: comfy.sd.CLIP, machine: Machine, said: list[str]) -> None:
    machine(2, clip.patcher.model_size() * 2)
    plain = encode(clip, PROMPTS[1])
    with torch.inference_mode():
        for name, module in clip.cond_stage_model.named_modules():
            if name.endswith("layers.2.mlp"):
                module.forward = MethodType(louder, module)
    expected = encode(clip, PROMPTS[1])
    assert not torch.equal(plain[0], expected[0])
    moved = place_clip(foreign, clip, "gpu:1")
    assert all(map(torch.equal, encode(moved, PROMPTS[1]), expected))
    assert said == ["MODEL on gpu:0; CLIP on gpu:1" + STREAMS]
    clip.patcher.load_device = torch.device("cuda", 0)
    assert place_clip(foreign, clip, "cpu") is clip
    assert "CLIP stays where its loader put it, somebody has changed it since it was loaded" in said[1]


def test_options_and_functions_of_a_clip(foreign: ModelPatcher, clip: comfy.sd.CLIP, machine: Machine) -> None:
    machine(2)

    def twice(self: comfy.sd.CLIP, text: str) -> Any:
        return type(self).tokenize(self, f"{text} {text}")

    clip.tokenize = MethodType(twice, clip)
    clip.clip_layer(-2)
    clip.set_tokenizer_option("min_length", 20)
    clip.note = "of a pack"
    moved = place_clip(foreign, clip, "gpu:1")
    assert (moved.layer_idx, moved.tokenizer_options, moved.note) == (-2, {"min_length": 20}, "of a pack")
    assert moved.tokenize.__self__ is moved
    assert moved.tokenize("a") == clip.tokenize("a") != type(clip).tokenize(clip, "a")
    own = clip.encode_from_tokens
    clip.encode_from_tokens = lambda *args, **options: own(*args, **options)
    assert place_clip(foreign, clip, "gpu:1") is clip, "it would encode where the first one is"
    assert clip_with_settings(clip, OffloadSettings()) is clip
    del clip.encode_from_tokens
    clip.cond_stage_model = torch.nn.Sequential(clip.cond_stage_model)
    assert place_clip(foreign, clip, "gpu:1") is clip


def tile(vae: comfy.sd.VAE) -> None:
    """As packs make seamless images."""
    for module in vae.first_stage_model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.padding_mode = "circular"


def tile_by_functions(vae: comfy.sd.VAE) -> None:
    def padded(self: Any, x: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor:
        width = self._reversed_padding_repeated_twice
        x = torch.nn.functional.pad(x, width, mode="circular")
        return torch.nn.functional.conv2d(x, weight, bias, self.stride, 0, self.dilation, self.groups)

    for module in vae.first_stage_model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module._conv_forward = MethodType(padded, module)


def exchange_layer(vae: comfy.sd.VAE) -> None:
    decoder = vae.first_stage_model.taesd_decoder
    decoder[3] = torch.nn.Sequential(decoder[3], torch.nn.Tanh())


def scale_weights(vae: comfy.sd.VAE) -> None:
    with torch.inference_mode():
        for weight in vae.first_stage_model.taesd_decoder[3].parameters():
            weight.data.mul_(1.5)


def exchange_output(vae: comfy.sd.VAE) -> None:
    vae.process_output = lambda image: image.mul_(0.5)


@pytest.mark.parametrize("device", ["gpu:1", "cpu"])
@pytest.mark.parametrize("change", [tile, tile_by_functions, exchange_layer, scale_weights, exchange_output])
def test_a_vae(
    foreign: ModelPatcher, vae: comfy.sd.VAE, machine: Machine, change: Callable[[comfy.sd.VAE], None], device: str
) -> None:
    machine(2)
    plain = decode(vae)
    moved_before = place_vae(foreign, vae, "gpu:1")
    change(vae)
    expected = decode(vae)
    assert not torch.equal(expected, plain)
    mm.unload_all_models()
    if device == "cpu":
        vae.patcher.load_device = torch.device("cuda", 0)
    moved = place_vae(foreign, vae, device)
    assert moved.first_stage_model is not vae.first_stage_model
    assert moved.device == (CPU if device == "cpu" else SECOND)
    assert torch.equal(decode(moved), expected)
    assert torch.equal(decode(moved_before), plain)
    again = place_vae(foreign, vae, device)
    assert again.first_stage_model is moved.first_stage_model, "it was made once more"
    vae.patcher.load_device = CPU
    assert torch.equal(decode(vae), expected)


def test_a_vae_in_another_dtype(foreign: ModelPatcher, vae: comfy.sd.VAE, machine: Machine) -> None:
    machine(2)
    vae.first_stage_model.to(torch.bfloat16)
    vae.vae_dtype = torch.bfloat16
    expected = decode(vae)
    moved = place_vae(foreign, vae, "gpu:1")
    assert {weight.dtype for weight in moved.first_stage_model.parameters()} == {torch.bfloat16}
    assert torch.equal(decode(moved), expected)


def test_a_vae_that_no_loader_gives_once_more(foreign: ModelPatcher, vae: comfy.sd.VAE, machine: Machine) -> None:
    machine(2)
    vae.patcher.cached_patcher_init = None
    moved = place_vae(foreign, vae, "gpu:1")
    assert moved.patcher.load_device == SECOND
    assert torch.equal(decode(moved), decode(vae))
    theirs = {weight.data_ptr() for weight in vae.first_stage_model.parameters()}
    assert not theirs & {weight.data_ptr() for weight in moved.first_stage_model.parameters()}


def test_a_vae_that_holds_itself_stays(foreign: ModelPatcher, vae: comfy.sd.VAE, machine: Machine) -> None:
    machine(2)
    own = vae.decode
    vae.decode = lambda samples: own(samples) * 0.5
    with pytest.raises(UnsupportedModelError, match="its decode by a function that refers to it"):
        vae_on(vae, SECOND)
    assert place_vae(foreign, vae, "gpu:1") is vae
    del vae.decode
    layer = vae.first_stage_model.taesd_decoder[1]
    layer.forward = lambda x: type(layer).forward(layer, x) * 2
    assert place_vae(foreign, vae, "gpu:1") is vae
    del layer.forward
    vae.first_stage_model = torch.nn.Sequential(vae.first_stage_model)
    assert place_vae(foreign, vae, "gpu:1") is vae


def test_methods_that_a_vae_has_of_its_model(foreign: ModelPatcher, vae: comfy.sd.VAE, machine: Machine) -> None:
    """As that of SeedVR2 has ``format_encoded``."""
    machine(2)
    vae.format_encoded = vae.first_stage_model.encode
    moved = place_vae(foreign, vae, "gpu:1")
    assert moved.format_encoded.__self__ is moved.first_stage_model
