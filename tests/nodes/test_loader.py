from __future__ import annotations

import json
import logging
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
import comfy.model_management as mm
import comfy.ops
import comfy.supported_models
import folder_paths
import pytest
import torch
from comfy.cli_args import args
from comfy.model_patcher import ModelPatcher
from sampling import LORA, MB, MODEL, sample
from weightstream.nodes.gpu_placement import GpuPlacement
from weightstream.nodes.host import devices, mapped
from weightstream.nodes.loader import CheckpointError, StreamedModelLoader, load_streamed
from weightstream.nodes.model.offload import OffloadSettings, host_config
from weightstream.nodes.model.patcher import StreamedModelPatcher
from weightstream.nodes.report import StreamingReport
from weightstream.nodes.settings import AsyncOffloadSettings
from weightstream.streaming import BudgetError, ConfigError, CpuBackend, CudaBackend, VirtualMemory
from weightstream.streaming.model import blocks

import nodes as host_nodes

Load = Callable[..., StreamedModelPatcher]


def execute(**inputs: Any) -> ModelPatcher:
    with torch.inference_mode():
        return StreamedModelLoader.execute(**inputs).args[0]


def test_the_inputs_are_those_of_load_diffusion_model(models: Path) -> None:
    theirs = host_nodes.UNETLoader.INPUT_TYPES()["required"]
    schema = StreamedModelLoader.define_schema()
    ours = {entry.id: entry for entry in schema.inputs}
    assert list(ours) == [*theirs, "vram_limit_gb"]
    models_alone = list(theirs["unet_name"][0])
    checkpoints = [name for name in folder_paths.get_filename_list("checkpoints") if name not in models_alone]
    assert list(ours["unet_name"].options) == models_alone + checkpoints
    assert list(ours["weight_dtype"].options) == list(theirs["weight_dtype"][0])
    assert ours["vram_limit_gb"].optional
    assert (schema.node_id, schema.category) == ("WeightStreamModelLoader", "weightstream")


def test_the_pack_registers_the_node(nodes_of_pack: dict[str, type]) -> None:
    assert nodes_of_pack == {
        "WeightStreamModelLoader": StreamedModelLoader,
        "WeightStreamOffloadSettings": AsyncOffloadSettings,
        "WeightStreamGPUPlacement": GpuPlacement,
        "WeightStreamReport": StreamingReport,
    }


@pytest.mark.parametrize("weight_dtype", ["default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"])
def test_every_weight_dtype_gives_the_hosts_latents(
    models: Path, virtual_device: Callable[[int], Any], weight_dtype: str
) -> None:
    virtual_device(24 * MB if weight_dtype == "default" else 7 * MB)
    model = execute(unet_name=MODEL, weight_dtype=weight_dtype)
    with torch.inference_mode():
        theirs = host_nodes.UNETLoader().load_unet(MODEL, weight_dtype)[0]
    sample(theirs)
    assert torch.equal(sample(model), sample(theirs))
    assert model.status()["mode"] == "streamed"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_originals_stay_in_the_mapped_file(streamed: Load, models: Path) -> None:
    model = streamed()
    sample(model)
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if MODEL in line:
            ranges.append(tuple(int(part, 16) for part in line.split()[0].split("-")))
    assert ranges
    for spec in (spec for unit in model.streamer.blocks.units for spec in unit.layout.specs):
        address = spec.original.data_ptr()
        assert any(start <= address < end for start, end in ranges), f"{spec.name} was copied"


def test_without_a_gpu_the_model_is_the_hosts_and_says_so(
    models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, plain: torch.Tensor
) -> None:
    devices.read_environment()
    monkeypatch.setattr(devices._virtual, "devices", ())
    with caplog.at_level(logging.INFO):
        model = execute(unet_name=MODEL, weight_dtype="default")
    assert type(model) is ModelPatcher
    assert "not streamed, loaded ComfyUI's own way: there is no GPU" in caplog.text
    assert torch.equal(sample(model), plain)


