"""Programs of tests/gpu in their smallest form, on a virtual device: what no test runs is broken already."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_steps_whose_allocations_a_host_records(tmp_path: Path) -> None:
    """A CPU keeps no records; the rest of the program is the same."""
    program = ROOT / "tests" / "gpu" / "recordings_program.py"
    command = [sys.executable, str(program), os.environ["COMFYUI_PATH"], str(tmp_path), "--cpu"]
    environment = {**os.environ, "WEIGHTSTREAM_VIRTUAL": "1x100MB", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["records"] is False
    assert {case.partition(",")[0] for case in found["agree"]} == {"Flux", "MiniMaxH3", "LTXAV"}
    assert [case for case, same in found["agree"].items() if not same] == []
