"""Programs that run a host of their own on the GPU: it reads its command line once, and the other tests' has --cpu."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def differences(tmp_path: Path) -> Callable[[str, list[str]], list[str]]:
    """Runs a program of this folder with flags for the host, and gives the cases in which it found a difference."""

    def run(program: str, flags: list[str]) -> list[str]:
        command = [sys.executable, str(Path(__file__).with_name(program)), os.environ["COMFYUI_PATH"], str(tmp_path)]
        result = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=240)
        assert result.returncode == 0, result.stderr[-4000:]
        agree = json.loads(result.stdout.splitlines()[-1])["agree"]
        assert agree
        return [case for case, same in agree.items() if not same]

    return run
