"""Pure: what a case's new result says, beside the committed one, as rows of a table for people.

Seconds differ from machine to machine, and ratios within one run do not, so only these are compared: to the floor, and
to ComfyUI's own loader with dynamic VRAM.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

# Of a ratio. What repeats on one machine stays within 1 or 2 % of it.
TOLERANCE = 0.03
OURS = "weightstream"
RATIOS = ("ratio_to_floor", "ratio_to_comfy_dynamic")
COLUMNS = ("case", "who", "step, s", "to floor", "committed", "to native", "committed", "latent", "plan")


@dataclass(frozen=True)
class Row:
    """One contender.

    Attributes:
        run: what was measured.
        committed: the same of the committed result; empty where there is none.
    """

    case: str
    who: str
    run: dict[str, Any]
    committed: dict[str, Any]

    @property
    def failed(self) -> bool:
        return "error" in self.run

    @property
    def differs(self) -> bool:
        """The latent is not that of everything resident, and the committed one does not say that it never is."""
        return self.run.get("identical_to_resident") is False and self.committed.get("identical_to_resident", True)

    @property
    def worse(self) -> bool:
        return any((change := self.change(ratio)) is not None and change > TOLERANCE for ratio in RATIOS)

    def change(self, ratio: str) -> float | None:
        """By what part of it ``ratio`` has grown since the committed result; None where either lacks it."""
        if self.run.get(ratio) is None or self.committed.get(ratio) is None:
            return None
        return self.run[ratio] / self.committed[ratio] - 1

    def cells(self) -> list[str]:
        """What is in the ``COLUMNS``; what calls for somebody's eyes is in capitals."""
        if self.failed:
            error = self.run["error"]
            return [self.case, self.who, f"FAILED: {'; '.join(dict.fromkeys((error[0], error[-1])))}"]
        cells = [self.case, self.who, f"{self.run['step_s']:.3f}"]
        for ratio in RATIOS:
            cells += [number(self.run.get(ratio)), told(self.change(ratio))]
        latent, plan = self.run.get("identical_to_resident"), self.run.get("plan_constant")
        cells.append({True: "identical", False: "DIFFERS" if self.differs else "differs"}.get(latent, ""))
        return [*cells, {True: "constant", False: "CHANGED"}.get(plan, "")]


def rows_of(result: dict[str, Any], committed: dict[str, Any]) -> list[Row]:
    """Ours, and all who failed: of a case's result file, and of the committed one, or nothing."""
    before = committed.get("runs", {})
    return [
        Row(result["case"], who, run, before.get(who, {}))
        for who, run in (result["limits"] | result["runs"]).items()
        if who.startswith(OURS) or "error" in run
    ]


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def told(change: float | None) -> str:
    if change is None:
        return ""
    word = "" if abs(change) <= TOLERANCE else " WORSE" if change > 0 else " better"
    return f"{change:+.1%}{word}"


def table(rows: Iterable[Row]) -> str:
    return aligned([list(COLUMNS), *(row.cells() for row in rows)])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns as wide as the widest cell that has one behind it."""
    widths = [
        max((len(line[column]) for line in lines if len(line) > column + 1), default=0)
        for column in range(len(lines[0]))
    ]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
