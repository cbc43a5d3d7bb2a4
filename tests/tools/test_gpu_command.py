"""``dev.py gpu``: what it makes of a test log and of results, and the whole of it in its smallest form."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("host_versions", "cases", "comfy_host", "contenders", "report", "run", "gpu_tests", "comparison", "gpu")
CASE = "flux-1024-8gb"
HOST = Path(os.environ["COMFYUI_PATH"])


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The scripts' modules, which find each other in their folder."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    for name in MODULES:
        del sys.modules[name]


LOG = """\
============================= test session starts ==============================
collecting ... collected 5 items

tests/gpu/test_a.py::test_one PASSED [ 20%]
tests/gpu/test_a.py::test_many[static-host] FAILED [ 40%]
tests/gpu/test_a.py::test_many[a b] SKIPPED (needs 2 CUDA GPUs) [ 60%]
tests/gpu/test_a.py::test_torn_down PASSED [ 80%]
tests/gpu/test_a.py::test_torn_down ERROR [ 80%]
seconds of static: host 9.1
"""
SUMMARY = """\
=========================== short test summary info ============================
FAILED tests/gpu/test_a.py::test_many[static-host] - AssertionError: one case; another
ERROR tests/gpu/test_a.py::test_torn_down - OSError
"""


def test_a_log_tells_how_tests_ended(benchmarks: SimpleNamespace) -> None:
    tests = benchmarks.gpu_tests.read(LOG + SUMMARY, 1, 12.3)
    assert tests.failed
    assert str(tests).splitlines() == [
        "tests/gpu: 1 passed, 2 failed, 1 skipped in 12 s",
        "  FAILED tests/gpu/test_a.py::test_many[static-host] AssertionError: one case; another",
        "  ERROR tests/gpu/test_a.py::test_torn_down OSError",
    ]


def test_a_log_that_breaks_off_tells_what_ran(benchmarks: SimpleNamespace) -> None:
    tests = benchmarks.gpu_tests.read(LOG + "tests/gpu/test_b.py::test_that_hangs ", None, 60)
    assert tests.failed
    assert "  stopped in tests/gpu/test_b.py::test_that_hangs" in str(tests).splitlines()
    assert "  FAILED tests/gpu/test_a.py::test_many[static-host]" in str(tests).splitlines()


def test_a_test_that_failed_has_said_why_before_the_next_begins(benchmarks: SimpleNamespace, tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests" / "gpu" / "conftest.py", tmp_path)
    program = "def test_one(): pass\ndef test_two(): assert 3 == 4\ndef test_three(): import os; os._exit(3)"
    (tmp_path / "test_small.py").write_text(program, "utf-8")
    command = [sys.executable, "-m", "pytest", *benchmarks.gpu_tests.OPTIONS, "-c", os.devnull, "test_small.py"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "assert 3 == 4" in ended.stdout, ended.stdout + ended.stderr
    tests = benchmarks.gpu_tests.read(ended.stdout, None, 1.0)
    assert list(tests.ended.values()) == ["PASSED", "FAILED"]
    assert tests.begun == "test_small.py::test_three"
    assert re.search(r"test_one PASSED in \d+\.\d s", ended.stdout)


def test_tests_that_cannot_be_collected_have_failed(benchmarks: SimpleNamespace) -> None:
    tests = benchmarks.gpu_tests.read("ERROR tests/gpu/test_a.py\n", 2, 1)
    assert tests.failed
    assert "pytest ended with 2" in str(tests)


def result(**run: Any) -> dict[str, Any]:
    figures = {"step_s": 0.3, "ratio_to_floor": 1.0, "ratio_to_comfy_dynamic": 0.8, "identical_to_resident": True}
    runs = {"weightstream": figures | {"plan_constant": True} | run, "comfy-dynamic": {"step_s": 0.4}}
    return {"case": CASE, "tiny": False, "machine": {}, "limits": {}, "runs": runs}


@pytest.mark.parametrize(
    ("new", "committed", "status", "cells"),
    [
        ({}, {}, 0, ["1.000", "+0.0%", "0.800", "+0.0%", "identical", "constant"]),
        ({"ratio_to_floor": 1.029}, {}, 0, ["1.029", "+2.9%", "0.800", "+0.0%", "identical", "constant"]),
        ({"ratio_to_floor": 1.04}, {}, 8, ["1.040", "+4.0% WORSE", "0.800", "+0.0%", "identical", "constant"]),
        ({"ratio_to_comfy_dynamic": 0.7}, {}, 0, ["1.000", "+0.0%", "0.700", "-12.5% better", "identical", "constant"]),
        ({"identical_to_resident": False}, {}, 4, ["1.000", "+0.0%", "0.800", "+0.0%", "DIFFERS", "constant"]),
        (
            {"identical_to_resident": False, "ratio_to_floor": 1.1, "plan_constant": False},
            {"identical_to_resident": False},
            8,
            ["1.100", "+10.0% WORSE", "0.800", "+0.0%", "differs", "CHANGED"],
        ),
        ({"ratio_to_floor": None}, {}, 0, ["", "", "0.800", "+0.0%", "identical", "constant"]),
    ],
)
def test_a_result_is_compared_by_its_ratios(
    benchmarks: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    new: dict[str, Any],
    committed: dict[str, Any],
    status: int,
    cells: list[str],
) -> None:
    monkeypatch.setattr(benchmarks.gpu, "RESULTS", tmp_path / "committed")
    benchmarks.report.write_json(tmp_path / "committed" / f"{CASE}.json", result(**committed))
    benchmarks.report.write_json(tmp_path / f"{CASE}.json", result(**new))
    report = benchmarks.gpu.Report(tmp_path)
    (row,) = report.rows()
    assert row.cells() == [CASE, "weightstream", "0.300", *cells]
    assert report.status() == status


def test_a_contender_that_failed_and_one_that_is_new(
    benchmarks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(benchmarks.gpu, "RESULTS", tmp_path / "committed")
    failing = result()
    failing["runs"]["comfy-static"] = {"error": ["stopped after 150 s", "a line", "the last line"]}
    benchmarks.report.write_json(tmp_path / f"{CASE}.json", failing)
    report = benchmarks.gpu.Report(tmp_path)
    report.write()
    text = (tmp_path / "table.txt").read_text("utf-8")
    assert "FAILED: stopped after 150 s; the last line" in text
    assert "identical  constant" in text
    assert report.status() == 16
    benchmarks.report.write_json(tmp_path / f"{CASE}.json", result())
    assert report.status() == 0
    report.unmeasured[CASE] = "no room"
    assert report.status() == 16
    assert report.text().endswith(f"could not measure {CASE}: no room")


def test_cases_come_in_the_order_of_their_worth_where_there_are_gpus_for_them(benchmarks: SimpleNamespace) -> None:
    args = SimpleNamespace(cases=None, tiny=False)
    for gpus in (1, 2):
        chosen = [case.name for case in benchmarks.gpu.chosen_cases(args, gpus)]
        assert set(chosen) == {name for name, case in benchmarks.cases.CASES.items() if case.gpus <= gpus}
        assert len(chosen) == len(set(chosen))
        assert chosen[0] == CASE
    assert set(benchmarks.gpu.ORDER) <= set(benchmarks.cases.CASES)


def test_what_a_case_takes_is_known_from_the_committed_result(benchmarks: SimpleNamespace, tmp_path: Path) -> None:
    """Limits that a result in the folder has are not measured again."""
    case, gpu = benchmarks.cases.CASES[CASE], benchmarks.gpu
    args = SimpleNamespace(out=tmp_path, work=tmp_path, tiny=False, steps=None, contenders=None)
    committed = gpu.read_result(gpu.RESULTS, CASE)
    walls = {name: run["wall_s"] + gpu.BETWEEN_S for name, run in (committed["limits"] | committed["runs"]).items()}
    all_of_them = sum(walls[name] for name in gpu.CONTENDERS)
    assert gpu.expected_seconds(args, case) == pytest.approx(all_of_them + gpu.CHECKPOINT_S)
    (tmp_path / case.model.filename).touch()
    assert gpu.expected_seconds(args, case) == pytest.approx(all_of_them)
    measured = committed | {"machine": benchmarks.run.describe_machine(), "case": "flux-1024-6gb"}
    benchmarks.report.write_json(tmp_path / "flux-1024-6gb.json", measured)
    assert gpu.expected_seconds(args, case) == pytest.approx(walls["weightstream"] + walls["comfy-dynamic"])
    args.steps = 5
    assert gpu.expected_seconds(args, case) == pytest.approx(all_of_them - walls["h2d"])
    benchmarks.report.write_json(tmp_path / "flux-1024-6gb.json", measured | {"machine": {"GPU": "another"}})
    assert gpu.expected_seconds(args, case) == pytest.approx(all_of_them)


def test_what_a_command_has_started_is_stopped_with_it(benchmarks: SimpleNamespace, tmp_path: Path) -> None:
    program = (
        "import pathlib, subprocess, sys, time\n"
        "sleeper = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "pathlib.Path(sys.argv[1]).write_text(str(sleeper.pid))\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "pid")]
    assert benchmarks.gpu.run_command(command, os.environ, 2) is None
    pid, give_up = int((tmp_path / "pid").read_text()), time.monotonic() + 10
    while is_running(pid) and time.monotonic() < give_up:
        time.sleep(0.05)
    assert not is_running(pid)
    assert benchmarks.gpu.run_command([sys.executable, "-c", "raise SystemExit(3)"], os.environ, 30) == 3


def is_running(pid: int) -> bool:
    """Whoever has ended counts as ended, also where nobody has asked how."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(ROOT / "dev.py"), "gpu", "--tiny", "--out", str(folder), "--work", str(folder)]
    environment = {**os.environ, "WEIGHTSTREAM_PYTHON": sys.executable, "PYTEST_ADDOPTS": ""}
    return subprocess.run([*words, *arguments], capture_output=True, text=True, timeout=240, env=environment)


