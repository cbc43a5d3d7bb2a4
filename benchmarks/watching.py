"""Measure what it costs to watch: python benchmarks/watching.py [--pairs N] [--steps N] [--size tiny|full]

One ComfyUI runs the demo's prompt again and again, in turn with nobody watching and with a page that has a lease on
events, as the open widget has. The result is the ratio of the two times of each pair, the second of them in turn the
one that is watched, so that whatever drifts cancels out. README.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import report
from host_versions import versions_of
from run import RESULTS, describe_machine

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import demo
from host import HeadlessHost

PAGE = "watching"
WATCH_ROUTE = "/weightstream/v1/watch"
# As often as the widget does.
RENEW_SECONDS = 4.0
IDLE_SECONDS = 30.0
SHOWN = ("ratio", "seconds", "seconds_watched", "cpu_share", "cpu_share_watched", "events", "event_bytes")


@contextlib.contextmanager
def watched(host: HeadlessHost) -> Iterator[list[int]]:
    """A page with a lease; gives the sizes of the events that have reached it."""
    sizes: list[int] = []
    ready, stop = threading.Event(), threading.Event()

    async def page() -> None:
        async with aiohttp.ClientSession(host.url) as session, session.ws_connect(f"/ws?clientId={PAGE}") as socket:
            renewing = asyncio.create_task(renew(session))
            while not stop.is_set():
                with contextlib.suppress(asyncio.TimeoutError):
                    message = await socket.receive(timeout=0.2)
                    if message.type == aiohttp.WSMsgType.TEXT and '"weightstream.status"' in message.data:
                        sizes.append(len(message.data))
                        ready.set()
            renewing.cancel()

    async def renew(session: Any) -> None:
        while True:
            async with session.post(WATCH_ROUTE, json={"client_id": PAGE}) as answer:
                answer.raise_for_status()
            await asyncio.sleep(RENEW_SECONDS)

    thread = threading.Thread(target=lambda: asyncio.run(page()))
    thread.start()
    try:
        if not ready.wait(30):
            raise RuntimeError("no event has reached the page")
        yield sizes
    finally:
        stop.set()
        thread.join()


def run_seconds(host: HeadlessHost, size: demo.Size, seed: int, steps: int) -> float:
    """One prompt, by the host's own clock."""
    prompt = demo.api_prompt(size, demo.OURS, seed)
    prompt["sampler"]["inputs"]["steps"] = steps
    messages = dict(host.run(prompt, timeout_s=1800)["status"]["messages"])
    return (messages["execution_success"]["timestamp"] - messages["execution_start"]["timestamp"]) / 1000


def cpu_share(host: HeadlessHost, seconds: float) -> float:
    """The part of one core that the host takes while it has nothing to do."""
    process = psutil.Process(host.pid)
    before = process.cpu_times()
    time.sleep(seconds)
    after = process.cpu_times()
    return round((after.user + after.system - before.user - before.system) / seconds, 6)


def measure(host: HeadlessHost, size: demo.Size, pairs: int, steps: int, idle_s: float) -> dict[str, Any]:
    alone, with_page, events = [], [], []
    for seed in range(3):
        run_seconds(host, size, seed, steps)
    for pair in range(pairs):
        for side in (False, True) if pair % 2 else (True, False):
            if side:
                with watched(host) as sizes:
                    with_page.append(run_seconds(host, size, 1000 + 2 * pair, steps))
                events += sizes
            else:
                alone.append(run_seconds(host, size, 1001 + 2 * pair, steps))
    ratios = [one / other for one, other in zip(with_page, alone, strict=True)]
    spread = [first / second for first, second in zip(alone[::2], alone[1::2], strict=False)]
    idle = cpu_share(host, idle_s)
    with watched(host):
        idle_watched = cpu_share(host, idle_s)
    return {
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "ratios_of_two_unwatched": spread,
        "seconds": statistics.median(alone),
        "seconds_watched": statistics.median(with_page),
        "cpu_share": idle,
        "cpu_share_watched": idle_watched,
        "events": len(events),
        "event_bytes": max(events),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--idle", type=float, default=IDLE_SECONDS, help="seconds of doing nothing that are measured")
    parser.add_argument("--size", choices=sorted(demo.SIZES), default="tiny")
    parser.add_argument("--comfyui", type=Path, default=os.environ.get("COMFYUI_PATH"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.comfyui is None:
        parser.error("set COMFYUI_PATH, or give --comfyui")
    size, machine = demo.SIZES[args.size], demo.find_machine()
    environment = {demo.VIRTUAL_VARIABLE: "2x24MB"} if machine.cpu else {}
    with tempfile.TemporaryDirectory() as folder:
        host = HeadlessHost(args.comfyui, folder, cpu=machine.cpu, environ=environment)
        host.prepare()
        demo.write_models(host, size)
        with host:
            result = measure(host, size, args.pairs, args.steps, args.idle)
    result |= {
        "machine": describe_machine(),
        "versions": versions_of(args.comfyui),
        "size": args.size,
        "steps": args.steps,
        "virtual": machine.cpu,
    }
    report.write_json(args.out / "watching.json", result)
    print(json.dumps({name: result[name] for name in SHOWN}))


if __name__ == "__main__":
    main()
