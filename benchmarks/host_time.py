"""Measure the host: python benchmarks/host_time.py [ROW ...] [--steps N]

What a step costs the thread that runs the model, and how often it calls the driver: with everything on the GPU in
ComfyUI, and with everything streamed, to one GPU and to two. README.md says what the figures mean.
"""

from __future__ import annotations

import argparse
from typing import Any

import report
from cases import CASES
from job import Job
from page_cache import PageCache, prepared
from processes import run_worker
from run import HolderError, describe_machine, ensure_checkpoint, hold_back_vram, parse_with_paths

# By its name: the case and the contender. CPU time is that of the first three, whose kernels are so small that the GPU
# waits for the host; calls are those of the last three, whose copies are waited for.
ROWS = {
    "resident": ("flux-thin-streamed", "resident"),
    "streamed": ("flux-thin-streamed", "weightstream"),
    "streamed-2gpus": ("2gpus-flux-thin-streamed", "weightstream"),
    "flux-resident": ("flux-1024-streamed", "resident"),
    "flux-streamed": ("flux-1024-streamed", "weightstream"),
    "flux-streamed-2gpus": ("2gpus-flux-1024-streamed", "weightstream"),
}
MOST_SHOWN = 8


def main() -> None:
    args = parse_args()
    results = {"machine": describe_machine(), "steps": args.steps, "rows": {}}
    for name in args.rows or ROWS:
        row = results["rows"][name] = run_row(name, args)
        compare(row, results["rows"].get(resident_of(name), {}))
        print(f"{name}: {say(row)}", flush=True)
        report.write_json(args.out / "host-time.json", results)


def run_row(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One child; its figures, or ``{"error": [how it ended, its last lines ...]}``."""
    case_name, contender = ROWS[name]
    case = CASES[case_name].shrunk() if args.tiny else CASES[case_name]
    checkpoint = ensure_checkpoint(case.model, args.work)
    log_to = args.logs / f"host-time.{name}.log" if args.logs else None
    try:
        with hold_back_vram(case, case.free_gb) as holder, prepared(checkpoint, PageCache.WARM) as shares:
            job = Job(case, contender, checkpoint, args.comfyui, args.steps, holder.settled_free_bytes())
            result = run_worker("host_time_worker.py", job.as_dict(), case, args.timeout, log_to)
    except HolderError as error:  # Here are fewer GPUs than it takes.
        return {"error": [str(error)]}
    return result | {"page_cache_share": shares}


def resident_of(name: str) -> str:
    """The row that has the same model on one GPU."""
    return "flux-resident" if name.startswith("flux-") else "resident"


def compare(row: dict[str, Any], resident: dict[str, Any]) -> None:
    """Write into ``row`` what it costs beside the model that is on the GPU."""
    if "calls" not in row or "calls" not in resident:
        return
    row["cpu_to_resident"] = row["cpu_s"] / resident["cpu_s"]
    kinds = [*row["calls"], *(kind for kind in resident["calls"] if kind not in row["calls"])]
    more = {kind: row["calls"].get(kind, 0) - resident["calls"].get(kind, 0) for kind in kinds}
    row["more_calls_than_resident"] = {kind: count for kind, count in more.items() if count}
    row["identical_to_resident"] = row["latent_sha256"] == resident["latent_sha256"]


def say(row: dict[str, Any]) -> str:
    if "error" in row:
        return "failed: " + " | ".join(row["error"])
    text = f"{row['cpu_s'] * 1000:.1f} ms of the model's thread a step"
    text += f" ({row['cpu_to_resident']:.2f} of resident)" if "cpu_to_resident" in row else ""
    text += f", {row['process_cpu_s'] * 1000:.1f} of all, {row['step_s'] * 1000:.1f} by the clock"
    text += f", the GPU {row['lag_s'] * 1000:.1f} behind"
    shown = ", ".join(f"{count:.0f} {kind}" for kind, count in list(row["calls"].items())[:MOST_SHOWN])
    return f"{text}; {sum(row['calls'].values()):.0f} calls a step" + (f": {shown}" if shown else "")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=", ".join(ROWS))
    parser.add_argument("--steps", type=int, default=20, help="that are measured")
    parser.add_argument("--timeout", type=float, default=150, help="seconds for one row")
    return parse_with_paths(parser)


if __name__ == "__main__":
    main()
