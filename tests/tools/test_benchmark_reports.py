"""What the benchmarks make of their figures, and how they bring the page cache to a state."""

from __future__ import annotations

import ast
import json
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
MB = 1 << 20


def test_a_contender_is_compared_to_the_native_one_with_the_same_of_the_disk(benchmarks: Any) -> None:
    runs = {
        "weightstream": {"step_s": 1.0},
        "comfy-dynamic": {"step_s": 2.0},
        "weightstream-fast-disk": {"step_s": 1.0},
        "comfy-fast-disk": {"step_s": 4.0},
        "weightstream-no-fast-disk": {"step_s": 1.0},
    }
    case = benchmarks.cases.CASES["flux-1024-8gb"]
    found = benchmarks.report.summarize(case, {}, {}, runs)["runs"]
    assert {name: run.get("ratio_to_comfy_dynamic") for name, run in found.items()} == {
        "weightstream": 0.5,
        "comfy-dynamic": 1.0,
        "weightstream-fast-disk": 0.25,
        "comfy-fast-disk": 1.0,
        "weightstream-no-fast-disk": None,
    }


def imports(path: Path) -> set[str]:
    """The modules that a script imports when it is imported or runs; not what type checkers alone see."""
    tree = ast.parse(path.read_text("utf-8"))
    types = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    unseen = {id(node) for block in types for node in ast.walk(block)}
    nodes = [node for node in ast.walk(tree) if id(node) not in unseen]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


def test_no_script_needs_one_that_needs_it() -> None:
    paths = {path.stem: path for path in FOLDER.glob("*.py")}
    needs = {name: imports(path) & set(paths) for name, path in paths.items()}
    assert needs["worker"] == {"contenders", "job", "processes"}
    TopologicalSorter(needs).prepare()  # Raises CycleError, with the circle.


def test_result_files_have_a_line_for_each_figure(benchmarks: Any) -> None:
    content = {"row": {"steps_s": [0.1, 0.2], "prompts": [{"reruns": [0]}, {}], "text": "a [b], {c}"}, "none": None}
    text = benchmarks.report.as_json(content)
    assert json.loads(text) == content
    assert [line.strip() for line in text.splitlines()][1:3] == ['"row": {', '"steps_s": [0.1, 0.2],']


# -- the page cache ----------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint"
    path.write_bytes(bytes(8 * MB + 1))
    return path


def test_a_file_is_brought_into_the_page_cache_and_out(benchmarks: Any, file: Path) -> None:
    cache = benchmarks.page_cache
    known = cache.share(file) is not None
    assert cache.share(file) == (1.0 if known else None)
    cold = cache.cool(file)  # Not on every file system.
    assert cold == (known and cache.share(file) <= cache.COLD_SHARE)
    before = cache.share(file)
    with cache.prepared(file, cache.PageCache.WARM) as shares:
        assert shares == {"before": before, "start": 1.0 if known else None}
        emptied = cache.cool(file)
    assert emptied == cold
    assert shares["end"] == before


def test_a_file_that_is_not_read_stays_as_it_is(benchmarks: Any, file: Path) -> None:
    cache = benchmarks.page_cache
    cache.cool(file)
    before = cache.share(file)
    with cache.prepared(file, cache.PageCache.AS_IT_IS) as shares:
        pass
    assert shares == {"before": before, "start": before, "end": before}


