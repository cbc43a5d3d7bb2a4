"""GPUs are listed as the driver knows them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

ROOT = Path(__file__).resolve().parents[2]
CONTEXTS = """
import json, torch
from streaming.machine.gpus import list_gpus, open_nvml
with open_nvml() as nvml:
    known = nvml.figures
    gpus = list_gpus()
    print(json.dumps([
        known(gpu.uuid).free is not None and torch._C._cuda_hasPrimaryContext(gpu.index) for gpu in gpus
    ]))
"""


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
