"""The processes of tensor_parallel.py: one for each GPU, and one alone that has both.

What is known is written after every figure, so that a run which fails or hangs leaves what came before it.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tensor_parallel_block import WAYS, build, inputs, shard
from tensor_parallel_shapes import Linear, Shape, activations, shapes
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

RANKS = 2
WARM_UP, ROUNDS = 3, 3
COPY_REPEATS, BLOCK_REPEATS = 20, 10
H2D_BYTES = 256 << 20
TIMEOUT = timedelta(seconds=60)

Run = Callable[[], object]


class Notes:
    """A dictionary that is on the disk after each change, or, in a process other than the first, nowhere."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.content: dict = {}

    def put(self, name: str, value: object) -> None:
        self.content[name] = value
        if self._path is not None:
            half_written = self._path.with_suffix(".new")
            half_written.write_text(json.dumps(self.content))
            half_written.replace(self._path)


def device_of(rank: int) -> torch.device:
    return torch.device("cuda", rank) if torch.cuda.device_count() >= RANKS else torch.device("cpu")


def synchronize(devices: list[torch.device]) -> None:
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def seconds(run: Run, repeats: int, devices: list[torch.device]) -> float:
    """Median over some rounds of a run's time, many runs queued behind each other in each.

    The clock is the host's, from an idle device to an idle device: so the first launch counts, and every later one only
    where the device waits for it. All ranks run the same number of times.
    """
    for _ in range(WARM_UP):
        run()
    found = []
    for _ in range(ROUNDS):
        synchronize(devices)
        started = time.perf_counter()
        for _ in range(repeats):
            run()
        synchronize(devices)
        found.append((time.perf_counter() - started) / repeats)
    return statistics.median(found)


# --------------------------------------------------------------------------------------- one process for each GPU


def measure_as_rank(rank: int, folder: str, tiny: bool) -> None:
    device = device_of(rank)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=(Path(folder) / "store").as_uri(),
        rank=rank,
        world_size=RANKS,
        timeout=TIMEOUT,
        device_id=device if on_gpu else None,
    )
    notes = Notes(Path(folder) / "result.json" if rank == 0 else None)
    with torch.no_grad():
        measure_collectives(shapes(tiny), device, notes)
        measure_blocks(shapes(tiny), device, notes, graphs=False)
        if on_gpu:
            measure_blocks(shapes(tiny), device, notes, graphs=True)
    if on_gpu:
        dist.destroy_process_group()  # After an error the other rank would never come to it.
    else:
        leave_together()