def test_where_the_system_does_not_say_the_file_is_read_and_nothing_is_told(
    benchmarks: Any, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = benchmarks.page_cache
    read = []
    monkeypatch.setattr(cache.sys, "platform", "darwin")
    monkeypatch.setattr(cache, "read_through", lambda path, threads, chunk: read.append(path))
    with cache.prepared(file, cache.PageCache.WARM) as shares:
        pass
    assert shares == {"before": None, "start": None, "end": None}
    assert read == [file]
    monkeypatch.setattr(cache, "DROP_CACHES", file.parent / "absent" / "drop_caches")
    with pytest.raises(OSError, match="stays in the page cache"), cache.prepared(file, cache.PageCache.COLD):
        pass


def test_every_byte_is_read(benchmarks: Any, file: Path) -> None:
    assert benchmarks.page_cache.read_through(file, threads=3, chunk=MB // 2) > 0


# -- short prompts -----------------------------------------------------------------------------------------------------


def short(first: float, second: float, latents: str) -> dict[str, Any]:
    prompts = zip((first, second), latents, strict=True)
    return {
        "loader_s": 0.5,
        "prompts": [{"seconds": s, "steps_s": [s / 2, s / 4], "latent_sha256": latent} for s, latent in prompts],
    }


@pytest.mark.parametrize(("latents", "same"), [("xb", True), ("ax", False)])
def test_short_prompts_are_compared_by_their_second_latents(benchmarks: Any, latents: str, same: bool) -> None:
    ours, native = short(1.0, 0.5, latents), short(4.0, 1.0, "ab")
    benchmarks.loading.compare(ours, native)
    assert (ours["to_comfy"], ours["identical_to_comfy"]) == ([0.25, 0.5], same)
    said = benchmarks.loading.say(ours)
    assert "prompt 1 1.00 s (0.25 of ComfyUI's): 0.500 0.250; prompt 2 0.50 s (0.50 of ComfyUI's)" in said
    assert said.endswith("latents identical" if same else "latents differ")


def test_short_prompts_without_their_native_row_are_not_compared(benchmarks: Any) -> None:
    ours = short(1.0, 0.5, "ab")
    for native in ({}, {"error": ["stopped after 120 s"]}):
        benchmarks.loading.compare(ours, native)
    assert "to_comfy" not in ours
    assert "of ComfyUI's" not in benchmarks.loading.say(ours)


def test_every_short_row_of_ours_has_its_native_one(benchmarks: Any) -> None:
    rows = benchmarks.loading.rows("flux-1024-16gb")
    ours = [row for row in rows.values() if row.short and row.contender == "weightstream"]
    assert [rows[row.native].case for row in ours] == [row.case for row in ours] == ["flux-1024-16gb", "flux-1024-8gb"]


# -- many prompts ------------------------------------------------------------------------------------------------------


def prompt(changes: list[int], reruns: list[int], free: int, latent: str = "a", **torch: list[int]) -> dict[str, Any]:
    return {
        "steps_s": [0.5, 0.2, 0.3],
        "plan_changes": changes,
        "reruns": reruns,
        "free_bytes": [free] * 3,
        "kept_by_torch_bytes": [5, 7, 6],
        "latent_sha256": latent,
        "warnings": ["out of memory in a step"] * sum(reruns),
        **torch,
    }


def test_what_many_prompts_come_to(benchmarks: Any) -> None:
    torch = {"reserved_bytes": [80, 80, 90], "allocated_peak_bytes": [95, 85, 60], "reserved_peak_bytes": [80, 95, 90]}
    prompts = [
        prompt([1, 1, 0], [0, 0, 0], free=1, latent="first", **torch),
        prompt([0, 0, 0], [0, 0, 0], free=20, **torch),
        prompt([0, 1, 0], [0, 2, 0], free=30, **torch),
    ]
    assert benchmarks.steady.unused_bytes(prompts[1]) == [5, 15, 50]
    assert benchmarks.steady.free_at_fullest(prompts[1]) == [20, 5, 20]
    found = benchmarks.steady.summarize(prompts)
    assert found == {
        "reruns": 2,
        "prompts_with_reruns": [3],
        "first_plan_changes": 2,
        "plan_changes": 1,
        "least_unused_bytes": 15,
        "least_free_bytes": 5,
        "most_kept_by_torch_bytes": 7,
        "latents_equal": True,
    }
    said = benchmarks.steady.say(found | {"prompts": prompts, "allocator": "native"})
    assert "3 prompts, step 0.300 s (slowest 0.300), 2 reruns (prompts [3]), 1 plan changes after 2 in" in said
    assert said.endswith("(native); first of 2 warnings: out of memory in a step")


def test_one_prompt_without_a_gpu_comes_to_something_too(benchmarks: Any) -> None:
    found = benchmarks.steady.summarize([prompt([1, 0, 0], [0, 0, 0], free=9)])
    assert (found["least_unused_bytes"], found["least_free_bytes"], found["plan_changes"]) == (9, 9, 0)


def test_calls_of_the_host_are_counted_and_made(benchmarks: Any) -> None:
    made = []

    class host:
        @staticmethod
        def free_memory(memory_required: float, device: str) -> None:
            made.append((memory_required, device))

    calls = benchmarks.steady_worker.HostCalls()
    calls.watch(host, "free_memory")
    host.free_memory(5, "cuda")
    host.free_memory(memory_required=7, device="cuda")
    assert calls.take() == {"calls": {"host.free_memory": 2}, "most_asked_bytes": 7}
    assert calls.take() == {"calls": {}, "most_asked_bytes": 0.0}
    assert made == [(5, "cuda"), (7, "cuda")]


def test_what_torch_counts_on_a_gpu_is_taken_under_our_names(benchmarks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, resets = benchmarks.steady_worker, []
    counts = {"reserved_bytes.all.current": 5, "allocated_bytes.all.peak": 4, "num_ooms": 1, "other": 9}
    blocks = [{"size": 7, "state": "active_allocated"}, {"size": 3, "state": "inactive"}]
    assert (worker.torch_counts(), worker.allocator(), worker.largest_cached_block()) == ({}, "", None)
    assert worker.counts_of_pages() == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: counts)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: resets.append(1))
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: [{"blocks": blocks}, {"blocks": []}])
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert worker.counts_of_pages() == {"pages_used_bytes": 0, "pages_mapped_bytes": 0}
    pack = SimpleNamespace(page_counts=lambda gpu: (gpu, gpu + 1))
    monkeypatch.setitem(sys.modules, "weightstream_pack.streaming.devices.cuda_pages", pack)
    assert worker.counts_of_pages() == {"pages_used_bytes": 1, "pages_mapped_bytes": 2}
    assert worker.torch_counts() == {"reserved_bytes": 5, "allocated_peak_bytes": 4, "ooms": 1}
    assert (len(resets), worker.largest_cached_block()) == (1, 3)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    assert worker.largest_cached_block() is None


