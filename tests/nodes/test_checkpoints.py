"""Models in several files, and files that hold text encoders and a VAE too."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.sd
import comfy.taesd.taesd
import folder_paths
import pytest
import safetensors.torch
import torch
from comfy.model_patcher import ModelPatcher
from sampling import MB, MODEL, Patched, sample, with_lora
from weightstream.nodes import loader
from weightstream.nodes.host import devices
from weightstream.nodes.loader import CheckpointError, StreamedModelLoader, load_streamed
from weightstream.nodes.model.patcher import StreamedModelPatcher
from weightstream.streaming import UnsupportedModelError

import nodes as host_nodes
from tools.checkpoints import SD35_SIZES, clip_l_tensors, sd35_tensors, write_checkpoint, write_sd35, write_wan

Device = Callable[[int], Any]

SHARDS = [f"flux-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
INDEX = "flux.safetensors.index.json"
FLUX_CHECKPOINT = "flux-checkpoint.safetensors"
SD3_CHECKPOINT = "sd3-checkpoint.safetensors"


def execute(**inputs: Any) -> tuple[Any, Any, Any]:
    with torch.inference_mode():
        return StreamedModelLoader.execute(**{"weight_dtype": "default", **inputs}).args


def write_shards(tensors: dict[str, torch.Tensor], folder: Path, names: list[str], index: str = "") -> None:
    """Spread ``tensors`` over files, in no order that follows the blocks."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [dict(list(tensors.items())[number :: len(names)]) for number in range(len(names))]
    for name, part in zip(names, parts, strict=True):
        safetensors.torch.save_file(part, folder / name, metadata={"format": "pt"})
    if index:
        weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        (folder / index).write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture(scope="module")
def tensors(models: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(models / MODEL)


@pytest.fixture(scope="module")
def sharded(models: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Two folders of ``diffusion_models`` with the tiny FLUX in three files, one of them with an index."""
    write_shards(tensors, models / "indexed", SHARDS, INDEX)
    write_shards(tensors, models / "bare", SHARDS)
    return models


@pytest.fixture(scope="module")
def checkpoints(models: Path, tensors: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ``checkpoints``: a FLUX without companions, and an SD3.5 with CLIP-L and a small VAE."""
    folder = tmp_path_factory.mktemp("checkpoints")
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(prefixed, folder / FLUX_CHECKPOINT)
    safetensors.torch.save_file(sd3_checkpoint(folder), folder / SD3_CHECKPOINT)
    folder_paths.add_model_folder_path("checkpoints", str(folder))
    return folder


def sd3_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    part = folder / "part"

    def made(specs: list[Any], prefix: str) -> dict[str, torch.Tensor]:
        write_checkpoint(part, specs)
        found = safetensors.torch.load(part.read_bytes())
        part.unlink()
        return {f"{prefix}{name}": tensor for name, tensor in found.items()}

    model = made(sd35_tensors(SD35_SIZES["tiny"]), "model.diffusion_model.")
    # Matrices of zeros are fast to make; what is left still gives another encoding for another text.
    clip = [
        replace(spec, std=0.0) if ".layers." in spec.name and spec.name.endswith(".weight") else spec
        for spec in clip_l_tensors()
    ]
    torch.manual_seed(0)
    vae = comfy.taesd.taesd.TAESD(latent_channels=16)
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.04)
    return {
        **model,
        **made(clip, "text_encoders.clip_l.transformer."),
        **{f"first_stage_model.{name}": tensor.contiguous() for name, tensor in vae.state_dict().items()},
    }


def by_host(name: str) -> tuple[Any, Any, Any]:
    with torch.inference_mode():
        return host_nodes.CheckpointLoaderSimple().load_checkpoint(name)


def without_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    devices.read_environment()
    monkeypatch.setattr(devices._virtual, "devices", ())


# -- several files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [*(f"indexed/{name}" for name in SHARDS), f"bare/{SHARDS[1]}"])
def test_any_shard_loads_the_whole_model(
    sharded: Path, virtual_device: Device, plain: torch.Tensor, chosen: str
) -> None:
    virtual_device(24 * MB)
    model, clip, vae = execute(unet_name=chosen)
    assert (clip, vae) == (None, None)
    assert chosen in StreamedModelLoader.define_schema().inputs[0].options
    assert torch.equal(sample(model), plain)
    assert model.status()["mode"] == "streamed"
    files = {spec.source.file.path for spec in model.streamer.blocks.specs if spec.source is not None}
    assert {os.path.basename(path) for path in files} == set(SHARDS)


def test_the_index_itself_loads_the_whole_model(
    sharded: Path, virtual_device: Device, plain: torch.Tensor, plain_with_lora: Patched
) -> None:
    virtual_device(24 * MB)
    with torch.inference_mode():
        model = load_streamed(str(sharded / "indexed" / INDEX), {})
    assert torch.equal(sample(with_lora(model, 0.5)), plain_with_lora(0.5))
    assert torch.equal(sample(model), plain)


@pytest.mark.parametrize("kind", ["indexed", "bare"])
def test_a_missing_shard_is_named(sharded: Path, virtual_device: Device, tmp_path: Path, kind: str) -> None:
    virtual_device(24 * MB)
    folder = shutil.copytree(sharded / kind, tmp_path / kind)
    (folder / SHARDS[1]).unlink()
    with pytest.raises(CheckpointError, match=f"{SHARDS[1]} is missing"):
        load_streamed(str(folder / SHARDS[0]), {})


def refuse(*_: Any) -> None:
    raise UnsupportedModelError("ComfyUI was told to keep models in VRAM (--highvram or --gpu-only)")


@pytest.mark.parametrize("reason", ["no GPU", "highvram"])
def test_shards_that_do_not_stream_are_loaded_all_the_same(
    sharded: Path,
    virtual_device: Device,
    plain: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    reason: str,
) -> None:
    virtual_device(24 * MB)
    if reason == "no GPU":
        without_devices(monkeypatch)
    else:
        monkeypatch.setattr(loader, "make_backend", refuse)
    with caplog.at_level(logging.INFO):
        model, _, _ = execute(unet_name=f"indexed/{SHARDS[2]}")
    assert type(model) is ModelPatcher
    assert f"not streamed, loaded ComfyUI's own way: {'there is no GPU' if reason == 'no GPU' else 'ComfyUI'}" in (
        caplog.text
    )
    assert torch.equal(sample(model), plain)
    # Nodes that rebuild a model can do so: the host knows no way of its own to this one.
    factory, arguments = model.cached_patcher_init
    with torch.inference_mode():
        assert type(factory(*arguments, disable_dynamic=True)) is ModelPatcher


def test_an_index_of_one_file_that_does_not_stream(
    models: Path, plain: torch.Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without_devices(monkeypatch)
    shutil.copy(models / MODEL, tmp_path / MODEL)
    names = list(safetensors.torch.load_file(models / MODEL))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, MODEL)}))
    with torch.inference_mode():
        model = load_streamed(str(tmp_path / INDEX), {})
    assert torch.equal(sample(model), plain)


