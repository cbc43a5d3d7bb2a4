"""Run one contender of one case in this process and write its result as JSON. run.py starts it."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

from cases import CASES
from contenders import NAMES, Job, measure
from host_versions import PACKAGES


def parse_job() -> tuple[Job, Path]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("contender", choices=NAMES)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--free-bytes", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    case = CASES[args.case].shrunk() if args.tiny else CASES[args.case]
    job = Job(case, args.contender, args.checkpoint, args.comfyui, args.steps, args.free_bytes)
    return job, args.out


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


def main() -> None:
    job, out = parse_job()
    result = measure(job)
    out.write_text(json.dumps(result | {"versions": versions()}))
    # Contenders leave threads, hooks and page-locked memory behind; the process is over, so nothing is torn down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
