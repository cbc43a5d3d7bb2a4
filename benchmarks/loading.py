"""Measure loading: python benchmarks/loading.py [ROW ...] [--case CASE]

How long from the start of the loader to the end of the first step, and what the steps after it cost, the second with
the building of the arena: with the file in the page cache and cold, beside ComfyUI's own loader; with too little
page-locked memory; with too little RAM; and staged for ever, with other numbers of threads and sizes of chunks.
README.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import report
from cases import CASES, GB
from run import (
    HERE,
    RESULTS,
    child_environment,
    describe_machine,
    ensure_checkpoint,
    hold_back_vram,
    keep_log,
    last_lines,
    settle_paths,
)

DROP_CACHES = Path("/proc/sys/vm/drop_caches")
GROUPS = Path("/sys/fs/cgroup")
POLL_SECONDS = 0.02
MB = 1 << 20
# Page-locked memory for any ring and little else.
RING_SHARE = 0.02
# Much more than processors cache.
MEMORY_BYTES = 8 << 30


@dataclass(frozen=True)
class Row:
    """One process that is measured.

    Attributes:
        case: picture size and free VRAM.
        contender: ``weightstream`` or ``comfy-dynamic``.
        cold: the page cache is dropped first.
        steps: of the first and of the later prompts.
        settings: of :class:`streaming.StreamingConfig`, where they are not ours.
        pin_share: page-locked memory, as a part of the checkpoint.
        ram_share: all memory of the process, as a part of the checkpoint.
    """

    case: str
    contender: str = "weightstream"
    cold: bool = False
    steps: int = 10
    settings: dict[str, int] = field(default_factory=dict)
    pin_share: float | None = None
    ram_share: float | None = None


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
    return {
        "cached": Row(case),
        "cached-again": Row(case),
        "cached-comfy": Row(case, "comfy-dynamic"),
        "cold": Row(case, cold=True),
        "cold-comfy": Row(case, "comfy-dynamic", cold=True),
        "pins-25": Row(streamed, pin_share=0.25),
        "pins-0": Row(streamed, pin_share=0.0, steps=5),
        "ram-50": Row(streamed, ram_share=0.5, steps=3, cold=True),
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
        with hold_back_vram(1, cases[name].free_gb) as holder:
            environment = child_environment(cases[name])
            result = run_row(name, table[name], checkpoint, args, holder.settled_free_bytes(), environment)
        results["rows"][name] = result
        print(f"{name}: {say(result)}", flush=True)
        report.write_json(args.out / "loading.json", results)


def run_row(
    name: str, row: Row, checkpoint: Path, args: argparse.Namespace, free_bytes: int, environment: dict[str, str]
) -> dict:
    """One child; its figures, or ``{"error": last lines}``."""
    if row.cold and not drop_caches():
        return {"error": [f"cannot write to {DROP_CACHES}"]}
    if not row.cold:
        read_through(checkpoint, 16, 16 * MB)
    size = checkpoint.stat().st_size
    job = {"checkpoint": str(checkpoint), "comfyui": str(args.comfyui), "free_bytes": free_bytes}
    job |= {"case": row.case, "contender": row.contender, "steps": row.steps, "settings": row.settings}
    job |= {"tiny": args.tiny, "pin_limit": None if row.pin_share is None else int(row.pin_share * size)}
    with tempfile.TemporaryDirectory() as scratch, ram_limit(row.ram_share, size) as group:
        out, log = Path(scratch) / "result.json", Path(scratch) / "log.txt"
        command = [sys.executable, str(HERE / "loading_worker.py"), json.dumps(job), str(out)]
        with open(log, "w") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, preexec_fn=group)
            peak = watch_memory(process, time.monotonic() + args.timeout)
        if args.logs:
            keep_log(log, args.logs / f"{name}.log")
        if not out.exists():
            return {"error": last_lines(log)}
        return json.loads(out.read_text()) | {"anonymous_peak_bytes": peak}


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


def drop_caches() -> bool:
    os.sync()
    try:
        DROP_CACHES.write_text("3")
    except OSError:
        return False
    return True


def read_through(path: Path, threads: int, chunk: int) -> float:
    """Read a file to its end; gives bytes per second."""
    size = path.stat().st_size
    with open(path, "rb", buffering=0) as file, ThreadPoolExecutor(threads) as pool:
        buffers = [memoryview(bytearray(chunk)) for _ in range(threads)]

        def read(number: int) -> None:
            for offset in range(number * chunk, size, threads * chunk):
                os.preadv(file.fileno(), [buffers[number]], offset)

        started = time.perf_counter()
        list(pool.map(read, range(threads)))
        return size / (time.perf_counter() - started)


def measure_reads(path: Path, cold: bool, memory: int) -> dict[str, float]:
    """Bytes per second of plain reads, and of copies within ``memory`` bytes: what no loader can beat."""
    found = {}
    if cold and drop_caches():
        found["cold_1_thread"] = read_through(path, 1, 16 * MB)
    if cold and drop_caches():
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


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=", ".join(rows("")))
    parser.add_argument("--case", default="flux-1024-16gb", choices=CASES)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "weightstream-benchmarks")
    parser.add_argument("--comfyui", type=Path, default=os.environ.get("COMFYUI_PATH"), help="default: $COMFYUI_PATH")
    parser.add_argument("--logs", type=Path, help="folder that keeps what the rows print")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one row")
    parser.add_argument("--tiny", action="store_true", help="try the script on a CPU; the figures mean nothing")
    return settle_paths(parser)


if __name__ == "__main__":
    main()
