"""The benchmarks start in this host, do what its executor does, and run in their smallest form without a GPU.

run.py does so in test_gpu_command.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from servers import Running

from tools import demo
from tools.host import HeadlessHost

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
HOST = Path(os.environ["COMFYUI_PATH"])

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the benchmarks measure on Linux alone")


EXECUTOR = """
async def execute():
    try:
        output = await get_output_data()
    finally:
        if comfy.memory_management.aimdo_enabled:
            if get_console_log_level(args.verbose) == "DEBUG":
                comfy_aimdo.control.analyze()
{calls}
"""
QUEUES = "comfy.model_prefetch.cleanup_prefetch_queues"
BUFFERS = "comfy.model_management.reset_cast_buffers"
WATERMARKS = "comfy_aimdo.model_vbar.vbars_reset_watermark_limits"


def host_with(folder: Path, calls: list[str], options: str = "") -> Path:
    """The files of a host that are read, with an executor that ends a node with ``calls``."""
    (folder / "comfy").mkdir()
    (folder / "comfy" / "cli_args.py").write_text(options, "utf-8")
    (folder / "comfyui_version.py").write_text('__version__ = "0.99.0"\n', "utf-8")
    text = EXECUTOR.format(calls="\n".join(" " * 12 + call for call in calls))
    (folder / "execution.py").write_text(text, "utf-8")
    return folder


@pytest.mark.parametrize("order", [[BUFFERS, QUEUES, WATERMARKS], [QUEUES, BUFFERS, WATERMARKS]])
def test_a_node_ends_in_the_order_of_the_executor(benchmarks: Any, tmp_path: Path, order: list[str]) -> None:
    host = host_with(tmp_path, [f"{name}()" for name in order])
    assert benchmarks.host_versions.end_of_node(host) == order


@pytest.mark.parametrize("calls", [[], [f"{BUFFERS}(device)"], ["await comfy.end()"]])
def test_an_end_that_cannot_be_repeated_is_an_error(benchmarks: Any, tmp_path: Path, calls: list[str]) -> None:
    host = host_with(tmp_path, calls)
    if not calls:
        (host / "execution.py").write_text("async def execute(): pass\n", "utf-8")
    with pytest.raises(RuntimeError, match=r"ends? a node"):
        benchmarks.host_versions.end_of_node(host)


def test_everything_that_this_host_ends_a_node_with_is_there(benchmarks: Any) -> None:
    assert set(benchmarks.host_versions.end_of_node(HOST)) == {BUFFERS, QUEUES, WATERMARKS}
    calls = benchmarks.comfy_host._calls_at_end_of_node()
    assert len(calls) == 3
    assert all(map(callable, calls))


def test_a_host_without_an_option_says_so(benchmarks: Any, tmp_path: Path) -> None:
    lacking = benchmarks.host_versions.lacking_option
    assert lacking(HOST, "--fast-disk") is None
    older = host_with(tmp_path, [], 'parser.add_argument("--fast-disk", action="store_true")')
    assert lacking(older, "--fast-disk") is None
    assert lacking(older, "--disable-fast-disk") == "ComfyUI 0.99.0 has no --disable-fast-disk"


def flags(benchmarks: Any, case: str, contender: str) -> list[str]:
    job = benchmarks.job.Job(benchmarks.cases.CASES[case], contender, Path(), Path(), 1, 10 * 1024**3)
    return benchmarks.contenders.comfy_flags(job)


def test_the_fast_disk_is_forced_beside_what_a_contender_has_anyway(benchmarks: Any) -> None:
    for name, forced in benchmarks.cases.FAST_DISK.items():
        for case in ("flux-1024-8gb", "flux-1024-streamed"):
            assert flags(benchmarks, case, name) == [*flags(benchmarks, case, forced.base), forced.option]
    assert flags(benchmarks, "flux-1024-streamed", "comfy-fast-disk") == ["--vram-headroom", "7.00", "--fast-disk"]


def test_the_readme_has_the_table_of_the_committed_results(benchmarks: Any, tmp_path: Path) -> None:
    copy = tmp_path / "README.md"
    copy.write_text((FOLDER / "README.md").read_text("utf-8"), "utf-8")
    benchmarks.report.update_readme(copy, FOLDER / "results")
    assert copy.read_text("utf-8") == (FOLDER / "README.md").read_text("utf-8")


def test_the_packs_readme_has_the_gains_of_the_committed_results(benchmarks: Any, tmp_path: Path) -> None:
    readme = FOLDER.parent / "README.md"
    copy = tmp_path / "README.md"
    copy.write_text(readme.read_text("utf-8"), "utf-8")
    benchmarks.report.update_front_page(copy, FOLDER / "results")
    assert copy.read_text("utf-8") == readme.read_text("utf-8"), "run: python benchmarks/report.py"


def test_no_row_of_the_packs_readme_took_more_than_its_text_says_of_the_floor(benchmarks: Any) -> None:
    results = {result["case"]: result for result in benchmarks.report.read_results(FOLDER / "results")}
    most = max(results[case]["ratio_to_floor"] for _, case in benchmarks.report.FRONT_ROWS)
    assert f"at most {100 * (most - 1):.0f} % more" in (FOLDER.parent / "README.md").read_text("utf-8")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the checkpoints, which the first script writes."""
    return tmp_path_factory.mktemp("work")


