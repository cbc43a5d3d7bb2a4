"""Measure tensor parallelism on two GPUs: python benchmarks/tensor_parallel.py --out DIR [--tiny]

What it costs to move activations between GPUs, how long a block of FLUX and of Qwen-Image takes whole and sharded by
torch.distributed.tensor, and whether the bits stay the same. Each round is a set of processes of its own: one for each
GPU, the same with NCCL kept from reaching one GPU from the other, and one that has both. The result is
DIR/tensor-parallel.json; --table FILE prints the tables of such a file. docs/tensor-parallel.md says what they mean.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import report
import tensor_parallel_report
from run import describe_machine

RESULT = "tensor-parallel.json"


def main() -> None:
    args = parse_args()
    if args.table:
        print(tensor_parallel_report.tables(json.loads(args.table.read_text())))
        return
    result = measure(args)
    report.write_json(args.out / RESULT, result)
    if "h2d_bytes_per_s" in result["alone"] and "exchanges" in result["alone"]:
        print(tensor_parallel_report.tables(result))
    if result["errors"]:
        raise SystemExit("; ".join(f"{name}: {text}" for name, text in result["errors"].items()))


def measure(args: argparse.Namespace) -> dict:
    import tensor_parallel_worker as worker
    import torch

    if torch.cuda.device_count() < worker.RANKS and not args.tiny:
        raise SystemExit(f"{worker.RANKS} GPUs are needed; --tiny tries the script without")
    result = {"tiny": args.tiny, "machine": describe_machine() | gpu_facts(), "versions": versions(), "errors": {}}
    for name, program, processes, environment in (
        ("direct", worker.measure_as_rank, worker.RANKS, {}),
        ("host", worker.measure_as_rank, worker.RANKS, {"NCCL_P2P_DISABLE": "1"}),
        ("alone", worker.measure_alone, 1, {}),
    ):
        started = time.monotonic()
        with environment_of(environment):
            result[name], error = run_round(program, processes, args)
        if error:
            result["errors"][name] = error
        print(f"{name}: {time.monotonic() - started:.0f} s{', ' + error if error else ''}", flush=True)
    return result


def run_round(program: Callable, processes: int, args: argparse.Namespace) -> tuple[dict, str]:
    """What the processes have measured, and what went wrong, if something did."""
    import torch.multiprocessing as mp

    error = ""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(program, (folder, args.tiny), processes, join=False, start_method="spawn")
        try:
            deadline = time.monotonic() + args.timeout
            while not context.join(timeout=1):
                if time.monotonic() > deadline:
                    error = f"stopped after {args.timeout:.0f} s"
                    break
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as problem:
            print(problem, flush=True)
            error = str(problem).strip().splitlines()[-1]
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        written = Path(folder) / "result.json"
        return (json.loads(written.read_text()) if written.exists() else {}), error


@contextlib.contextmanager
def environment_of(changes: dict[str, str]) -> Iterator[None]:
    """Child processes get these variables."""
    before = dict(os.environ)
    os.environ.update({"OMP_NUM_THREADS": "1"} | changes)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def gpu_facts() -> dict[str, object]:
    import torch

    count = torch.cuda.device_count()
    return {"GPUs": count} | ({"peer access": torch.cuda.can_device_access_peer(0, 1)} if count > 1 else {})


def versions() -> dict[str, str]:
    import platform

    import torch

    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help=f"folder of {RESULT}")
    what.add_argument("--table", type=Path, metavar="FILE", help="print the tables of a result file, measure nothing")
    parser.add_argument("--tiny", action="store_true", help="small blocks, on a CPU too; the figures mean nothing")
    parser.add_argument("--timeout", type=float, default=75, help="seconds for each round")
    return parser.parse_args()


if __name__ == "__main__":
    main()
