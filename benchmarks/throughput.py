"""Measure prompts per minute: python benchmarks/throughput.py [ROW ...] [--prompts N] [--steps N] [--size tiny|full]

A row is a fleet with so many workers (fleet-2), or so many separate ComfyUIs with their own loader (separate-2): how
many prompts a minute, and how much RAM they take. Each GPU has as little memory free as the command line says.
README.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import report
from cases import CASES
from host_versions import versions_of
from run import RESULTS, describe_machine, hold_back_vram

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import demo
from fleet_host import FleetHost
from host import HeadlessHost

# The first prompts of a process load the model, and measure what a plan needs.
WARM_PROMPTS = 2
START_SECONDS = 600.0
CASE = "flux-1024-8gb"
SHOWN = ("prompts_per_minute", "ram_gb", "pinned_gb", "first_steps_s")


def main() -> None:
    args = parse_args()
    machine, size = demo.find_machine(), demo.SIZES[args.size]
    setups = {"fleet": fleet, "separate": separate}
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "versions": versions_of(args.comfyui),
        **{name: getattr(args, name) for name in ("prompts", "steps", "size", "free_gb")},
        "virtual": machine.cpu,
        "rows": {},
    }
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        write_models(args.comfyui, Path(folder), size)
        for name in args.rows:
            kind, _, number = name.rpartition("-")
            setup, count = setups[kind], int(number)
            case = dataclasses.replace(CASES[CASE], gpus=count, tiny=machine.cpu)
            with hold_back_vram(case, args.free_gb), setup(args, Path(folder), count) as hosts:
                result["rows"][name] = measure(hosts, count, size, args)
            print(name, json.dumps({key: result["rows"][name].get(key) for key in SHOWN}), flush=True)
            report.write_json(args.out / "throughput.json", result)
    print(json.dumps(ratios(result["rows"])))


def write_models(comfyui: Path, folder: Path, size: demo.Size) -> None:
    """Once, for all rows."""
    host = HeadlessHost(comfyui, folder)
    host.prepare()
    demo.write_models(host, size)


@dataclasses.dataclass
class Setup:
    """What takes prompts: one front, or several ComfyUIs by turns."""

    hosts: Sequence[HeadlessHost]
    loader: str
    free_ram: int

    def submit(self, number: int, prompt: dict[str, Any]) -> tuple[HeadlessHost, str]:
        host = self.hosts[number % len(self.hosts)]
        return host, host.submit(prompt)


@contextlib.contextmanager
def fleet(args: argparse.Namespace, folder: Path, count: int) -> Iterator[Setup]:
    free = psutil.virtual_memory().available
    with FleetHost(args.comfyui, folder, workers=count, **options()) as host:
        deadline = time.monotonic() + START_SECONDS
        while sum(worker["state"] == "free" for worker in host.workers) < count:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the workers do not start: {host.workers}; {host.log_tail()}")
            time.sleep(0.2)
        yield Setup([host], demo.OURS, free)


@contextlib.contextmanager
def separate(args: argparse.Namespace, folder: Path, count: int) -> Iterator[Setup]:
    """ComfyUIs that know nothing of each other, each with a GPU of its own and ComfyUI's own loader."""
    free = psutil.virtual_memory().available
    with contextlib.ExitStack() as stack:
        hosts = []
        for number in range(count):
            base = folder / f"separate-{number}"
            base.mkdir(exist_ok=True)
            if not (base / "models").exists():
                (base / "models").symlink_to(folder / "models")
            chosen = options()
            if not chosen["cpu"]:
                chosen["arguments"] = ["--cuda-device", str(number)]
            hosts.append(stack.enter_context(HeadlessHost(args.comfyui, base, **chosen)))
        yield Setup(hosts, demo.THEIRS, free)


def options() -> dict[str, Any]:
    machine = demo.find_machine()
    # Ray gives out as many GPUs as it is told, if this does not say that there are none.
    environ = {demo.VIRTUAL_VARIABLE: demo.VIRTUAL_DEVICES, "CUDA_VISIBLE_DEVICES": None} if machine.cpu else {}
    return {"cpu": machine.cpu, "environ": environ}


def measure(setup: Setup, count: int, size: demo.Size, args: argparse.Namespace) -> dict[str, Any]:
    """Warm all workers, then queue all prompts at once."""
    seeds = iter(range(1, 1_000_000))

    def run_all(number: int) -> float:
        start = time.perf_counter()
        waiting = []
        for place in range(number):
            prompt = demo.api_prompt(size, setup.loader, next(seeds))
            prompt["sampler"]["inputs"]["steps"] = args.steps
            waiting.append(setup.submit(place, prompt))
        for host, prompt_id in waiting:
            host.wait(prompt_id, timeout_s=1800)
        return time.perf_counter() - start

    result: dict[str, Any] = {"warm_seconds": run_all(count * WARM_PROMPTS)}
    result["ram_gb"] = (setup.free_ram - psutil.virtual_memory().available) / 1e9
    if setup.loader == demo.OURS:
        result |= of_ours(setup.hosts[0])
    result["seconds"] = run_all(count * args.prompts)
    result["prompts_per_minute"] = 60 * count * args.prompts / result["seconds"]
    return result


def of_ours(host: HeadlessHost) -> dict[str, Any]:
    """What the workers have page-locked, and how long the first step of each took."""
    status = demo.read_status(host)
    first_steps = []
    for number in dict.fromkeys(model["id"] for model in status["models"]):
        runs = host.get(f"/weightstream/v1/steps?model={number}")["runs"]
        # The oldest that is kept, which is the first of all after so few prompts.
        first_steps += [run["seconds"][0] for run in runs[:1]]
    return {
        "pinned_gb": status["host"]["pinned"] / 1e9,
        "first_steps_s": first_steps,
        "workers": status["fleet"]["workers"],
    }


def ratios(rows: dict[str, Any]) -> dict[str, float]:
    """For each fleet of several, how its rate compares with one worker's, and with as many separate ComfyUIs."""
    rates = {name: row["prompts_per_minute"] for name, row in rows.items()}
    found = {}
    for name, rate in rates.items():
        kind, _, number = name.rpartition("-")
        if kind == "fleet" and "fleet-1" in rates:
            found[f"{name}, of {number} times one"] = rate / (int(number) * rates["fleet-1"])
        if kind == "fleet" and f"separate-{number}" in rates:
            found[f"{name}, times separate"] = rate / rates[f"separate-{number}"]
    return found


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", default=["fleet-1", "fleet-2", "separate-2"], metavar="ROW")
    parser.add_argument("--prompts", type=int, default=6, help="for each worker")
    parser.add_argument("--steps", type=int, default=8, help="of each prompt")
    parser.add_argument("--size", choices=sorted(demo.SIZES), default="full")
    parser.add_argument("--free-gb", type=float, default=8.0, help="VRAM that is left free on each GPU")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="where the models go")
    parser.add_argument("--comfyui", type=Path, default=os.environ.get("COMFYUI_PATH"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.comfyui is None:
        parser.error("set COMFYUI_PATH, or give --comfyui")
    return args


if __name__ == "__main__":
    main()