@pytest.mark.skipif(sys.platform != "linux", reason="the benchmarks measure on Linux alone")
def test_tests_and_steps_in_small(benchmarks: SimpleNamespace, tmp_path: Path) -> None:
    """Contenders of ours, one with an option that is forced; test_benchmarks.py has it without."""
    contenders = ("resident", "h2d", "weightstream-fast-disk", "comfy-no-fast-disk", "weightstream-unpacked")
    done = command(tmp_path, "--steps", "2", "--contenders", ",".join(contenders))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests/gpu: 0 passed, 0 failed" in done.stdout
    assert "tests/gpu/test_vram_on_gpu.py::test_reading_makes_no_context SKIPPED" in (
        (tmp_path / "tests.log").read_text("utf-8")
    )
    found = json.loads((tmp_path / f"{CASE}.json").read_text("utf-8"))
    assert found["versions"]["comfyui"] == benchmarks.host_versions.version(HOST)
    assert set(benchmarks.host_versions.PACKAGES) <= set(found["versions"])
    assert set(found["limits"]) == {"resident", "h2d"}
    reason = benchmarks.host_versions.lacking_option(HOST, "--disable-fast-disk")
    assert found["not_offered"] == ({"comfy-no-fast-disk": reason} if reason else {})
    assert {*found["runs"], *found["not_offered"]} == set(contenders[2:])
    if reason:
        assert f"comfy-no-fast-disk is not offered: {reason}" in done.stdout
    for name, run in found["runs"].items():
        assert run.get("identical_to_resident"), (name, run)
        assert run["page_cache_share"]["start"] == 1.0
    table = (tmp_path / "table.txt").read_text("utf-8")
    assert done.stdout.endswith(table)
    ours = [name for name in contenders if name.startswith("weightstream")]
    assert [line.split()[1] for line in table.splitlines() if line.startswith(CASE)] == ours
    # What is there stays, and what cannot end is not begun.
    arguments = ("--only", "cases", "--cases", f"{CASE},flux-1024-16gb", "--contenders", contenders[2])
    again = command(tmp_path, "--go-on", "--minutes", "0.2", *arguments)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "left out: flux-1024-16gb, which takes about" in again.stdout
    assert json.loads((tmp_path / f"{CASE}.json").read_text("utf-8")) == found
