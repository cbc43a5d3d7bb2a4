"""Measure cases: python benchmarks/run.py CASE... [--contenders a,b,c] [--steps N]

For each case: make its checkpoint if it is not there; measure the two limits (everything resident, and H2D alone) with
the whole card free; hold back VRAM; run each contender in a process of its own; write the result. README.md beside
this file says what the figures mean.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import report
from cases import CASES, DEFAULT_STEPS, FAST_DISK, GB, LIMITS, READ_NO_FILE, TINY_MODELS, Case, Model
from contenders import NAMES
from host_versions import lacking_option
from job import Job
from page_cache import PageCache, prepared
from processes import HERE, run_worker

RESULTS = HERE / "results"
CHECKPOINTS_TOOL = HERE.parent / "tools" / "checkpoints.py"
CHECKPOINT_TIMEOUT_S = 240
RETURN_TIMEOUT_S = 10
RETURN_TOLERANCE = GB // 20


def main() -> None:
    args = parse_args()
    deadline = time.monotonic() + args.time_limit
    machine = describe_machine()
    limits = known_limits(args, machine) if args.go_on else {}
    failed = []
    for name in args.cases:
        case = CASES[name].shrunk() if args.tiny else CASES[name]
        try:
            run_case(case, args, machine, limits, deadline)
        except (HolderError, OSError, subprocess.SubprocessError) as error:
            print(f"{name}: {error}", flush=True)
            failed.append(name)
    if args.out.resolve() == RESULTS and not args.tiny:
        report.update_readme(HERE / "README.md", RESULTS)
        report.update_front_page(HERE.parent / "README.md", RESULTS)
    if failed:
        raise SystemExit(f"could not measure {', '.join(failed)}")


def run_case(case: Case, args: argparse.Namespace, machine: dict, limits: dict, deadline: float) -> None:
    """Measure one case; the file is written anew after the limits and each contender, so that a break loses one."""
    checkpoint = ensure_checkpoint(case.model, args.work)
    names = args.contenders or [*LIMITS, *case.contenders]
    not_offered = {name: reason for name in names if (reason := why_not_offered(name, args.comfyui))}
    for name, reason in not_offered.items():
        print(f"{case.name}: {name} is not offered: {reason}", flush=True)
    names = [name for name in names if name not in not_offered]
    case_limits = measure_limits(case, names, checkpoint, args, limits, deadline)
    runs: dict[str, dict] = {}

    def write() -> None:
        result = report.summarize(case, machine, case_limits, runs) | {"not_offered": not_offered}
        report.write_json(args.out / f"{case.name}.json", result)

    write()
    with hold_back_vram(case, case.free_gb) as holder:
        for name in names:
            if name in LIMITS:
                continue
            runs[name] = run_contender(case, name, checkpoint, args, holder, deadline)
            write()


def why_not_offered(contender: str, comfyui: Path) -> str | None:
    return lacking_option(comfyui, FAST_DISK[contender].option) if contender in FAST_DISK else None


def measure_limits(
    case: Case, names: list[str], checkpoint: Path, args: argparse.Namespace, known: dict, deadline: float
) -> dict[str, dict]:
    """The limits of ``case``. Cases of the same shapes in one call share them; each says where it was measured."""
    keys = limit_keys(case, args)
    missing = [name for name in LIMITS if name in names and keys[name] not in known]
    if missing:
        with hold_back_vram(case, None) as holder:
            for name in missing:
                result = run_contender(case, name, checkpoint, args, holder, deadline)
                known[keys[name]] = result | {"measured_in": case.name}
    return {name: known[keys[name]] for name in LIMITS if keys[name] in known}


def limit_keys(case: Case, args: argparse.Namespace) -> dict[str, object]:
    """Cases that agree in the key of a limit share it."""
    return {"resident": (case.limits_key, measured_steps(case, args)), "h2d": ("h2d", case.gpus)}


def known_limits(args: argparse.Namespace, machine: dict) -> dict[object, dict]:
    """The limits that result files in ``--out`` hold, if they were measured on a machine like this one."""
    known: dict[object, dict] = {}
    for case in CASES.values():
        path = args.out / f"{case.name}.json"
        result = json.loads(path.read_text()) if path.exists() else {}
        if result.get("machine") != machine or result["tiny"] != args.tiny:
            continue
        case = case.shrunk() if args.tiny else case
        keys, differences = limit_keys(case, args), measured_steps(case, args) - 1
        for name, limit in result["limits"].items():
            if "error" not in limit and len(limit.get("steps_s", range(differences))) == differences:
                known[keys[name]] = limit
    return known


def measured_steps(case: Case, args: argparse.Namespace) -> int:
    return args.steps or case.steps or DEFAULT_STEPS


# ------------------------------------------------------------------------------------------------ checkpoints


def ensure_checkpoint(model: Model, work: Path) -> Path:
    path = work / model.filename
    if path.exists():
        return path
    print(f"writing {path}", flush=True)
    work.mkdir(parents=True, exist_ok=True)
    make_room(model, work)
    command = [sys.executable, str(CHECKPOINTS_TOOL), model.kind, str(path), *model.options]
    started = time.monotonic()
    subprocess.run(command, check=True, timeout=CHECKPOINT_TIMEOUT_S)
    print(f"  {path.stat().st_size / GB:.1f} GB in {time.monotonic() - started:.0f} s", flush=True)
    return path


def make_room(model: Model, work: Path) -> None:
    """Delete our other checkpoints if the disk cannot hold one more; they can be made again."""
    if shutil.disk_usage(work).free > 45 * GB:
        return
    for other in (*TINY_MODELS, *TINY_MODELS.values()):
        if other != model and (work / other.filename).exists():
            print(f"deleting {other.filename} to make room", flush=True)
            (work / other.filename).unlink()


# ------------------------------------------------------------------------------------------------------- VRAM


class HolderError(RuntimeError):
    """VRAM cannot be held back, so the case cannot be measured."""


class Holder:
    """A process that holds VRAM and answers how much of a device is free."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process
        self.initial_free_bytes = self.free_bytes()

    def free_bytes(self) -> int:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise HolderError("the process that holds VRAM ended; its last words are above")
        return json.loads(answer)["free"]

    def settled_free_bytes(self) -> int:
        """Free bytes once the last contender's memory is back: a driver may return it after the process has ended."""
        give_up = time.monotonic() + RETURN_TIMEOUT_S
        enough = self.initial_free_bytes - RETURN_TOLERANCE
        while (free := self.free_bytes()) < enough and time.monotonic() < give_up:
            time.sleep(0.2)
        return free


