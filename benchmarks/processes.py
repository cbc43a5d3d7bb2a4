"""A process that measures, from both sides: who starts it and reads its figures, and what it does itself."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cases import Case
from host_versions import PACKAGES

HERE = Path(__file__).resolve().parent

# -------------------------------------------------------------------------------------------------- who starts it


def run_worker(script: str, wanted: dict[str, Any], case: Case, timeout: float, log_to: Path | None) -> dict[str, Any]:
    """Run ``script`` of this folder in a fresh process; its figures, or ``{"error": [how it ended, last lines ...]}``.

    Args:
        wanted: what it is told, as JSON.
        timeout: seconds after which it is stopped.
        log_to: where to keep what it prints, if anywhere.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out, log = Path(scratch) / "result.json", Path(scratch) / "log.txt"
        failure = run_child(worker_command(script, wanted, out), child_environment(case), log, timeout)
        if log_to is not None:
            keep_log(log, log_to)
        return json.loads(out.read_text()) if out.exists() else {"error": [failure, *last_lines(log)]}


def worker_command(script: str, wanted: dict[str, Any], out: Path) -> list[str]:
    return [sys.executable, str(HERE / script), json.dumps(wanted), str(out)]


def run_child(command: list[str], environment: dict[str, str], log: Path, timeout: float) -> str:
    """Run to the end or to the timeout; how it ended."""
    with open(log, "w") as output:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            return f"stopped after {timeout:.0f} s"
        finally:
            process.kill()
            process.wait()
    return f"exit status {code}"


def child_environment(case: Case) -> dict[str, str]:
    """ComfyUI's own settings for everybody; a tiny run streams on a virtual device."""
    return os.environ | (_tiny_environment(case) if case.tiny else {})


def _tiny_environment(case: Case) -> dict[str, str]:
    return {"WEIGHTSTREAM_VIRTUAL": f"{case.gpus}x{case.model.virtual}", "CUDA_VISIBLE_DEVICES": ""}


def last_lines(log: Path, count: int = 8) -> list[str]:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-count:]


def keep_log(log: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(log, target)


# ------------------------------------------------------------------------------------------------- the process itself


def answer(measure: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Measure what the command line asks for, write it where that says, and end this process."""
    wanted, out = json.loads(sys.argv[1]), Path(sys.argv[2])  # Now: ComfyUI reads sys.argv too.
    result = measure(wanted)
    out.write_text(json.dumps(result | {"versions": versions()}))
    # Contenders leave threads, hooks and page-locked memory behind; the process is over, so nothing is torn down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def versions() -> dict[str, Any]:
    """What this process ran on; read after the run, so that asking changes nothing."""
    found = {"python": sys.version.split()[0]}
    for name in (*PACKAGES, "diffusers", "mmgp"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "comfy" in sys.modules:
        from comfyui_version import __version__

        found["comfyui"] = __version__
    return found