def leave_together() -> None:
    """End the process once the other rank is done too, without taking gloo's process group and the interpreter down.

    That crashed the process now and then (torch 2.11, one round of ninety), after all had been measured.
    """
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def measure_collectives(models: list[Shape], device: torch.device, notes: Notes) -> None:
    found = []
    for name, rows, width in activations(models):
        whole = torch.randn(rows, width, device=device).to(torch.bfloat16)
        half = torch.randn(rows * width // RANKS, device=device).to(torch.bfloat16)
        for operation, sent, run in (
            ("all-reduce", whole.nbytes, lambda whole=whole: dist.all_reduce(whole)),
            ("all-gather", half.nbytes, lambda w=whole, h=half: dist.all_gather_into_tensor(w.view(-1), h)),
        ):
            took = seconds(run, COPY_REPEATS, [device])
            found.append({"what": name, "rows": rows, "width": width, "operation": operation, "s": took})
            found[-1]["sent_bytes_per_s"] = sent / took
            whole.normal_()  # Sums that are added up again and again would overflow.
    notes.put("collectives", found)


def measure_blocks(models: list[Shape], device: torch.device, notes: Notes, graphs: bool) -> None:
    """Each kind of block whole and sharded, launched from Python or as a CUDA graph."""
    mesh = init_device_mesh(device.type, (RANKS,))
    found = {}
    for shape in models:
        arguments = inputs(shape, device)
        for kind in shape.blocks:
            key = f"{shape.name} {kind}"
            reference = build(shape, kind, device)
            found[key] = {"whole": {"s": block_seconds(reference, arguments, device, graphs)}}
            expected = reference(*arguments)  # Not its first run, whose attention another kernel may do.
            for way in WAYS:
                block = shard(build(shape, kind, device), way, mesh)
                took = block_seconds(block, arguments, device, graphs)
                found[key][way] = {"s": took, **difference(block(*arguments), expected)}
            notes.put("graphs" if graphs else "python", found)


def block_seconds(block: torch.nn.Module, arguments: tuple, device: torch.device, graphs: bool) -> float:
    run = captured(lambda: block(*arguments)) if graphs else lambda: block(*arguments)
    dist.barrier()
    return seconds(run, BLOCK_REPEATS, [device])


def captured(run: Run) -> Run:
    """``run`` as one CUDA graph. Other threads, as NCCL's watchdog, may use CUDA meanwhile."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph.replay


def difference(found: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    return {
        "differing": int((found != expected).sum()),
        "elements": expected.numel(),
        "largest": float((found.float() - expected.float()).abs().max()),
        "largest_value": float(expected.float().abs().max()),
    }


# ----------------------------------------------------------------------------------------------- one process alone


def measure_alone(_rank: int, folder: str, tiny: bool) -> None:
    devices = [device_of(rank) for rank in range(RANKS)]
    notes = Notes(Path(folder) / "result.json")
    with torch.no_grad():
        notes.put("h2d_bytes_per_s", host_to_devices(devices, H2D_BYTES >> (8 if tiny else 0)))
        notes.put("exchanges", [exchange(*what, devices) for what in activations(shapes(tiny))])
        notes.put("cut_attention", {shape.name: cut_attention(shape, devices[0]) for shape in shapes(tiny)})
        linears = {(linear.rows, linear.inputs, linear.outputs): linear for linear in all_linears(shapes(tiny))}
        notes.put("cut_linears", [cut_linear(linear, devices[0]) for linear in linears.values()])
        if devices[0].type == "cuda":
            notes.put("nccl", [reduce_with_nccl(*what, devices) for what in activations(shapes(tiny))])


def all_linears(models: list[Shape]) -> list[Linear]:
    return [linear for shape in models for kind in shape.blocks for linear in shape.linears(kind)]


def host_to_devices(devices: list[torch.device], nbytes: int) -> float:
    """Bytes per second to each device while all of them are copied to."""
    pinned = devices[0].type == "cuda"
    pairs = []
    for device in devices:
        host = torch.ones(nbytes, dtype=torch.uint8)
        pairs.append((host.pin_memory() if pinned else host, torch.empty(nbytes, dtype=torch.uint8, device=device)))

    def copy() -> None:
        for host, there in pairs:
            there.copy_(host, non_blocking=True)

    return nbytes / seconds(copy, COPY_REPEATS, devices)


def exchange(name: str, rows: int, width: int, devices: list[torch.device]) -> dict[str, object]:
    """An activation from one GPU to the other; and the sum of two, each GPU adding what the other sends."""
    mine, theirs = (torch.randn(rows, width, device=device).to(torch.bfloat16) for device in devices)
    at_mine, at_theirs = torch.empty_like(mine), torch.empty_like(theirs)

    def add_up() -> None:
        at_theirs.copy_(mine, non_blocking=True)
        at_mine.copy_(theirs, non_blocking=True)
        torch.add(mine, at_mine)
        torch.add(theirs, at_theirs)

    found = {"what": name, "rows": rows, "width": width}
    found["copy_s"] = seconds(lambda: at_theirs.copy_(mine, non_blocking=True), COPY_REPEATS, devices)
    found["copy_and_add_s"] = seconds(add_up, COPY_REPEATS, devices)
    return found


def reduce_with_nccl(name: str, rows: int, width: int, devices: list[torch.device]) -> dict[str, object]:
    """The same sum by torch's binding of NCCL for one process, which torch.distributed does not use."""
    both = [torch.randn(rows, width, device=device).to(torch.bfloat16) for device in devices]
    return {"what": name, "s": seconds(lambda: torch.cuda.nccl.all_reduce(both), COPY_REPEATS, devices)}


def cut_linear(linear: Linear, device: torch.device) -> dict[str, object]:
    """Elements that differ from the whole layer when it is cut in two in one way or another."""
    torch.manual_seed(0)
    x, weight, bias = (
        torch.randn(*sizes, device=device).mul_(scale).to(torch.bfloat16)
        for sizes, scale in (
            ((linear.rows, linear.inputs), 1.0),
            ((linear.outputs, linear.inputs), linear.inputs**-0.5),
            ((linear.outputs,), 1.0),
        )
    )
    whole = F.linear(x, weight, bias)
    left, right = x.chunk(2, 1)
    of_left, of_right = (half.contiguous() for half in weight.chunk(2, 1))
    columns = [F.linear(x, *halves) for halves in zip(weight.chunk(2), bias.chunk(2), strict=True)]
    cut = {
        "again": F.linear(x, weight, bias),
        "columns": torch.cat(columns, 1),
        "rows": F.linear(left.contiguous(), of_left, bias) + F.linear(right.contiguous(), of_right),
    }
    if linear.rows > 1:
        cut["tokens"] = torch.cat([F.linear(part, weight, bias) for part in x.chunk(2)])
    return linear._asdict() | {"elements": whole.numel(), "differing": count(cut, whole)}


def count(cut: dict[str, torch.Tensor], whole: torch.Tensor) -> dict[str, int]:
    return {way: int((found != whole).sum()) for way, found in cut.items()}


def cut_attention(shape: Shape, device: torch.device) -> dict[str, object]:
    """Elements that differ from attention as a whole when half of its heads, or of its queries, are done apart."""
    torch.manual_seed(0)
    sizes = (1, shape.heads, shape.tokens, shape.head_width)
    query, key, value = (torch.randn(*sizes, device=device).to(torch.bfloat16) for _ in range(3))
    attend = F.scaled_dot_product_attention
    attend(query, key, value)  # As above: not the first.
    whole = attend(query, key, value)
    halves = zip(*(x.chunk(2, 1) for x in (query, key, value)), strict=True)
    cut = {
        "again": attend(query, key, value),
        "heads": torch.cat([attend(*half) for half in halves], 1),
        "queries": torch.cat([attend(part, key, value) for part in query.chunk(2, 2)], 2),
    }
    return {"elements": whole.numel(), "differing": count(cut, whole)}
