"""The node "GPU Placement": a MODEL, a CLIP and a VAE run where it says, and workflows of other machines run too."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.sd
import comfy_aimdo.host_buffer
import folder_paths
import pytest
import torch
from comfy.model_patcher import ModelPatcher, ModelPatcherDynamic
from prompts import check_streams, guided
from sampling import MB, MODEL, sample, with_lora
from text_encoders import FAMILIES, PROMPTS, encode, load, random_patches, write_encoder
from vaes import VAE, decode, write_vae
from weightstream.nodes import components, devices, gpu_placement, status
from weightstream.nodes.gpu_placement import GpuPlacement
from weightstream.nodes.loader import load_streamed
from weightstream.nodes.offload import Mode, OffloadSettings
from weightstream.nodes.patcher import StreamedModelPatcher
from weightstream.nodes.settings import with_settings
from weightstream.nodes.text_encoder import with_patcher
from weightstream.streaming import ConfigError, UnsupportedModelError, VirtualMemory

import nodes as host_nodes

CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cpu", 0), torch.device("cpu", 1)
# As it is saved on a machine with four GPUs.
OF_FOUR = {
    "devices": "gpu:3,gpu:1,gpu:0,gpu:2",
    "split": "ratio",
    "ratio": "40,30,20,10",
    "clip_device": "gpu:2",
    "vae_device": "gpu:3",
    "on_missing": "fallback",
}

Machine = Callable[..., tuple[VirtualMemory, ...]]


def place(model: Any, *, clip: Any = None, vae: Any = None, **inputs: Any) -> tuple[Any, Any, Any]:
    with torch.inference_mode():
        return GpuPlacement.execute(model, clip, vae, **inputs).result


def place_clip(model: Any, clip: Any, device: str) -> Any:
    return place(model, devices="gpu:0", clip=clip, clip_device=device)[1]


def place_vae(model: Any, vae: Any, device: str) -> Any:
    return place(model, devices="gpu:0", vae=vae, vae_device=device)[2]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Gives this machine as many virtual devices as are asked for."""

    def have(count: int, budget: int = 24 * MB) -> tuple[VirtualMemory, ...]:
        devices.read_environment()
        memories = tuple(VirtualMemory(budget, f"virtual:{index}") for index in range(count))
        monkeypatch.setattr(devices._virtual, "devices", memories)
        return memories

    monkeypatch.delenv("WEIGHTSTREAM_GPUS", raising=False)
    return have


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the node has said."""
    texts: list[str] = []
    announce = status.announce

    def listen(name: str, text: str, *rest: Any, **options: Any) -> None:
        if name == gpu_placement.NAME:
            texts.append(text)
        announce(name, text, *rest, **options)

    monkeypatch.setattr(status, "announce", listen)
    return texts


@pytest.fixture
def asked_to_split(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """No model can be split; what was asked for."""
    asked: list[tuple] = []

    def refuse(model: Any, *arguments: Any) -> Any:
        asked.append(arguments)
        raise UnsupportedModelError("it is made of one piece")

    monkeypatch.setattr(gpu_placement, "split_over", refuse)
    return asked


@pytest.fixture
def loaded(models: Path, machine: Machine) -> Iterator[Any]:
    """The tiny FLUX, streamed, on a machine with two GPUs."""
    machine(2)
    with torch.inference_mode():
        yield load_streamed(str(models / MODEL), {})


@pytest.fixture
def foreign(models: Path) -> ModelPatcher:
    """The same from the host's own loader."""
    with torch.inference_mode():
        return host_nodes.UNETLoader().load_unet(MODEL, "default")[0]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoders") / "qwen.safetensors"
    write_encoder(FAMILIES["qwen"], path)
    return path


@pytest.fixture
def clip(encoder: Path) -> comfy.sd.CLIP:
    return load(FAMILIES["qwen"], encoder)


@pytest.fixture(scope="module")
def vae_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    folder_paths.add_model_folder_path("vae", str(folder))
    write_vae(folder / VAE)
    return folder / VAE


@pytest.fixture
def vae(vae_file: Path) -> comfy.sd.VAE:
    with torch.inference_mode():
        return host_nodes.VAELoader().load_vae(VAE)[0]


# -- the schema --------------------------------------------------------------------------------------------------------


def test_the_inputs_and_outputs() -> None:
    schema = GpuPlacement.define_schema()
    names = ["model", "clip", "vae", "devices", "split", "ratio", "clip_device", "vae_device", "on_missing"]
    assert [entry.id for entry in schema.inputs] == names
    assert [entry.io_type for entry in schema.outputs] == ["MODEL", "CLIP", "VAE"]
    groups = GpuPlacement.INPUT_TYPES()
    assert [*groups["required"], *groups["optional"]] == names, "the host shows them in another order"
    chosen = ["default", "cpu", *(f"gpu:{index}" for index in range(8))]
    assert groups["optional"]["clip_device"][1]["options"] == chosen


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
    assert foreign.offload_device == foreign.load_device, "as with --gpu-only"
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


