"""The node "GPU Placement": what it takes, what it says, and workflows of other machines."""

from __future__ import annotations

from typing import Any

import comfy.model_management as mm
import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from placing import CPU, FIRST, SECOND, Machine, place
from prompts import check_streams, guided
from sampling import MB
from weightstream.nodes.gpu_placement import GpuPlacement
from weightstream.streaming import ConfigError
from weightstream.streaming.handoff.boundary import Boundary
from weightstream.streaming.run.recorder import Recorder

# As it is saved on a machine with four GPUs.
OF_FOUR = {
    "devices": "gpu:3,gpu:1,gpu:0,gpu:2",
    "split": "ratio",
    "ratio": "40,30,20,10",
    "clip_device": "gpu:2",
    "vae_device": "gpu:3",
    "on_missing": "fallback",
}

# -- the schema --------------------------------------------------------------------------------------------------------


def test_the_inputs_and_outputs() -> None:
    schema = GpuPlacement.define_schema()
    names = ["model", "clip", "vae", "devices", "split", "ratio", "clip_device", "vae_device"]
    names += ["on_missing", "parallel_bits"]
    assert [entry.id for entry in schema.inputs] == names
    assert [entry.io_type for entry in schema.outputs] == ["MODEL", "CLIP", "VAE"]
    groups = GpuPlacement.INPUT_TYPES()
    assert [*groups["required"], *groups["optional"]] == names, "the host shows them in another order"
    chosen = ["default", "cpu", *(f"gpu:{index}" for index in range(8))]
    assert groups["optional"]["clip_device"][1]["options"] == chosen


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
    loaded: Any, said: list[str], native: ModelPatcher, machine: Machine
) -> None:
    machine(3)
    model = place(loaded)[0]
    assert [streamer.backend.name for streamer in model.streamers] == ["gpu:0", "gpu:1", "gpu:2"]
    assert said == ["MODEL on gpu:0, gpu:1, gpu:2"]
    assert torch.equal(guided(model), guided(native))


def test_the_time_of_a_block_begins_when_its_inputs_have_come(
    loaded: Any, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it has the time of the block before, on the other GPU. Hooks come and go where a step is measured."""
    machine(2)
    model, order = place(loaded)[0], []
    for owner, name in ((Boundary, "_enter_block"), (Recorder, "begin_block"), (Recorder, "end_block")):
        method = getattr(owner, name)

        def noted(*args: Any, method: Any = method, name: str = name) -> Any:
            order.append(name)
            return method(*args)

        monkeypatch.setattr(owner, name, noted)
    guided(model, steps=5)
    begins = [place for place, name in enumerate(order) if name == "begin_block"]
    assert len(begins) >= 2 * 6, "two steps at least are measured, of six blocks"
    for begin in begins:
        assert order[begin - 1 : begin + 2] == ["_enter_block", "begin_block", "end_block"]


def test_a_gpu_without_room_gets_nothing(loaded: Any, said: list[str], native: ModelPatcher, machine: Machine) -> None:
    memories = machine(3)
    memories[0].budget = MB
    model = place(loaded)[0]
    assert [streamer.backend.name for streamer in model.streamers] == ["gpu:1", "gpu:2"]
    assert len(said) == 1
    assert said[0].startswith("MODEL on gpu:1, gpu:2; gpu:0 is left out, it has room for ")
    assert torch.equal(guided(model), guided(native))
    memories[2].budget = MB
    assert place(loaded, devices="gpu:0,gpu:2,gpu:1")[0].load_device == SECOND
    assert said[1].startswith("MODEL is not split, gpu:0: it has room for ")
    assert said[1].endswith("; MODEL on gpu:1")


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
    assert refused(inputs) == []
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


def refused(inputs: dict[str, Any]) -> list[str]:
    """What ComfyUI refuses of these inputs before it runs the prompt: what the node says, and what is not in a menu."""
    menus = {item.id: item.options for item in GpuPlacement.define_schema().inputs if isinstance(item, io.Combo.Input)}
    said = GpuPlacement.validate_inputs(inputs.get("devices", ""))
    names = [name for name, value in inputs.items() if value is not None and value not in menus.get(name, [value])]
    return [*([] if said is True else [str(said)]), *names]


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"devices": " GPU:12 ", "clip_device": "gpu:31", "vae_device": "CPU"},
        {"devices": "cuda:0, 1,gpu:2", "clip_device": "cuda:1", "vae_device": "0"},
        {"ratio": "not used"},
        {"devices": None, "split": None, "ratio": None, "clip_device": None, "vae_device": None},
    ],
)
def test_devices_have_the_names_of_comfyui_torch_and_drivers(inputs: dict[str, Any]) -> None:
    assert refused(inputs) == []


@pytest.mark.parametrize(
    ("inputs", "before", "running"),
    [
        (
            {"devices": "gpux"},
            True,
            "devices='gpux': 'gpux' is no GPU; expected gpu:0, cuda:0 or 0, or a list",
        ),
        (
            {"devices": "0,cuda:0"},
            True,
            "devices='0,cuda:0': gpu:0 is there twice; name each GPU once (this",
        ),
        ({"split": "fair"}, True, "split='fair': expected one of auto, equal, ratio"),
        ({"clip_device": "gpu"}, True, "clip_device='gpu': expected default, cpu, or a GPU such as gpu:0"),
        ({"vae_device": "0,1"}, True, "vae_device='0,1': expected default, cpu, or a GPU such as gpu:0"),
        ({"split": "ratio"}, False, "ratio='': expected a number above 0 for each device, such as 60,40"),
        (
            {"devices": "gpu:0,gpu:1,gpu:2", "split": "ratio", "ratio": "60,40"},
            False,
            "ratio='60,40' has 2 numbers for 3 devices (gpu:0, gpu:1, gpu:2): give one number for each device",
        ),
    ],
)
def test_what_cannot_be_read_is_one_error(
    inputs: dict[str, Any], before: bool, running: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WEIGHTSTREAM_GPUS", raising=False)
    machine(2)
    assert len(refused(inputs)) == int(before)
    with pytest.raises(ConfigError) as caught:
        place(None, **inputs)
    assert str(caught.value).startswith(running)
    if "devices" in inputs and before:
        assert refused(inputs) == [str(caught.value)]
        assert str(caught.value).endswith("(this machine has gpu:0, gpu:1)")


def test_the_variable_of_the_process(loaded: Any, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(2)
    monkeypatch.setenv("WEIGHTSTREAM_GPUS", "gpu:1")
    assert place(loaded)[0].load_device == SECOND
    assert place(loaded, devices="default")[0].load_device == SECOND
    assert place(loaded, devices="gpu:0")[0].load_device == CPU
    monkeypatch.setenv("WEIGHTSTREAM_GPUS", "one")
    wrong = (
        "WEIGHTSTREAM_GPUS='one': 'one' is no GPU; expected gpu:0, cuda:0 or 0, or a list such as gpu:0,gpu:1 "
        "(this machine has gpu:0, gpu:1)"
    )
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