# -- other formats, and where weights come from --------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["pt", "ckpt"])
def test_a_pickled_file_streams_too(
    models: Path,
    tensors: dict[str, torch.Tensor],
    virtual_device: Device,
    plain: torch.Tensor,
    plain_with_lora: Patched,
    ending: str,
) -> None:
    torch.save({"state_dict": tensors}, models / f"pickled.{ending}")
    virtual_device(24 * MB)
    model, _, _ = execute(unet_name=f"pickled.{ending}")
    assert type(model) is StreamedModelPatcher
    for _ in range(2):
        assert torch.equal(sample(with_lora(model, 0.5)), plain_with_lora(0.5))
        assert torch.equal(sample(model), plain)


@pytest.mark.parametrize("write", [None, write_wan, write_sd35])
def test_every_weight_has_a_source(
    models: Path, virtual_device: Device, tmp_path: Path, write: Callable[[Path], Path] | None
) -> None:
    virtual_device(24 * MB)
    path = write(tmp_path / "model.safetensors") if write is not None else models / MODEL
    with torch.inference_mode():
        model = load_streamed(str(path), {})
    # The host makes the steps' noise levels itself.
    assert [spec.name for spec in model.streamer.blocks.specs if spec.source is None] == ["model_sampling.sigmas"]


# -- text encoders and VAE -----------------------------------------------------------------------------------------


def test_the_drop_down_lists_both_folders(checkpoints: Path, models: Path, virtual_device: Device) -> None:
    (checkpoints / "sub").mkdir(exist_ok=True)
    shutil.copy(checkpoints / FLUX_CHECKPOINT, checkpoints / "sub" / "inner.safetensors")
    shutil.copy(checkpoints / FLUX_CHECKPOINT, checkpoints / MODEL)
    try:
        options = list(StreamedModelLoader.define_schema().inputs[0].options)
        assert {MODEL, FLUX_CHECKPOINT, SD3_CHECKPOINT, os.path.join("sub", "inner.safetensors")} <= {*options}
        assert len(options) == len({*options})
        virtual_device(24 * MB)
        model, clip, vae = execute(unet_name=MODEL)
        assert (clip, vae) == (None, None)
        assert model.cached_patcher_init[1][0] == str(models / MODEL)
        inner, _, vae = execute(unet_name=os.path.join("sub", "inner.safetensors"))
        assert type(inner) is StreamedModelPatcher
        assert vae is not None
    finally:
        (checkpoints / MODEL).unlink()


