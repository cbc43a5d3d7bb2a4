"""Programs of tests/gpu in their smallest form, on a virtual device: what no test runs is broken already."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tools.checkpoints import write_flux

ROOT = Path(__file__).resolve().parents[2]


def run(name: str, folder: Path, virtual: str) -> dict[str, Any]:
    """What the program prints last."""
    program = ROOT / "tests" / "gpu" / name
    command = [sys.executable, str(program), os.environ["COMFYUI_PATH"], str(folder), "--cpu"]
    environment = {**os.environ, "WEIGHTSTREAM_VIRTUAL": virtual, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


def differences(found: dict[str, Any]) -> list[str]:
    return [case for case, same in found["agree"].items() if not same]


def test_parts_on_each_device(tmp_path: Path) -> None:
    write_flux(tmp_path / "tiny-flux.safetensors")
    found = run("placement_program.py", tmp_path, "2x24MB")
    assert {"flux VAE on gpu:1, decoded", "wan VAE on cpu, encoded in tiles", "VAE on cpu"} <= found["agree"].keys()
    assert differences(found) == []


def test_steps_whose_allocations_a_host_records(tmp_path: Path) -> None:
    """A CPU keeps no records; the rest of the program is the same."""
    found = run("recordings_program.py", tmp_path, "1x100MB")
    assert found["records"] is False
    assert {case.partition(",")[0] for case in found["agree"]} == {"Flux", "MiniMaxH3", "LTXAV"}
    assert differences(found) == []
