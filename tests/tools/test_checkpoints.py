"""The random checkpoints are real files of real architectures: safetensors reads them, and the host knows them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
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

# In a process of its own: the host reads its command line once, and tests of other folders choose another.
HOST_PROGRAM = """
import json, sys
from pathlib import Path
comfyui, folder = sys.argv[1:]
sys.path.insert(0, comfyui)
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import comfy.sample, comfy.sd, comfy.utils, torch

def path(name):
    return str(Path(folder) / name)

with torch.inference_mode():
    model = comfy.sd.load_diffusion_model(path("flux.safetensors"))
    lora = comfy.utils.load_torch_file(path("lora.safetensors"))
    patched = comfy.sd.load_lora_for_models(model, None, lora, 0.8, 0)[0]
    clip = comfy.sd.load_clip([path("clip.safetensors")], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION)
    cond = clip.encode_from_tokens_scheduled(clip.tokenize("a hill"))

    def sample(model):
        latent = torch.zeros(1, 16, 8, 8)
        noise = comfy.sample.prepare_noise(latent, 1)
        return comfy.sample.sample(model, noise, 2, 1.0, "euler", "simple", cond, cond, latent, disable_pbar=True)

    plain, changed = sample(model), sample(patched)
    config = model.model.model_config.unet_config
print(json.dumps({
    "model": type(model.model).__name__,
    "hidden_size": config["hidden_size"],
    "depth": config["depth"],
    "depth_single_blocks": config["depth_single_blocks"],
    "patches": len(patched.patches),
    "finite": bool(torch.isfinite(plain).all() and torch.isfinite(changed).all()),
    "lora_difference": float((plain - changed).abs().mean()),
    "context": list(cond[0][0].shape),
    "pooled": list(cond[0][1]["pooled_output"].shape),
}))
"""

# Each of its jobs names a file, a latent's shape, and the shapes of context and pooled conditioning (0: none).
FORWARD_PROGRAM = """
import json, sys
comfyui, jobs = sys.argv[1:]
sys.path.insert(0, comfyui)
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import comfy.sample, comfy.sd, torch
from safetensors import safe_open

def sample(model, latent, context, pooled):
    latent = torch.zeros(latent)
    noise = comfy.sample.prepare_noise(latent, 1)
    generator = torch.Generator().manual_seed(1)
    extras = {"pooled_output": torch.randn(1, pooled, generator=generator)} if pooled else {}
    cond = [[torch.randn(context, generator=generator), extras]]
    return comfy.sample.sample(model, noise, 2, 1.0, "euler", "simple", cond, cond, latent, disable_pbar=True)

with torch.inference_mode():
    for path, latent, context, pooled in json.loads(jobs):
        model = comfy.sd.load_diffusion_model(path)
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
        samples = sample(model, latent, context, pooled)
        print(json.dumps({
            "model": type(model.model).__name__,
            "config": type(model.model.model_config).__name__,
            "other keys": sorted(keys ^ set(model.model.diffusion_model.state_dict())),
            "latent": list(samples.shape),
            "finite": bool(torch.isfinite(samples).all()),
        }))
"""

# Without memory: on the meta device a model of any size has names and shapes only.
SHAPES_PROGRAM = """
import json, sys
comfyui, shapes_file = sys.argv[1:]
sys.path.insert(0, comfyui)
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import comfy.model_detection, torch

for shapes in json.load(open(shapes_file)):
    weights = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()}
    config = comfy.model_detection.model_config_from_unet(weights, "")
    config.set_inference_dtype(torch.bfloat16, None)
    model = config.get_model(weights, "", device="meta")
    # The host renames some before it loads them.
    written = {name: list(tensor.shape) for name, tensor in config.process_unet_state_dict(weights).items()}
    wanted = {name: list(tensor.shape) for name, tensor in model.diffusion_model.state_dict().items()}
    pairs = {name: (written.get(name), wanted.get(name)) for name in written.keys() | wanted.keys()}
    differences = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    print(json.dumps({"config": type(config).__name__, "differences": differences}))
"""


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


def test_the_host_loads_and_samples_them(tmp_path: Path) -> None:
    write_flux(tmp_path / "flux.safetensors")
    write_flux_lora(tmp_path / "lora.safetensors")
    clip = write_clip_l(tmp_path / "clip.safetensors")
    with safe_open(clip, framework="pt") as file:
        assert file.get_slice("text_projection.weight").get_dtype() == "F16"
    command = [sys.executable, "-c", HOST_PROGRAM, os.environ["COMFYUI_PATH"], str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "missing" not in done.stderr, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    difference = found.pop("lora_difference")
    assert found == {
        "model": "Flux",
        "hidden_size": 256,
        "depth": 2,
        "depth_single_blocks": 4,
        "patches": 32,
        "finite": True,
        "context": [1, 77, 768],
        "pooled": [1, 768],
    }
    assert difference > 1e-4


def run_host_program(program: str, argument: str, folder: Path) -> list[dict[str, object]]:
    """What ``program`` printed, one object per line; fails if the host complained about missing or unexpected keys."""
    command = [sys.executable, "-c", program, os.environ["COMFYUI_PATH"], argument]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if "unet missing" in line or "unet unexpected" in line]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_host_finds_every_key_of_a_wan_and_an_sd35_and_samples_them(tmp_path: Path) -> None:
    wan, sd35 = write_wan(tmp_path / "wan.safetensors"), write_sd35(tmp_path / "sd35.safetensors")
    jobs = [
        (str(wan), (1, 16, 2, 8, 12), (1, 7, 4096), 0),
        (str(sd35), (1, 16, 8, 12), (1, 7, 768), 768),
    ]
    found = run_host_program(FORWARD_PROGRAM, json.dumps(jobs), tmp_path)
    assert found == [
        {"model": "WAN21", "config": "WAN21_T2V", "other keys": [], "latent": [1, 16, 2, 8, 12], "finite": True},
        {"model": "SD3", "config": "SD3", "other keys": [], "latent": [1, 16, 8, 12], "finite": True},
    ]


def test_the_host_builds_the_full_sizes_with_the_same_names_and_shapes(tmp_path: Path) -> None:
    full = {
        "Flux": flux_tensors(FLUX_SIZES["dev"]),
        "QwenImage": qwen_image_tensors(60),
        "WAN21_T2V": wan_tensors(WAN_SIZES["14b"]),
        "SD3": sd35_tensors(SD35_SIZES["large"]),
    }
    shapes = [{spec.name: spec.shape for spec in specs} for specs in full.values()]
    # A program's argument has a limit of length, which these shapes are past.
    file = tmp_path / "shapes.json"
    file.write_text(json.dumps(shapes))
    found = run_host_program(SHAPES_PROGRAM, str(file), tmp_path)
    assert found == [{"config": name, "differences": {}} for name in full]


def test_a_size_of_another_model_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.checkpoints", "wan", str(tmp_path / "wan"), "--size", "large"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "choose from tiny, 14b" in done.stderr
