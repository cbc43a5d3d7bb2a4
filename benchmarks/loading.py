"""Measure loading: python benchmarks/loading.py [ROW ...] [--case CASE]

How long from the start of the loader to the end of the first step, and what the steps after it cost, the second with
the building of the arena: with the file in the page cache and cold, beside ComfyUI's own loader; with too little
page-locked memory; with too little RAM; and staged for ever, with other numbers of threads and sizes of chunks. And
prompts of 4 steps, as models take them that are made for few: there the first steps are all that counts.
README.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import report
from cases import CASES, GB
from job import Job
from page_cache import MB, PageCache, cool, prepared, read_through
from processes import child_environment, keep_log, last_lines, worker_command
from run import describe_machine, ensure_checkpoint, hold_back_vram, parse_with_paths

GROUPS = Path("/sys/fs/cgroup")
POLL_SECONDS = 0.02
# Of a model that is made for few.
FEW_STEPS = 4
# Page-locked memory for any ring and little else.
RING_SHARE = 0.02
# Much more than processors cache.
MEMORY_BYTES = 8 << 30


@dataclass(frozen=True)
class Row:
    """One process that is measured.

    Attributes:
        case: picture size and free VRAM.
        contender: as run.py has them.
        cold: the file is not in the page cache.
        steps: of the first and of the later prompts.
        short: two prompts are measured as they are, and nothing else.
        native: of a short one, the row that is ComfyUI's own loader.
        settings: of :class:`streaming.StreamingConfig`, where they are not ours.
        pin_share: page-locked memory, as a part of the checkpoint.
        ram_share: all memory of the process, as a part of the checkpoint.
    """

    case: str
    contender: str = "weightstream"
    cold: bool = False
    steps: int = 10
    short: bool = False
    native: str = ""
    settings: dict[str, int] = field(default_factory=dict)
    pin_share: float | None = None
    ram_share: float | None = None


# Who runs short prompts: the end of the row's name, the contender, and whether it is ours.
SHORT = (("", "weightstream", True), ("-comfy", "comfy-dynamic", False), ("-comfy-static", "comfy-static", False))


def rows(case: str) -> dict[str, Row]:
    streamed = "flux-1024-streamed"
    builders = {f"fill-{threads}": Row(case, settings={"fill_threads": threads}) for threads in (2, 4, 8)}
    threads = {
        f"threads-{threads}x{size}": Row(
            streamed,
            settings={"read_threads": threads, "chunk_bytes": size * MB, "chunks": 2 * threads},
            pin_share=RING_SHARE,
            steps=4,
        )
        for threads, size in ((4, 16), (8, 4), (8, 8), (8, 16), (12, 16), (16, 4), (16, 8))
    }
    few = {
        f"4-steps{size}{who}": Row(
            sized, contender, steps=FEW_STEPS, short=True, native=f"4-steps{size}-comfy" if ours else ""
        )
        for size, sized in (("", case), ("-8gb", "flux-1024-8gb"))
        for who, contender, ours in SHORT
    }
    return {
        "cached": Row(case),
        "cached-again": Row(case),
        "cached-comfy": Row(case, "comfy-dynamic"),
        "cold": Row(case, cold=True),
        "cold-comfy": Row(case, "comfy-dynamic", cold=True),
        "pins-25": Row(streamed, pin_share=0.25),
        "pins-0": Row(streamed, pin_share=0.0, steps=5),
        "ram-50": Row(streamed, ram_share=0.5, steps=3, cold=True),
        **few,
        **builders,
        **threads,
    }


def main() -> None:
    args = parse_args()
    table = rows(args.case)
    names = args.rows or list(table)
    cases = {name: CASES[row.case].shrunk() if args.tiny else CASES[row.case] for name, row in table.items()}
    checkpoint = ensure_checkpoint(cases[names[0]].model, args.work)
    results = {"machine": describe_machine(), "checkpoint_bytes": checkpoint.stat().st_size, "rows": {}}
    memory = MEMORY_BYTES >> (6 if args.tiny else 0)
    results["read"] = measure_reads(checkpoint, any(table[name].cold for name in names), memory)
    print(json.dumps(results["read"]), flush=True)
    for name in names:
        with hold_back_vram(cases[name], cases[name].free_gb) as holder:
            row, case = table[name], cases[name]
            job = Job(case, row.contender, checkpoint, args.comfyui, row.steps, holder.settled_free_bytes())
            result = run_row(name, row, job, args)
        results["rows"][name] = result
        print(f"{name}: {say(result)}", flush=True)
        for other in names:
            compare(results["rows"].get(other, {}), results["rows"].get(table[other].native, {}))
        report.write_json(args.out / "loading.json", results)
    for name, result in results["rows"].items():
        if "to_comfy" in result:  # Known only now.
            print(f"{name}: {say(result)}", flush=True)


def run_row(name: str, row: Row, job: Job, args: argparse.Namespace) -> dict:
    """One child; its figures, or ``{"error": last lines}``."""
    size = job.checkpoint.stat().st_size
    wanted = job.as_dict() | {"settings": row.settings, "short": row.short}
    wanted |= {"pin_limit": None if row.pin_share is None else int(row.pin_share * size)}
    try:
        with (
            tempfile.TemporaryDirectory() as scratch,
            prepared(job.checkpoint, PageCache.COLD if row.cold else PageCache.WARM) as shares,
            ram_limit(row.ram_share, size) as group,
        ):
            out, log = Path(scratch) / "result.json", Path(scratch) / "log.txt"
            command, environment = worker_command("loading_worker.py", wanted, out), child_environment(job.case)
            with open(log, "w") as output:
                process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, preexec_fn=group)
                peak = watch_memory(process, time.monotonic() + args.timeout)
            if args.logs:
                keep_log(log, args.logs / f"{name}.log")
            result = json.loads(out.read_text()) if out.exists() else {"error": last_lines(log)}
    except OSError as error:
        return {"error": [str(error)]}
    return result | {"anonymous_peak_bytes": peak, "page_cache_share": shares}


def compare(ours: dict, native: dict) -> None:
    """Write into ``ours`` how its short prompts compare to ComfyUI's own.

    Of the latents the second ones are compared: the first sampling of a process differs from all others in its last
    bits, whoever runs it.
    """
    if "prompts" not in ours or "prompts" not in native:
        return
    pairs = list(zip(ours["prompts"], native["prompts"], strict=True))
    ours["to_comfy"] = [one["seconds"] / other["seconds"] for one, other in pairs]
    one, other = pairs[-1]
    ours["identical_to_comfy"] = one["latent_sha256"] == other["latent_sha256"]


def watch_memory(process: subprocess.Popen, deadline: float) -> int:
    """Wait for the end; the most memory of its own, file cache and mapped files not counted, that it had."""
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem"))]
            peak = max(peak, sum(sizes))
        if time.monotonic() > deadline:
            process.kill()
        time.sleep(POLL_SECONDS)
    return peak


@contextlib.contextmanager
def ram_limit(share: float | None, size: int) -> Iterator[object]:
    """A control group of that size; gives what puts a child into it."""
    if share is None:
        yield None
        return
    group = GROUPS / "weightstream-benchmark"
    (GROUPS / "cgroup.subtree_control").write_text("+memory")
    group.mkdir(exist_ok=True)
    (group / "memory.max").write_text(str(int(share * size)))
    (group / "memory.swap.max").write_text("0")
    try:
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()


# ---------------------------------------------------------------------------------------------------- the disk


def measure_reads(path: Path, cold: bool, memory: int) -> dict[str, float]:
    """Bytes per second of plain reads, and of copies within ``memory`` bytes: what no loader can beat."""
    found = {}
    if cold and cool(path):
        found["cold_1_thread"] = read_through(path, 1, 16 * MB)
    if cold and cool(path):
        found["cold_8_threads"] = read_through(path, 8, 8 * MB)
    read_through(path, 16, 16 * MB)
    found["cached_8_threads"] = read_through(path, 8, 8 * MB)
    found["cached_16_threads"] = read_through(path, 16, 16 * MB)
    found["memory_8_threads"] = copy_memory(8, 16 * MB, memory)
    found["memory_16_threads"] = copy_memory(16, 16 * MB, memory)
    return found


def copy_memory(threads: int, chunk: int, memory: int) -> float:
    """Copy host memory through a ring of chunks, two for each thread; gives bytes per second, the best of three."""
    source = np.ones(memory, np.uint8)
    ring = [np.ones(chunk, np.uint8) for _ in range(2 * threads)]

    def copy(number: int) -> None:
        for turn, offset in enumerate(range(number * chunk, source.nbytes, threads * chunk)):
            np.copyto(ring[number + turn % 2 * threads], source[offset : offset + chunk])

    def seconds() -> float:
        started = time.perf_counter()
        list(pool.map(copy, range(threads)))
        return time.perf_counter() - started

    with ThreadPoolExecutor(threads) as pool:
        return source.nbytes / min(seconds() for _ in range(3))


def say(result: dict) -> str:
    if "error" in result:
        return "failed: " + " | ".join(result["error"])
    if "prompts" in result:
        return say_prompts(result)
    first, later, steady = result["first_step_s"], result["later_steps_s"], result["steady_step_s"]
    text = f"loader {result['loader_s']:.2f} s, first step done after {first:.2f} s; then"
    text += " ".join(f" {step:.3f}" for step in later) + f"; steady {steady:.3f}"
    own = result["anonymous_before_bytes"]
    text += f"; RAM {own / GB:.1f} GB before, {(result['anonymous_peak_bytes'] - own) / GB:.1f} GB more at most"
    if "status" in result:
        status = result["status"]
        text += f"; streamed {status['streamed_block_bytes'] / GB:.2f}, page-locked {status['pinned_bytes'] / GB:.2f}"
        text += f", staged {status['staged_bytes'] / GB:.2f} GB ({status['staged_bytes'] / steady / GB:.1f} GB/s)"
    return text + f"; {result['first_latent_sha256'][:8]} {result['latent_sha256'][:8]}"


def say_prompts(result: dict) -> str:
    """Of short prompts: how long each took, from the loader's start the first, and each step."""
    parts = [f"loader {result['loader_s']:.2f} s"]
    for number, prompt in enumerate(result["prompts"]):
        steps = " ".join(f"{step:.3f}" for step in prompt["steps_s"])
        ratio = f" ({result['to_comfy'][number]:.2f} of ComfyUI's)" if "to_comfy" in result else ""
        parts.append(f"prompt {number + 1} {prompt['seconds']:.2f} s{ratio}: {steps}")
    if "to_comfy" in result:
        parts.append("latents identical" if result["identical_to_comfy"] else "latents differ")
    return "; ".join(parts)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=", ".join(rows("")))
    parser.add_argument("--case", default="flux-1024-16gb", choices=CASES)
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one row")
    return parse_with_paths(parser)


if __name__ == "__main__":
    main()