def test_a_model_that_nobody_can_load_again_stays(foreign: ModelPatcher, machine: Machine, said: list[str]) -> None:
    machine(2)
    foreign.cached_patcher_init = (comfy.sd.load_diffusion_model, ("gone.safetensors",))
    assert place(foreign, devices="gpu:1")[0] is foreign
    foreign.cached_patcher_init = None
    assert place(foreign, devices="gpu:1")[0] is foreign
    stays = "MODEL stays where its loader put it, "
    assert said[0].startswith(f"{stays}it cannot be loaded once more (FileNotFoundError: ")
    assert said[1] == f"{stays}its loader has not left word how to load it once more"


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


def test_a_model_that_cannot_be_split_goes_to_the_preferred_gpu(
    loaded: Any,
    machine: Machine,
    native: ModelPatcher,
    said: list[str],
    asked_to_split: list[tuple],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(3)
    model, _, _ = place(loaded, devices="gpu:1,gpu:0", split="ratio", ratio="3,1")
    assert model.load_device == SECOND
    assert said == ["MODEL is not split, it is made of one piece; MODEL on gpu:1"]
    check_streams(lambda: guided(model), model, guided(native))
    place(loaded)
    monkeypatch.setenv("WEIGHTSTREAM_GPUS", "gpu:2, gpu:0")
    place(loaded, split="equal")
    third = torch.device("cpu", 2)
    assert asked_to_split == [
        ([SECOND, FIRST], "ratio", (0.75, 0.25), None),
        ([FIRST, SECOND, third], "auto", None, None),
        ([third, FIRST], "equal", None, None),
    ]


def test_a_model_that_can_be_split_is_what_the_split_gives(
    loaded: Any, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_placement, "split_over", lambda model, *_: (model, "split"))
    assert place(loaded)[0] == (loaded, "split")
    assert said == ["MODEL on gpu:0, gpu:1"]


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


# -- workflows of other machines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [OF_FOUR, {**OF_FOUR, "devices": ""}], ids=["named", "all"])
def test_a_workflow_of_four_gpus_on_two(
    loaded: Any,
    clip: comfy.sd.CLIP,
    vae: comfy.sd.VAE,
    machine: Machine,
    said: list[str],
    asked_to_split: list[tuple],
    inputs: dict[str, str],
) -> None:
    machine(2)
    assert GpuPlacement.validate_inputs(**without_on_missing(inputs)) is True
    model, same_clip, same_vae = place(loaded, clip=clip, vae=vae, **inputs)
    first = inputs["devices"] == ""
    assert model.load_device == (CPU if first else SECOND)
    assert (same_clip, same_vae) == (clip, vae)
    shares = (4 / 7, 3 / 7) if first else (0.6, 0.4)
    assert asked_to_split == [([FIRST, SECOND] if first else [SECOND, FIRST], "ratio", pytest.approx(shares), None)]
    missing = "gpu:2, gpu:3" if first else "gpu:3, gpu:2"
    assert said == [
        f"{missing} are not there (this machine has gpu:0, gpu:1); MODEL is not split, it is made of one piece; "
        f"MODEL on {'gpu:0' if first else 'gpu:1'}; "
        "CLIP stays where its loader put it; VAE stays where its loader put it"
    ]


def test_a_workflow_of_four_gpus_on_one(
    loaded: Any, clip: comfy.sd.CLIP, machine: Machine, native: ModelPatcher, said: list[str]
) -> None:
    machine(1)
    model, same_clip, _ = place(loaded, clip=clip, **OF_FOUR)
    assert same_clip is clip
    check_streams(lambda: guided(model), model, guided(native))
    assert said[0].startswith("gpu:3, gpu:1, gpu:2 are not there (this machine has gpu:0); MODEL on gpu:0; ")
    assert place(loaded, devices="gpu:2")[0] is loaded
    assert said[1] == "gpu:2 is not there (this machine has gpu:0); MODEL stays where its loader put it"


def test_a_workflow_of_four_gpus_on_none(
    foreign: ModelPatcher, clip: comfy.sd.CLIP, vae: comfy.sd.VAE, machine: Machine, said: list[str]
) -> None:
    machine(0)
    assert place(foreign, clip=clip, vae=vae, **OF_FOUR) == (foreign, clip, vae)
    assert said == [
        "gpu:3, gpu:1, gpu:0, gpu:2 are not there (this machine has no GPU that can be used); "
        "placement is not available here, there is no GPU; everything stays where its loader put it"
    ]


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_placement_is_for_cuda_and_rocm(
    foreign: ModelPatcher, clip: comfy.sd.CLIP, said: list[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(mm, "get_torch_device", lambda: torch.device(kind))
    assert place(foreign, clip=clip, clip_device="cpu") == (foreign, clip, None)
    assert said == [
        f"placement is not available here, it needs CUDA or ROCm, and ComfyUI runs on {kind}; "
        "everything stays where its loader put it"
    ]


def test_what_is_not_there_may_be_an_error(
    foreign: ModelPatcher, machine: Machine, said: list[str], asked_to_split: list[tuple]
) -> None:
    machine(2)
    strict = {**OF_FOUR, "on_missing": "error"}
    advice = "; choose among these, or set on_missing to fallback"
    with pytest.raises(ConfigError) as caught:
        place(foreign, **strict)
    assert str(caught.value) == f"gpu:3, gpu:2 are not there (this machine has gpu:0, gpu:1){advice}"
    with pytest.raises(ConfigError, match="gpu:5 is not there"):
        place(foreign, devices="gpu:1", vae_device="gpu:5", on_missing="error")
    machine(0)
    with pytest.raises(ConfigError, match="this machine has no GPU that can be used"):
        place(foreign, **strict)
    assert said == []
    assert place(foreign, on_missing="error")[0] is foreign
    machine(4)
    assert place(foreign, **strict)[0].load_device == torch.device("cpu", 3)


# -- values that cannot be right ---------------------------------------------------------------------------------------


def without_on_missing(inputs: dict[str, str]) -> dict[str, str]:
    """What ``validate_inputs`` looks at."""
    return {name: value for name, value in inputs.items() if name != "on_missing"}


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({}, True),
        ({"devices": " GPU:12 ", "clip_device": "gpu:31", "vae_device": "CPU"}, True),
        ({"ratio": "not used"}, True),
        ({"devices": None, "split": None, "ratio": None, "clip_device": None, "vae_device": None}, True),
        ({"devices": None, "split": "ratio", "ratio": "60,40"}, True),
        ({"devices": "cuda:0"}, "devices='cuda:0': 'cuda:0' is no GPU; expected a list such as gpu:0,gpu:1"),
        ({"split": "fair"}, "split='fair': expected one of auto, equal, ratio"),
        ({"split": "ratio"}, "ratio='': expected a number above 0 for each device, such as 60,40"),
        (
            {"devices": "gpu:0,gpu:1,gpu:2", "split": "ratio", "ratio": "60,40"},
            "ratio='60,40' has 2 numbers for 3 devices (gpu:0, gpu:1, gpu:2): give one number for each device",
        ),
        ({"clip_device": "gpu"}, "clip_device='gpu': expected default, cpu, or a GPU such as gpu:0"),
        ({"vae_device": "gpu:0,gpu:1"}, "vae_device='gpu:0,gpu:1': expected default, cpu, or a GPU such as gpu:0"),
    ],
)
def test_values_are_read_before_the_prompt_runs(
    inputs: dict[str, Any], expected: bool | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WEIGHTSTREAM_GPUS", raising=False)
    assert GpuPlacement.validate_inputs(**inputs) == expected
    if expected is not True:
        with pytest.raises(ConfigError) as caught:
            place(None, **inputs)
        assert str(caught.value) == expected


def test_the_variable_of_the_process(loaded: Any, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(2)
    monkeypatch.setenv("WEIGHTSTREAM_GPUS", "gpu:1")
    assert place(loaded)[0].load_device == SECOND
    assert place(loaded, devices="default")[0].load_device == SECOND
    assert place(loaded, devices="gpu:0")[0].load_device == CPU
    monkeypatch.setenv("WEIGHTSTREAM_GPUS", "1")
    wrong = "WEIGHTSTREAM_GPUS='1': '1' is no GPU; expected a list such as gpu:0,gpu:1"
    assert GpuPlacement.validate_inputs() == wrong
    with pytest.raises(ConfigError) as caught:
        place(loaded)
    assert str(caught.value) == wrong


def test_fewer_numbers_than_gpus(loaded: Any, machine: Machine) -> None:
    machine(3)
    with pytest.raises(ConfigError, match=r"ratio='60,40' has 2 numbers for 3 devices \(gpu:0, gpu:1, gpu:2\)"):
        place(loaded, split="ratio", ratio="60,40")


def test_the_node_runs_again_when_gpus_have_gone(machine: Machine) -> None:
    machine(2)
    before = GpuPlacement.fingerprint_inputs(model=None, devices="gpu:1")
    assert GpuPlacement.fingerprint_inputs(model=None, devices="gpu:1") == before
    machine(1)
    assert GpuPlacement.fingerprint_inputs(model=None, devices="gpu:1") != before