@contextlib.contextmanager
def hold_back_vram(case: Case, free_gb: float | None) -> Iterator[Holder]:
    """Leave ``free_gb`` free on each GPU of ``case`` while the block runs; None holds nothing, and only answers.

    A tiny case has no GPU.
    """
    gpus = 0 if case.tiny else case.gpus
    command = [sys.executable, str(HERE / "holder.py"), str(gpus), *([str(free_gb)] if free_gb is not None else [])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Holder(process)
        finally:
            process.kill()


# -------------------------------------------------------------------------------------------------- contenders


def run_contender(
    case: Case, name: str, checkpoint: Path, args: argparse.Namespace, holder: Holder, deadline: float
) -> dict:
    """One contender in a fresh process; its result, or ``{"error": [why it ended, its last lines ...]}``."""
    left = deadline - time.monotonic()
    if left < args.child_timeout / 3:
        return {"error": [f"not started: {left:.0f} s of the time limit were left"]}
    free = holder.settled_free_bytes()
    print(f"{case.name}: {name} ({free / GB:.1f} GB free)", flush=True)
    started = time.monotonic()
    job = Job(case, name, checkpoint, args.comfyui, measured_steps(case, args), free)
    log_to = args.logs / f"{case.name}.{name}.log" if args.logs else None
    state = PageCache.AS_IT_IS if name in READ_NO_FILE else PageCache.WARM
    with prepared(checkpoint, state) as shares:
        result = run_worker("worker.py", job.as_dict(), case, min(args.child_timeout, left), log_to)
    result |= {"page_cache_share": shares}
    result |= {"free_bytes_before": free, "wall_s": time.monotonic() - started}
    print(f"  {say(result)}", flush=True)
    return result


def say(result: dict) -> str:
    if "error" in result:
        return "failed: " + "; ".join(dict.fromkeys((result["error"][0], result["error"][-1])))
    figures = [f"{result['wall_s']:.0f} s in all"]
    if "step_s" in result:
        figures.insert(0, f"{result['step_s']:.3f} s per step")
    if "h2d_bytes_per_s" in result:
        figures.insert(0, f"{result['h2d_bytes_per_s'] / GB:.1f} GB/s")
    return ", ".join(figures)


# ---------------------------------------------------------------------------------------------------- set-up


def describe_machine() -> dict[str, object]:
    facts: dict[str, object] = {"system": platform.system(), "CPUs": os.cpu_count()}
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
        facts["GPU"], facts["driver"] = (part.strip() for part in answer.splitlines()[0].split(","))
    return facts


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--contenders", type=lambda text: text.split(","), help=", ".join(NAMES))
    parser.add_argument("--steps", type=int, help=f"denoising steps that are measured (the case's, or {DEFAULT_STEPS})")
    parser.add_argument("--child-timeout", type=float, default=150, help="seconds for one contender")
    parser.add_argument("--time-limit", type=float, default=3600, help="seconds after which no contender is started")
    parser.add_argument("--go-on", action="store_true", help="take limits that results in --out hold as measured")
    args = parse_with_paths(parser)
    if unknown := set(args.contenders or ()) - set(NAMES):
        parser.error(f"unknown contenders {sorted(unknown)}: choose from {', '.join(NAMES)}")
    return args


def parse_with_paths(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, with the options that all scripts have.

    The ComfyUI must be there, and what a tiny run finds is no result.
    """
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "weightstream-benchmarks",
        help="folder of the checkpoints, kept for the next call (FLUX 24 GB, Qwen-Image 41, Wan 29, SD3.5 16)",
    )
    parser.add_argument("--comfyui", type=Path, default=os.environ.get("COMFYUI_PATH"), help="default: $COMFYUI_PATH")
    parser.add_argument("--logs", type=Path, help="folder that keeps what is printed by who is measured")
    parser.add_argument("--tiny", action="store_true", help="try the script on a CPU; the figures mean nothing")
    args = parser.parse_args()
    if not args.comfyui or not (args.comfyui / "comfy").is_dir():
        parser.error(f"no ComfyUI in {args.comfyui}: set COMFYUI_PATH or give --comfyui")
    if args.tiny and args.out.resolve() == RESULTS:
        args.out = args.work / "tiny-results"
    return args


if __name__ == "__main__":
    main()
