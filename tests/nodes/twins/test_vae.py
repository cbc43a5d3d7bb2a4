"""A VAE of a real architecture on the device where it is placed, also where it came with dynamic VRAM."""

from __future__ import annotations

import comfy.memory_management
import comfy.model_management as mm
import comfy.model_patcher
import comfy.sd
import comfy.utils
import comfy_aimdo.host_buffer
import folder_paths
import pytest
import torch
from comfy.model_patcher import ModelPatcher, ModelPatcherDynamic
from placing import CPU, SECOND, Machine
from safetensors.torch import load_file
from vaes import KINDS, load_vae, results, write_kind
from weightstream.nodes.twins.vae import vae_on

pytestmark = pytest.mark.usefixtures("one_thread")

GPUS = torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file is in float32, as these are in the wild."""
    folder = tmp_path_factory.mktemp("vaes")
    folder_paths.add_model_folder_path("vae", str(folder))
    write_kind(request.param, folder / name_of(request.param))
    return request.param


def name_of(kind: str) -> str:
    return f"{kind}.safetensors"


def reference(kind: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """By a VAE of the host that was loaded for the CPU, without dynamic VRAM."""
    tensors, metadata = comfy.utils.load_torch_file(folder_paths.get_full_path("vae", name_of(kind)), None, None, True)
    return results(comfy.sd.VAE(tensors, CPU, None, dtype, metadata), kind)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.isfinite().all(), name
        assert tensor.std() > 0, name
        assert torch.equal(tensor, expected[name]), name


@pytest.fixture
def dynamic(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host loads as it does with dynamic VRAM on a GPU that computes in bfloat16; of the GPU nothing is used."""
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", ModelPatcherDynamic)
    monkeypatch.setattr(comfy.utils, "load_safetensors", lambda path: (load_file(path), {}))  # That of aimdo's library.
    monkeypatch.setattr(comfy_aimdo.host_buffer, "HostBuffer", lambda *_: None)
    monkeypatch.setattr(ModelPatcherDynamic, "__del__", lambda patcher: None)
    monkeypatch.setattr(mm, "vae_device", lambda: GPUS[0])
    monkeypatch.setattr(mm, "should_use_bf16", lambda device=None, *_, **__: not mm.is_device_cpu(device))


def test_a_vae_with_dynamic_vram_computes_on_the_cpu(kind: str, dynamic: None) -> None:
    vae = load_vae(name_of(kind))
    assert (type(vae.patcher), vae.vae_dtype) == (ModelPatcherDynamic, torch.bfloat16)
    assert {weight.dtype for weight in vae.first_stage_model.parameters()} == {torch.float32}, "as in the file"
    moved = vae_on(vae, CPU)
    assert (type(moved.patcher), moved.patcher.load_device, moved.device) == (ModelPatcher, CPU, CPU)
    assert_same(results(moved, kind), reference(kind, torch.float32))
    assert vae_on(vae, CPU).first_stage_model is moved.first_stage_model, "it was made once more"
    assert (type(vae.patcher), vae.device, vae.vae_dtype) == (ModelPatcherDynamic, GPUS[0], torch.bfloat16)


def test_a_dtype_that_was_asked_for_is_kept(kind: str, dynamic: None, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = reference(kind, torch.bfloat16)
    monkeypatch.setattr(mm, "vae_dtype", lambda *_: torch.bfloat16)  # As --bf16-vae.
    assert_same(results(vae_on(load_vae(name_of(kind)), CPU), kind), expected)


def test_what_was_changed_in_place_goes_to_the_cpu_too(kind: str, dynamic: None) -> None:
    def change(vae: comfy.sd.VAE) -> comfy.sd.VAE:
        for layer in vae.first_stage_model.modules():
            if isinstance(layer, torch.nn.Conv2d) and layer.padding != (0, 0):
                layer.padding_mode = "circular"
        return vae

    tensors = comfy.utils.load_torch_file(folder_paths.get_full_path("vae", name_of(kind)))
    expected = results(change(comfy.sd.VAE(tensors, CPU, None, torch.float32)), kind)
    vae = load_vae(name_of(kind))
    vae_on(vae, CPU)
    assert_same(results(vae_on(change(vae), CPU), kind), expected)


def test_a_vae_keeps_dynamic_vram_on_another_gpu(kind: str, dynamic: None) -> None:
    vae = load_vae(name_of(kind))
    moved = vae_on(vae, GPUS[1])
    assert type(moved.patcher) is ModelPatcherDynamic
    assert (moved.patcher.load_device, moved.device, moved.vae_dtype) == (GPUS[1], GPUS[1], torch.bfloat16)
    assert moved.patcher.offload_device == CPU
    assert GPUS[1] in moved.first_stage_model.dynamic_pins
    assert moved.first_stage_model is moved.patcher.model is not vae.first_stage_model
    notes = [getattr(layer, "weight_comfy_model_dtype", None) for layer in moved.first_stage_model.modules()]
    assert torch.bfloat16 in notes


def test_a_vae_goes_to_another_gpu_and_gives_the_same(kind: str, machine: Machine) -> None:
    machine(2)
    vae = load_vae(name_of(kind))
    expected = results(vae, kind)
    moved = vae_on(vae, SECOND)
    assert (moved.device, moved.patcher.load_device) == (SECOND, SECOND)
    assert_same(results(moved, kind), expected)
    assert_same(results(vae, kind), expected)
