from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools.checkpoints import write_flux, write_flux_lora

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


FLAGS = {"static": ["--disable-dynamic-vram"], "dynamic": [], "one-stream": ["--async-offload", "1"]}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_latents_are_the_hosts_at_every_limit_with_and_without_lora(tmp_path: Path, flags: list[str]) -> None:
    write_flux(tmp_path / "tiny-flux.safetensors")
    write_flux_lora(tmp_path / "tiny-lora.safetensors")
    program = Path(__file__).with_name("host_program.py")
    command = [sys.executable, str(program), os.environ["COMFYUI_PATH"], str(tmp_path), *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-4000:]
    agree = json.loads(result.stdout.splitlines()[-1])["agree"]
    assert [case for case, same in agree.items() if not same] == []
