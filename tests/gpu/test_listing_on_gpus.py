"""GPUs are listed as the driver knows them."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

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


@pytest.mark.child("-m", "streaming", "gpus", "--json")
def test_gpus_are_listed_as_the_driver_knows_them(child: subprocess.CompletedProcess[str]) -> None:
    if shutil.which("nvidia-smi") is None:
        pytest.skip("needs nvidia-smi to compare with")
    command = ["nvidia-smi", "--query-gpu=uuid,name", "--format=csv,noheader"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    names = dict(line.split(", ", 1) for line in said.splitlines())
    assert child.returncode == 0, child.stderr
    listed = json.loads(child.stdout)["gpus"]
    assert [gpu["device"] for gpu in listed] == [f"gpu:{index}" for index in range(torch.cuda.device_count())]
    assert all(names[gpu["uuid"]] == gpu["name"] for gpu in listed)
    assert all(0 < gpu["free"] <= gpu["total"] for gpu in listed)


@pytest.mark.child("-c", CONTEXTS)
def test_listing_makes_no_context_where_nvml_is_installed(child: subprocess.CompletedProcess[str]) -> None:
    assert child.returncode == 0, child.stderr
    assert not any(json.loads(child.stdout))