def test_a_malformed_variable_is_an_error_that_shows_the_form(
    models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(devices, "_virtual", devices._Virtual())
    monkeypatch.setenv("WEIGHTSTREAM_VIRTUAL", "two of them")
    devices.read_environment()
    assert "such as 2x24MB" in caplog.text
    with pytest.raises(ConfigError, match="such as 2x24MB"):
        execute(unet_name=MODEL, weight_dtype="default")


def test_virtual_devices_are_read_at_start_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_virtual", devices._Virtual())
    monkeypatch.setenv("WEIGHTSTREAM_VIRTUAL", "3x5MB")
    devices.read_environment()
    monkeypatch.setenv("WEIGHTSTREAM_VIRTUAL", "1x1MB")
    devices.read_environment()
    memories = devices.virtual_devices()
    assert [(memory.name, memory.budget) for memory in memories] == [(f"gpu:{i}", 5 * MB) for i in range(3)]


def damaged(models: Path, name: str, content: bytes) -> str:
    path = models / name
    path.write_bytes(content)
    return str(path)


def header(entries: dict[str, Any]) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


BAD_FILES = {
    "empty": b"",
    "text": b"<html>404 not found</html>",
    "zip": b"PK\x03\x04" + b"\0" * 100,
    "huge-header": struct.pack("<Q", 1 << 60) + b"{}",
    "lying": header({"a": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}) + b"\0" * 100,
    "no-json": struct.pack("<Q", 4) + b"{{{{" + b"\0" * 10,
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_damaged_file_is_named(streamed: Load, models: Path, kind: str) -> None:
    path = damaged(models, f"{kind}.safetensors", BAD_FILES[kind])
    with pytest.raises(CheckpointError) as caught:
        load_streamed(path, {})
    assert path in str(caught.value)
    assert "ownload it again" in str(caught.value)


def test_a_truncated_file_is_named_and_the_next_one_loads(streamed: Load, models: Path, plain: torch.Tensor) -> None:
    content = (models / MODEL).read_bytes()
    for keep in (len(content) - 1, len(content) // 2, 1000):
        path = damaged(models, "truncated.safetensors", content[:keep])
        with pytest.raises(CheckpointError, match="truncated"):
            load_streamed(path, {})
    assert torch.equal(sample(streamed()), plain)


def test_a_file_that_is_no_diffusion_model_is_named(streamed: Load, models: Path) -> None:
    streamed()
    with pytest.raises(CheckpointError, match="knows no diffusion model") as caught:
        load_streamed(str(models / LORA), {})
    assert LORA in str(caught.value)


def test_a_damaged_file_of_another_format_is_named(streamed: Load, models: Path) -> None:
    streamed()
    for name in ("junk.ckpt", "junk.pt", "junk.gguf", "junk.bin"):
        path = damaged(models, name, b"junk" * 100)
        with pytest.raises(CheckpointError) as caught:
            load_streamed(path, {})
        assert path in str(caught.value)


def test_another_thread_loads_with_the_hosts_class_meanwhile(streamed: Load) -> None:
    import comfy.model_patcher

    model = streamed().model
    made: list[type] = []

    def make() -> None:
        cpu = torch.device("cpu")
        made.append(type(comfy.model_patcher.CoreModelPatcher(model, load_device=cpu, offload_device=cpu)))

    with mapped.mapped_loading():
        make()
        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
    assert made == [mapped.MappedModelPatcher, ModelPatcher]


def test_a_file_that_is_not_there_is_the_hosts_error(models: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
        execute(unet_name="gone.safetensors", weight_dtype="default")


def test_a_limit_below_one_block_names_a_minimum_that_works(streamed: Load, plain: torch.Tensor) -> None:
    with pytest.raises(BudgetError, match=r"vram_limit_gb=0\.000977 is too small for tiny-flux.safetensors") as caught:
        streamed(64 * MB, vram_limit=MB)
    minimum = float(str(caught.value).split("at least ")[1].split(" (GiB)")[0])
    model = streamed(64 * MB, vram_limit=int(minimum * 1024**3))
    assert torch.equal(sample(model), plain)


def test_a_virtual_device_below_one_block_says_so(streamed: Load) -> None:
    model = streamed(2 * MB)
    with pytest.raises(RuntimeError, match=r"2\.0 MiB are too few: .* need 11\.9 MiB"):
        sample(model)
    assert model.status()["device_bytes"] == 0


def write_sparse_sd15(path: Path) -> None:
    """SD 1.5's UNet in fp16, all zeros and with holes on the disk: a model whose blocks are no list of like layers."""
    config = {
        **comfy.supported_models.SD15.unet_config,
        "image_size": 32, "in_channels": 4, "out_channels": 4, "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4], "num_heads": 8, "use_spatial_transformer": True, "legacy": False,
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    }  # fmt: skip
    config.pop("adm_in_channels", None)
    unet = openaimodel.UNetModel(**config, device="meta", operations=comfy.ops.disable_weight_init)
    entries, offset = {}, 0
    for name, tensor in unet.state_dict().items():
        size = tensor.numel() * 2
        entries[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    with path.open("wb") as file:
        file.write(header(entries))
        file.truncate(file.tell() + offset)


def test_a_unet_is_loaded_for_streaming(virtual_device: Callable[[int], Any], tmp_path: Path) -> None:
    virtual_device(24 * MB)
    path = tmp_path / "sd15.safetensors"
    write_sparse_sd15(path)
    with torch.inference_mode():
        model = load_streamed(str(path), {})
    assert len(model.streamer.blocks.blocks) > 40


def test_a_model_without_a_list_of_blocks_is_loaded_the_hosts_way(
    virtual_device: Callable[[int], Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    virtual_device(24 * MB)
    monkeypatch.setattr(blocks, "find_blocks", lambda model: [])  # Every model of the host has one.
    path = tmp_path / "sd15.safetensors"
    write_sparse_sd15(path)
    with caplog.at_level(logging.INFO), torch.inference_mode():
        model = load_streamed(str(path), {})
    assert type(model) is ModelPatcher
    assert "not streamed, loaded ComfyUI's own way: it has no list of repeated blocks" in caplog.text


def test_the_hosts_switches_are_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    device = CpuBackend(VirtualMemory(MB))
    assert host_config(OffloadSettings(), device).copy_streams == 2
    monkeypatch.setattr(mm, "NUM_STREAMS", 5)
    assert host_config(OffloadSettings(), device).copy_streams == 5
    monkeypatch.setattr(mm, "NUM_STREAMS", 0)
    monkeypatch.setattr(args, "disable_async_offload", True)
    monkeypatch.setattr(args, "disable_pinned_memory", True)
    monkeypatch.setattr(mm, "vram_state", mm.VRAMState.NO_VRAM)
    config = host_config(OffloadSettings(vram_limit=7), device)
    assert config.synchronous
    assert not config.pin_memory
    assert config.vram_limit == 7
    assert not config.adaptive
    # No CUDA is called by making the backend of a GPU.
    gpu = CudaBackend(torch.device("cuda:0"))
    assert host_config(OffloadSettings(), gpu).headroom_bytes == 200_000_000
    monkeypatch.setattr(args, "reserve_vram", 1.5)
    assert host_config(OffloadSettings(), gpu).headroom_bytes == int(1.5 * 1024**3)


def test_synchronous_copies_give_the_same_latents(
    streamed: Load, plain: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(args, "disable_async_offload", True)
    model = streamed()
    assert torch.equal(sample(model), plain)
    assert model.status()["mode"] == "synchronous"


def test_the_host_is_left_as_it_was(streamed: Load) -> None:
    import comfy.model_patcher

    before = comfy.model_patcher.CoreModelPatcher
    streamed()
    assert comfy.model_patcher.CoreModelPatcher is before
    with pytest.raises(CheckpointError):
        load_streamed(folder_paths.get_full_path_or_raise("loras", LORA), {})
    assert comfy.model_patcher.CoreModelPatcher is before