def run_script(name: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / name), *arguments, "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def versions_are_named(versions: dict[str, Any], host_versions: ModuleType) -> None:
    assert versions["comfyui"] == host_versions.version(HOST)
    assert set(host_versions.PACKAGES) <= set(versions)


@on_linux
def test_loading_is_measured(benchmarks: Any, tmp_path: Path, work: Path) -> None:
    run_script("loading.py", tmp_path, "cached", "4-steps", "--tiny", "--work", str(work))
    rows = json.loads((tmp_path / "loading.json").read_text("utf-8"))["rows"]
    row, short = rows["cached"], rows["4-steps"]
    assert row.get("first_step_s"), row
    assert row["status"]["streamed_block_bytes"] > 0
    versions_are_named(row["versions"], benchmarks.host_versions)
    assert short.get("prompts"), short
    assert [len(prompt["steps_s"]) for prompt in short["prompts"]] == [4, 4]
    for prompt in short["prompts"]:
        assert 0 < sum(prompt["steps_s"]) <= prompt["seconds"]
    assert 0 < short["loader_s"] < short["prompts"][0]["steps_s"][0]


@on_linux
def test_loras_are_measured(benchmarks: Any, tmp_path: Path, work: Path) -> None:
    run_script("lora.py", tmp_path, "weightstream", "--tiny", "--work", str(work))
    row = json.loads((tmp_path / "lora.json").read_text("utf-8"))["rows"]["weightstream"]
    latents = {name: prompt["latent_sha256"] for name, prompt in row.get("prompts", {}).items()}
    assert latents, row
    assert latents["before"] == latents["off"] != latents["LoRA 0.8"] == latents["again"]
    versions_are_named(row["versions"], benchmarks.host_versions)


@on_linux
def test_many_prompts_are_measured(benchmarks: Any, tmp_path: Path, work: Path) -> None:
    arguments = ("8gb", "--tiny", "--prompts", "3", "--steps", "3", "--work", str(work))
    run_script("steady.py", tmp_path, *arguments)
    row = json.loads((tmp_path / "steady.json").read_text("utf-8"))["rows"]["8gb"]
    assert row.get("prompts"), row
    assert (row["reruns"], row["plan_changes"], row["latents_equal"]) == (0, 0, True)
    assert row["first_plan_changes"] > 0
    assert [prompt["tidied"] for prompt in row["prompts"]] == [True, False, False]
    assert row["prompts"][0]["calls"]["comfy.model_management.soft_empty_cache"] == 1
    for prompt in row["prompts"]:
        columns = ("steps_s", "reruns", "free_bytes", "resident_bytes", "segments", "plan_changes")
        assert [len(prompt[name]) for name in columns] == [3] * len(columns)
    versions_are_named(row["versions"], benchmarks.host_versions)


@on_linux
def test_the_host_is_measured(benchmarks: Any, tmp_path: Path, work: Path) -> None:
    run_script("host_time.py", tmp_path, "streamed", "--tiny", "--steps", "3", "--work", str(work))
    row = json.loads((tmp_path / "host-time.json").read_text("utf-8"))["rows"]["streamed"]
    assert row.get("cpu_steps_s"), row
    assert row["cpu_s"] > 0
    assert row["streamed_bytes"] > 0
    assert row["calls"] == {}, "no GPU, no calls"
    versions_are_named(row["versions"], benchmarks.host_versions)


@on_linux
def test_watching_is_measured(
    benchmarks: Any, two_gpus: HeadlessHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a server that other tests use too, which is as the script asks for."""
    done = subprocess.run([sys.executable, str(FOLDER / "watching.py"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(benchmarks.watching, "HeadlessHost", Running(two_gpus))
    monkeypatch.setattr(demo, "find_machine", lambda: demo.Machine(None, torch.__version__))
    arguments = ("--pairs", "1", "--steps", "2", "--idle", "0.1", "--out", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["watching.py", *arguments])
    benchmarks.watching.main()
    result = json.loads((tmp_path / "watching.json").read_text("utf-8"))
    assert len(result["ratios"]) == 1
    assert result["events"] > 0
    versions_are_named(result["versions"], benchmarks.host_versions)
