"""A machine with a GPU may be gone before all tests have ended: each tells at once what it found.

Tests that look at times or at memory that is free come first, with the GPU to themselves. Those that mind nobody are
marked ``beside``: while they run, all programs do (program_runs.py), and the processes of tests marked ``child``. What
these have found comes last.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from program_runs import Findings

FOLDER = Path(__file__).resolve().parent
LONGEST = "test_programs_on_gpus.py"


def place(item: pytest.Item) -> int:
    """Tests of a lower place run before those of a higher one."""
    if item.path.name == LONGEST:
        return 3
    if item.get_closest_marker("child"):
        return 2
    return 1 if item.get_closest_marker("beside") else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=place)


@pytest.fixture(autouse=True)
def _programs_run_meanwhile(request: pytest.FixtureRequest) -> None:
    """Each of several workers has the tests of some files, and begins what these are about."""
    if place(request.node) and not hasattr(request.config, "workerinput"):
        request.getfixturevalue("found")
        request.getfixturevalue("children")


@pytest.fixture(scope="session")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Findings]:
    """What programs find that tests of this session are about: all run from now on, several hosts at once."""
    import torch
    from program_runs import RUNS, Findings

    calls = [item.callspec.params for item in request.session.items if item.path.name == LONGEST]
    gpus = torch.cuda.device_count()
    findings = Findings((call["run"], call["program"]) for call in calls if RUNS[call["run"]].gpus <= gpus)
    folders = {name: tmp_path_factory.mktemp(name) for name in findings.runs}
    torch.cuda.empty_cache()
    over = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(findings.find, folders, over)
        try:
            yield findings
        finally:
            over.set()  # Whatever still runs is wanted no more.


@pytest.fixture(scope="session")
def children(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """By test, the process that it is about. All begin at once: each takes many seconds to import torch."""
    with ThreadPoolExecutor() as pool:
        yield {
            item.nodeid: pool.submit(run_python, *marker.args)
            for item in request.session.items
            if (marker := item.get_closest_marker("child"))
        }


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in the folder of this checkout, to its end."""
    return subprocess.run([sys.executable, *arguments], cwd=FOLDER.parents[1], capture_output=True, text=True)


@pytest.fixture
def child(
    request: pytest.FixtureRequest, children: dict[str, Future[subprocess.CompletedProcess[str]]]
) -> subprocess.CompletedProcess[str]:
    """The process of this test, which has ended."""
    return children[request.node.nodeid].result()


def is_here(report: pytest.TestReport, config: pytest.Config) -> bool:
    """Whether the test is of this folder."""
    return (config.rootpath / report.nodeid.partition("::")[0]).resolve().parent == FOLDER


def pytest_report_teststatus(report: pytest.TestReport, config: pytest.Config) -> tuple[str, str, str] | None:
    if report.when == "call" and report.outcome == "passed" and is_here(report, config):
        return "passed", ".", f"PASSED in {seconds(report)}"
    return None


def seconds(report: pytest.TestReport) -> str:
    """What a test took. A program may have ended long before somebody asks what it has found."""
    told = dict(report.user_properties)
    if "seconds" not in told:
        return f"{report.duration:.1f} s"
    parts = [f"{name} {took:.1f}" for name, took in (told["parts"] or {}).items()]
    behind = ", ".join([f"over {told['at']:.0f} s after the first began", *parts])
    return f"{told['seconds']:.1f} s ({behind})"


class TellsFailures:
    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        # One of several processes has no reporter.
        if report.failed and reporter is not None and is_here(report, self._config):
            reporter.write_line("")
            reporter.write_line(report.longreprtext)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(TellsFailures(config))