def test_a_checkpoint_without_companions(checkpoints: Path, virtual_device: Device, plain: torch.Tensor) -> None:
    virtual_device(24 * MB)
    model, clip, vae = execute(unet_name=FLUX_CHECKPOINT)
    theirs, their_clip, their_vae = by_host(FLUX_CHECKPOINT)
    assert torch.equal(sample(model), sample(theirs))
    assert torch.equal(sample(model), plain)
    assert torch.equal(sample(with_lora(model, 0.5)), sample(with_lora(theirs, 0.5)))
    assert clip is None
    assert their_clip is None
    errors = []
    for found in (vae, their_vae):
        with pytest.raises(RuntimeError, match="VAE") as caught:
            host_nodes.VAEDecode().decode(found, {"samples": torch.zeros(1, 16, 8, 8)})
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def same_companions(ours: tuple[Any, Any], theirs: tuple[Any, Any]) -> None:
    (clip, vae), (their_clip, their_vae) = ours, theirs
    latent = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        for text in ("a fox", "(a red:1.3) house"):
            pairs = [host_nodes.CLIPTextEncode().encode(each, text)[0][0] for each in (clip, their_clip)]
            (mine, my_extras), (expected, extras) = pairs
            assert torch.equal(mine, expected)
            assert torch.equal(my_extras["pooled_output"], extras["pooled_output"])
            assert expected.std() > 0
        decoded, expected = (host_nodes.VAEDecode().decode(each, {"samples": latent})[0] for each in (vae, their_vae))
        assert torch.equal(decoded, expected)
        encoded, expected = (host_nodes.VAEEncode().encode(each, decoded)[0] for each in (vae, their_vae))
        assert torch.equal(encoded["samples"], expected["samples"])


def test_a_checkpoint_with_text_encoder_and_vae(checkpoints: Path, virtual_device: Device) -> None:
    virtual_device(24 * MB)
    model, *ours = execute(unet_name=SD3_CHECKPOINT)
    theirs, *their = by_host(SD3_CHECKPOINT)
    sample(theirs)
    assert type(model) is StreamedModelPatcher
    assert torch.equal(sample(model), sample(theirs))
    assert model.status()["mode"] == "streamed"
    same_companions(tuple(ours), tuple(their))
    # What came out of the host's loading function is as it makes it, and none of it maps our file.
    assert {type(companion.patcher) for companion in ours} == {ModelPatcher}
    assert ours[0].patcher.cached_patcher_init[0] is comfy.sd.load_checkpoint_clip_patcher


def test_a_checkpoint_in_several_files(checkpoints: Path, virtual_device: Device) -> None:
    everything = safetensors.torch.load_file(checkpoints / SD3_CHECKPOINT)
    names = [f"sd3-{number:05}-of-00002.safetensors" for number in (1, 2)]
    write_shards(everything, checkpoints, names)
    try:
        virtual_device(24 * MB)
        model, *ours = execute(unet_name=names[1])
        theirs, *their = by_host(SD3_CHECKPOINT)
        sample(theirs)
        assert torch.equal(sample(model), sample(theirs))
        same_companions(tuple(ours), tuple(their))
    finally:
        for name in names:
            (checkpoints / name).unlink()


def test_a_checkpoints_factory_brings_the_streaming_back(
    checkpoints: Path, virtual_device: Device, plain: torch.Tensor
) -> None:
    virtual_device(24 * MB)
    model, _, _ = execute(unet_name=FLUX_CHECKPOINT)
    clone = model.clone(disable_dynamic=True)
    assert type(clone) is StreamedModelPatcher
    mm.unload_all_models()
    deep = model.deepclone_multigpu()
    assert type(deep) is StreamedModelPatcher
    assert deep.streamer is not model.streamer
    assert torch.equal(sample(deep), plain)


@pytest.mark.parametrize("weight_dtype", ["fp8_e4m3fn", "fp8_e5m2"])
def test_the_weight_dtype_of_a_checkpoint(checkpoints: Path, virtual_device: Device, weight_dtype: str) -> None:
    virtual_device(7 * MB)
    model, _, _ = execute(unet_name=FLUX_CHECKPOINT, weight_dtype=weight_dtype)
    with torch.inference_mode():
        theirs = comfy.sd.load_checkpoint_guess_config_model_only(
            str(checkpoints / FLUX_CHECKPOINT), model_options=loader.WEIGHT_DTYPES[weight_dtype]
        )
    sample(theirs)
    assert torch.equal(sample(model), sample(theirs))
    assert model.status()["mode"] == "streamed"


def test_a_checkpoint_that_does_not_stream(
    checkpoints: Path, plain: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_devices(monkeypatch)
    model, clip, _ = execute(unet_name=FLUX_CHECKPOINT)
    assert type(model) is ModelPatcher
    assert clip is None
    assert torch.equal(sample(model), plain)


def test_a_file_of_checkpoints_that_holds_no_model_is_named(checkpoints: Path, virtual_device: Device) -> None:
    virtual_device(24 * MB)
    safetensors.torch.save_file({"a": torch.zeros(4)}, checkpoints / "none.safetensors")
    with pytest.raises(CheckpointError, match=r"none\.safetensors: ComfyUI knows no diffusion model"):
        execute(unet_name="none.safetensors")
