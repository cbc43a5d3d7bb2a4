"""The random checkpoints are real files of real architectures: safetensors reads them, and the host knows them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import comfy.model_detection
import comfy.model_management as mm
import comfy.sample
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from safetensors import safe_open
from safetensors.torch import load_file

from tools.checkpoints import (
    FLUX_SIZES,
    SD35_SIZES,
    WAN_SIZES,
    Chunk,
    TensorSpec,
    encode_header,
    flux_tensors,
    qwen_image_tensors,
    random_bytes,
    sd35_tensors,
    wan_tensors,
    write_checkpoint,
    write_clip_l,
    write_flux,
    write_flux_lora,
    write_sd35,
    write_wan,
)
from tools.checkpoints import chunks as cut

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def complaints(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """What the host has said of keys that are missing, or that it does not know; it keeps no model of the test."""
    yield lambda: [text for text in caplog.messages if "missing" in text or "unet unexpected" in text]
    mm.unload_all_models()
    mm.cleanup_models_gc()


def sample(model: ModelPatcher, latent: Sequence[int], cond: list[Any]) -> torch.Tensor:
    zeros = torch.zeros(*latent)
    noise = comfy.sample.prepare_noise(zeros, 1)
    return comfy.sample.sample(model, noise, 2, 1.0, "euler", "simple", cond, cond, zeros, disable_pbar=True)


def random_cond(context: Sequence[int], pooled: int) -> list[Any]:
    """Of these shapes; without pooled conditioning if that has the width 0."""
    generator = torch.Generator().manual_seed(1)
    extras = {"pooled_output": torch.randn(1, pooled, generator=generator)} if pooled else {}
    return [[torch.randn(*context, generator=generator), extras]]


def test_safetensors_reads_a_flux_in_bfloat16(tmp_path: Path) -> None:
    tensors = load_file(write_flux(tmp_path / "flux.safetensors"))
    size = FLUX_SIZES["tiny"]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert tensors["single_blocks.3.linear1.weight"].shape == (7 * size.hidden, size.hidden)
    assert all(torch.isfinite(tensor.float()).all() for tensor in tensors.values())
    assert (tensors["double_blocks.0.img_attn.norm.key_norm.scale"] == 1).all()
    weight = tensors["double_blocks.1.txt_mlp.2.weight"].float()
    assert weight.std().item() == pytest.approx((4 * size.hidden) ** -0.5, rel=0.02)
    assert abs(weight.mean().item()) < 1e-3


def test_a_lora_has_a_pair_for_every_block_matrix(tmp_path: Path) -> None:
    tensors = load_file(write_flux_lora(tmp_path / "lora.safetensors", rank=4))
    assert len([name for name in tensors if name.endswith(".lora_down.weight")]) == 2 * 10 + 4 * 3
    assert tensors["lora_unet_single_blocks_0_linear1.lora_up.weight"].shape == (7 * 256, 4)
    assert tensors["lora_unet_single_blocks_0_linear1.alpha"].item() == 4


def test_the_same_seed_gives_the_same_bytes_whatever_the_threads(tmp_path: Path) -> None:
    specs = flux_tensors(FLUX_SIZES["tiny"])
    first = write_checkpoint(tmp_path / "1", specs, seed=3, threads=1).read_bytes()
    assert write_checkpoint(tmp_path / "2", specs, seed=3, threads=5).read_bytes() == first
    assert write_checkpoint(tmp_path / "3", specs, seed=4, threads=5).read_bytes() != first


def test_no_two_parts_of_a_file_repeat_each_other(tmp_path: Path) -> None:
    tensors = load_file(write_flux(tmp_path / "flux.safetensors"))
    firsts = [tuple(t.flatten()[:8].tolist()) for name, t in tensors.items() if ".norm." not in name]
    assert len(set(firsts)) == len(firsts)


def test_large_tensors_are_cut_into_chunks_that_cover_the_file() -> None:
    specs = [TensorSpec("a", (3, 1 << 20), 1.0), TensorSpec("b", (5,), 1.0)]
    pieces = list(cut(specs, start=100, seed=0))
    assert [(piece.spec.name, piece.offset) for piece in pieces] == [
        ("a", 100),
        ("a", 100 + (2 << 20)),
        ("a", 100 + (4 << 20)),
        ("b", 100 + (6 << 20)),
    ]
    assert len({tuple(piece.seed) for piece in pieces}) == 4
    assert isinstance(pieces[0], Chunk)


def test_a_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(spec: TensorSpec, count: int, seed: list[int]) -> bytes:
        if "single_blocks.3" in spec.name:
            raise OSError("disk full")
        return random_bytes(spec, count, seed)

    monkeypatch.setattr("tools.checkpoints.random_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        write_flux(tmp_path / "flux.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_full_sizes_are_those_of_the_published_models() -> None:
    flux = flux_tensors(FLUX_SIZES["dev"])
    assert sum(spec.values for spec in flux) == 11_901_408_320
    assert sum(spec.values for spec in qwen_image_tensors(60)) == 20_430_401_088
    assert sum(spec.values for spec in wan_tensors(WAN_SIZES["14b"])) == 14_288_491_584
    sd35 = sd35_tensors(SD35_SIZES["large"])
    assert sum(spec.values for spec in sd35 if spec.name != "pos_embed") == 8_056_627_520


def test_a_qwen_image_has_the_blocks_that_it_was_asked_for() -> None:
    # Its width is fixed and a block takes 680 MB, so nothing is written.
    header = encode_header(qwen_image_tensors(layers=2))
    names = json.loads(header[8:])
    assert (len(header) % 8, int.from_bytes(header[:8], "little")) == (0, len(header) - 8)
    assert {name.split(".")[1] for name in names if name.startswith("transformer_blocks.")} == {"0", "1"}
    assert names["txt_norm.weight"]["shape"] == [3584]


@torch.inference_mode()
def test_the_host_loads_and_samples_them(tmp_path: Path, complaints: Callable[[], list[str]]) -> None:
    model = comfy.sd.load_diffusion_model(str(write_flux(tmp_path / "flux.safetensors")))
    lora = comfy.utils.load_torch_file(str(write_flux_lora(tmp_path / "lora.safetensors")))
    file = write_clip_l(tmp_path / "clip.safetensors")
    with safe_open(file, framework="pt") as opened:
        assert opened.get_slice("text_projection.weight").get_dtype() == "F16"
    clip = comfy.sd.load_clip([str(file)], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION)
    assert type(model.model).__name__ == "Flux"
    config = model.model.model_config.unet_config
    assert [config[name] for name in ("hidden_size", "depth", "depth_single_blocks")] == [256, 2, 4]
    patched = comfy.sd.load_lora_for_models(model, None, lora, 0.8, 0)[0]
    assert len(patched.patches) == 32
    cond = clip.encode_from_tokens_scheduled(clip.tokenize("a hill"))
    assert cond[0][0].shape == (1, 77, 768)
    assert cond[0][1]["pooled_output"].shape == (1, 768)
    plain, changed = (sample(each, (1, 16, 8, 8), cond) for each in (model, patched))
    assert plain.isfinite().all()
    assert changed.isfinite().all()
    assert (plain - changed).abs().mean() > 1e-4
    assert complaints() == []


@pytest.mark.parametrize(
    ("write", "kind", "config", "latent", "context", "pooled"),
    [
        (write_wan, "WAN21", "WAN21_T2V", (1, 16, 2, 8, 12), (1, 7, 4096), 0),
        (write_sd35, "SD3", "SD3", (1, 16, 8, 12), (1, 7, 768), 768),
    ],
)
@torch.inference_mode()
def test_the_host_finds_every_key_and_samples(
    tmp_path: Path,
    complaints: Callable[[], list[str]],
    write: Callable[[Path], Path],
    kind: str,
    config: str,
    latent: Sequence[int],
    context: Sequence[int],
    pooled: int,
) -> None:
    path = write(tmp_path / "model.safetensors")
    model = comfy.sd.load_diffusion_model(str(path))
    assert [type(model.model).__name__, type(model.model.model_config).__name__] == [kind, config]
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(model.model.diffusion_model.state_dict())
    samples = sample(model, latent, random_cond(context, pooled))
    assert samples.shape == latent
    assert samples.isfinite().all()
    assert complaints() == []


@pytest.mark.parametrize(
    ("name", "specs"),
    [
        ("Flux", flux_tensors(FLUX_SIZES["dev"])),
        ("QwenImage", qwen_image_tensors(60)),
        ("WAN21_T2V", wan_tensors(WAN_SIZES["14b"])),
        ("SD3", sd35_tensors(SD35_SIZES["large"])),
    ],
    ids=["flux", "qwen", "wan", "sd35"],
)
def test_the_host_builds_the_full_sizes_with_the_same_names_and_shapes(name: str, specs: list[TensorSpec]) -> None:
    """Without memory: on the meta device a model of any size has names and shapes only."""
    weights = {spec.name: torch.empty(spec.shape, dtype=torch.bfloat16, device="meta") for spec in specs}
    config = comfy.model_detection.model_config_from_unet(weights, "")
    assert type(config).__name__ == name
    config.set_inference_dtype(torch.bfloat16, None)
    model = config.get_model(weights, "", device="meta")
    # The host renames some before it loads them.
    written = {key: tensor.shape for key, tensor in config.process_unet_state_dict(weights).items()}
    assert written == {key: tensor.shape for key, tensor in model.diffusion_model.state_dict().items()}


def test_a_size_of_another_model_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.checkpoints", "wan", str(tmp_path / "wan"), "--size", "large"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "choose from tiny, 14b" in done.stderr
