"""Prompts at random in which things go wrong (soak_program.py); ``WEIGHTSTREAM_SOAK_PROMPTS=200`` asks for more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

PROMPTS = int(os.environ.get("WEIGHTSTREAM_SOAK_PROMPTS", "20"))
SEED = os.environ.get("WEIGHTSTREAM_SOAK_SEED", "1")
# Many times what a prompt takes, and then the host's start.
PROMPT_SECONDS, START_SECONDS = 20, 240

# 0.96 to 1 of 50 were seen; one in ten is interrupted or ends where a single copy fails while the model is loaded.
LEAST_SAME = 0.8

FLAGS = {"static": ["--disable-dynamic-vram"], "dynamic": []}


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_every_latent_is_the_hosts(tmp_path: Path, flags: list[str], devices: int) -> None:
    if torch.cuda.device_count() < devices:
        pytest.skip("needs two GPUs")
    program = Path(__file__).with_name("soak_program.py")
    numbers = f"1-{PROMPTS}"
    result = subprocess.run(
        [sys.executable, str(program), os.environ["COMFYUI_PATH"], str(tmp_path), numbers, SEED, str(devices), *flags],
        capture_output=True,
        text=True,
        timeout=START_SECONDS + PROMPT_SECONDS * PROMPTS,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    print(result.stdout)
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["failures"] == []
    # Errors that say honestly what happened pass too, so they must be few.
    assert found["ended"]["same"] >= LEAST_SAME * PROMPTS
    assert found["steps_run_again"] > 0
