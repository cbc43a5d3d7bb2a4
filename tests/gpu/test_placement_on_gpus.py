from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tools.checkpoints import write_flux, write_flux_lora

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

ROOT = Path(__file__).resolve().parents[2]
FLAGS = {"static": ["--disable-dynamic-vram"], "dynamic": []}
CONTEXTS = """
import json, torch
from streaming.gpus import list_gpus, open_nvml
with open_nvml() as nvml:
    known = nvml.figures
    gpus = list_gpus()
    print(json.dumps([
        known(gpu.uuid).free is not None and torch._C._cuda_hasPrimaryContext(gpu.index) for gpu in gpus
    ]))
"""


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_each_part_runs_on_each_device(
    tmp_path: Path, differences: Callable[[str, list[str]], list[str]], flags: list[str]
) -> None:
    write_flux(tmp_path / "tiny-flux.safetensors")
    assert differences("placement_program.py", flags) == []


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("peer", ["", "0"], ids=["straight", "through-ram"])
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_a_split_model_gives_the_latents_of_a_whole_one(
    tmp_path: Path,
    differences: Callable[[str, list[str]], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    peer: str,
) -> None:
    monkeypatch.setenv("WEIGHTSTREAM_PEER", peer)
    write_flux(tmp_path / "tiny-flux.safetensors")
    write_flux_lora(tmp_path / "tiny-lora.safetensors")
    expected = ["links verified"] if peer else []  # Where the user says so, nothing goes straight.
    assert differences("split_program.py", flags) == expected


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("part", range(1, 5))
def test_every_family_gives_the_latents_of_one_gpu(
    differences: Callable[[str, list[str]], list[str]], monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    monkeypatch.setenv("FAMILIES", f"{part}/4")
    assert differences("families_program.py", FLAGS["static"]) == []


def run(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_gpus_are_listed_as_the_driver_knows_them() -> None:
    if shutil.which("nvidia-smi") is None:
        pytest.skip("needs nvidia-smi to compare with")
    query = run("nvidia-smi", "--query-gpu=uuid,name", "--format=csv,noheader")
    names = dict(line.split(", ", 1) for line in query.splitlines())
    listed = json.loads(run(sys.executable, "-m", "streaming", "gpus", "--json"))["gpus"]
    assert [gpu["device"] for gpu in listed] == [f"gpu:{index}" for index in range(torch.cuda.device_count())]
    assert all(names[gpu["uuid"]] == gpu["name"] for gpu in listed)
    assert all(0 < gpu["free"] <= gpu["total"] for gpu in listed)


def test_listing_makes_no_context_where_nvml_is_installed() -> None:
    assert not any(json.loads(run(sys.executable, "-c", CONTEXTS)))
