"""Programs of tests/gpu in their smallest form, on virtual devices: what no test runs is broken already."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tools.checkpoints import write_flux

ROOT = Path(__file__).resolve().parents[2]


def run(program: str, folder: Path, *arguments: str, **environment: str) -> dict[str, Any]:
    """What a program prints in its last line."""
    command = [sys.executable, str(ROOT / "tests" / "gpu" / program), os.environ["COMFYUI_PATH"], str(folder)]
    result = subprocess.run(
        [*command, *arguments, "--cpu"],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


def differences(found: dict[str, Any]) -> list[str]:
    return [case for case, same in found["agree"].items() if not same]


def test_parts_on_each_device(tmp_path: Path) -> None:
    write_flux(tmp_path / "tiny-flux.safetensors")
    found = run("placement_program.py", tmp_path, WEIGHTSTREAM_VIRTUAL="2x24MB")
    assert {"flux VAE on gpu:1, decoded", "wan VAE on cpu, encoded in tiles", "VAE on cpu"} <= found["agree"].keys()
    assert differences(found) == []


def test_steps_whose_allocations_a_host_records(tmp_path: Path) -> None:
    """A CPU keeps no records; the rest of the program is the same."""
    found = run("recordings_program.py", tmp_path, WEIGHTSTREAM_VIRTUAL="1x100MB")
    assert found["records"] is False
    assert {case.partition(",")[0] for case in found["agree"]} == {"Flux", "MiniMaxH3", "LTXAV"}
    assert differences(found) == []


def test_a_device_that_is_late(tmp_path: Path) -> None:
    found = run("late_program.py", tmp_path, WEIGHTSTREAM_VIRTUAL="1x100MB")
    assert found["agree"] == dict.fromkeys(("kernels", "patch kernels", "copies", "arrival", "unlocking"), True)


def test_a_soak(tmp_path: Path) -> None:
    """The seed has everything in six prompts; which faults find a call to fall on hangs on times."""
    found = run("soak_program.py", tmp_path, "1-6", "2075", "2", WEIGHTSTREAM_VIRTUAL="2x14MB")
    assert found["failures"] == []
    assert sum(found["ended"].values()) == found["prompts"] == 6
    features = {"LoRA", "LoRA stack", "hooks", "ControlNet", "EasyCache", "ar_video", "2 devices"}
    assert found["features"].keys() == features
    assert len(found["planned"]) == 8
    assert len(found["happened"]) >= 5
    assert found["steps_run_again"] >= 1
