"""A machine with a GPU may be gone before all tests have ended: each tells at once what it found, the longest last."""

from __future__ import annotations

from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent
LONGEST = "test_programs_on_gpus.py"


def is_here(report: pytest.TestReport, config: pytest.Config) -> bool:
    """Whether the test is of this folder."""
    return (config.rootpath / report.nodeid.partition("::")[0]).resolve().parent == FOLDER


def pytest_report_teststatus(report: pytest.TestReport, config: pytest.Config) -> tuple[str, str, str] | None:
    if report.when == "call" and report.outcome == "passed" and is_here(report, config):
        # A program may have ended long before somebody asks what it has found.
        seconds = dict(report.user_properties).get("seconds", report.duration)
        return "passed", ".", f"PASSED in {seconds:.1f} s"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name == LONGEST)


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
