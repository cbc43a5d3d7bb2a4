"""Pure: how tests/gpu ended, from what pytest has said so far."""

from __future__ import annotations

import re
from dataclasses import dataclass

LOG = "tests.log"
OPTIONS = ("-v", "-rfE", "--tb=short", "--color=no", "-p", "no:cacheprovider")


@dataclass
class Tests:
    """How tests/gpu ended.

    Attributes:
        ended: outcomes by test.
        begun: the test that had begun when they were stopped, or nothing.
        told: what is told of those that failed.
        status: pytest's; None where it was stopped.
    """

    ended: dict[str, str]
    begun: str
    told: dict[str, str]
    status: int | None
    seconds: float

    @property
    def failed(self) -> bool:
        return self.status != 0

    def count(self, *outcomes: str) -> int:
        return sum(outcome in outcomes for outcome in self.ended.values())

    def __str__(self) -> str:
        counts = (
            f"{self.count('PASSED')} passed, {self.count('FAILED', 'ERROR')} failed, {self.count('SKIPPED')} skipped"
        )
        lines = [f"tests/gpu: {counts} in {self.seconds:.0f} s"]
        if self.status is None:
            lines.append(f"  stopped in {self.begun or 'between two tests'}")
        elif self.failed and not self.count("FAILED", "ERROR"):
            lines.append(f"  pytest ended with {self.status}; see {LOG}")
        for test in self.ended:
            if self.ended[test] in ("FAILED", "ERROR"):
                lines.append(f"  {self.ended[test]} {test} {self.told.get(test, '')}".rstrip())
        return "\n".join(lines)


def read(log: str, status: int | None, seconds: float) -> Tests:
    """What pytest with ``OPTIONS`` has said so far."""
    ended, told, begun = {}, {}, ""
    for line in log.splitlines():
        if found := re.match(r"(FAILED|ERROR) (\S+::.*?)(?: - (.*))?$", line):
            told[found[2]] = found[3] or ""
        elif found := re.match(r"(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", line):
            ended[found[1]], begun = found[2], ""
        elif re.match(r"\S+\.py::\S", line):
            begun = line.strip()
    return Tests(ended, begun, told, status, seconds)