# -- the host ----------------------------------------------------------------------------------------------------------


def call(name: str, thread: int, duration: float, category: str = "cuda_runtime") -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "pid": 1, "tid": thread, "ts": 0.0, "dur": duration}


@pytest.mark.parametrize("thread", [7, 8])
def test_calls_are_counted_by_kind_and_thread(benchmarks: Any, thread: int) -> None:
    events = [
        *(call("cudaLaunchKernel", 7, duration) for duration in (4.0, 6.0, 1000.0, 6.0)),
        *(call("cudaMemcpyAsync", 7, 10.0) for _ in range(2)),
        call("cuLaunchKernel", 7, 5.0, "cuda_driver"),
        call("cudaMemcpyAsync", 9, 10.0),
        call("a kernel", 7, 50.0, "kernel"),
        {"ph": "M", "name": "process_name", "pid": 1, "tid": 7},
    ]
    found = benchmarks.driver_calls.summarize(events, thread, steps=2)
    assert found["calls"] == {"cudaLaunchKernel": 2, "cudaMemcpyAsync": 1, "cuLaunchKernel": 0.5}
    assert next(iter(found["calls"])) == "cudaLaunchKernel"
    assert found["calls_elsewhere"] == {"cudaMemcpyAsync": 0.5}
    assert found["median_call_us"]["cudaLaunchKernel"] == 6.0
    assert found["call_seconds"]["cudaMemcpyAsync"] == pytest.approx(10e-6)
    assert found["waiting_s"] == pytest.approx(500e-6)


def test_a_row_of_the_host_is_compared_to_the_resident_model(benchmarks: Any) -> None:
    figures = {"process_cpu_s": 0.08, "step_s": 0.07, "lag_s": 0.001, "latent_sha256": "a"}
    resident = {"cpu_s": 0.05, "calls": {"cudaLaunchKernel": 100, "cudaMalloc": 1}, **figures}
    streamed = {"cpu_s": 0.06, "calls": {"cudaLaunchKernel": 100, "cudaMemcpyAsync": 40}, **figures}
    benchmarks.host_time.compare(streamed, resident)
    assert streamed["cpu_to_resident"] == pytest.approx(1.2)
    assert streamed["more_calls_than_resident"] == {"cudaMemcpyAsync": 40, "cudaMalloc": -1}
    assert streamed["identical_to_resident"]
    said = benchmarks.host_time.say(streamed)
    assert said.startswith("60.0 ms of the model's thread a step (1.20 of resident), 80.0 of all, 70.0 by the clock")
    assert said.endswith("140 calls a step: 100 cudaLaunchKernel, 40 cudaMemcpyAsync")
    assert [benchmarks.host_time.resident_of(name) for name in ("streamed-2gpus", "flux-streamed")] == [
        "resident",
        "flux-resident",
    ]


def test_the_clock_of_the_host_takes_whole_steps(benchmarks: Any) -> None:
    waits = []
    clock = benchmarks.host_time_worker.HostClock(3, lambda: waits.append(1))
    for _ in range(3):
        clock.mark()
    figures = clock.figures()
    assert len(figures["cpu_steps_s"]) == 2
    assert figures["cpu_s"] >= 0
    assert (waits, clock.lag_s >= 0) == ([1], True)


def test_a_job_arrives_as_it_was_sent(benchmarks: Any, tmp_path: Path) -> None:
    for case in (benchmarks.cases.CASES["flux-2048-4gb"], benchmarks.cases.CASES["wan-480p-8gb"].shrunk()):
        job = benchmarks.job.Job(case, "comfy-no-fast-disk", tmp_path / "file", tmp_path, 6, 10**9)
        assert benchmarks.job.Job.from_dict(json.loads(json.dumps(job.as_dict() | {"more": 1}))) == job


def test_the_packs_readme_leaves_out_what_was_not_measured(benchmarks: Any) -> None:
    runs = {"weightstream": {"step_s": 0.25}, "comfy-dynamic": {"error": ["stopped"]}}
    result = {"free_gb": 8.0, "floor_s": None, "resident_step_s": None, "runs": runs}
    table = benchmarks.report.front_table({case: result for _, case in benchmarks.report.FRONT_ROWS})
    assert "|  | 8 GB |  | **0.250** |  |  |  | 5.0 |" in table.splitlines()
