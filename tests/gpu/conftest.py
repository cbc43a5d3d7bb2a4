"""What a test has found is told as soon as it has ended: a machine with a GPU may be gone before all of them have."""

from __future__ import annotations

import pytest


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    if report.when == "call" and report.outcome == "passed":
        return "passed", ".", f"PASSED in {report.duration:.1f} s"
    return None


class TellsFailures:
    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and reporter is not None:  # One of several processes has none.
            reporter.write_line("")
            reporter.write_line(report.longreprtext)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(TellsFailures(config))
