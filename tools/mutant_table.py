"""Reads mutants.txt: the faults that mutants.py plants."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("mutants.txt")
ROOT = TABLE.parents[1]
# Tests by their names: those of the engine, wherever they lie, and of work in parallel.
TESTS = {
    path.stem: path.relative_to(ROOT).as_posix()
    for room in ("nodes/parallel", "streaming")
    for path in (ROOT / "tests" / room).rglob("test_*.py")
}


class Mutant(NamedTuple):
    """A fault.

    Attributes:
        file: below the pack's root.
        name: what is wrong, in words.
        old, new: whole lines, and what stands there instead; without old ones the new come behind all that is there.
        tests: which ought to notice; the quickest first.
    """

    file: str
    name: str
    old: tuple[str, ...]
    new: tuple[str, ...]
    tests: tuple[str, ...]

    def applied_to(self, text: str) -> str:
        """The file's ``text`` with the fault in it.

        Raises:
            ValueError: what it replaces is not there, or not once.
        """
        lines, count = text.splitlines(), len(self.old)
        if not count:
            return "\n".join([*lines, *self.new, ""])
        found = [start for start in range(len(lines)) if tuple(lines[start : start + count]) == self.old]
        if len(found) != 1:
            raise ValueError(f"{self.file}: {self.name}: its lines are there {len(found)} times, not once")
        return "\n".join([*lines[: found[0]], *self.new, *lines[found[0] + count :], ""])


def read_mutants(text: str) -> Iterator[Mutant]:
    """The mutants of a table: lines "file:" and "tests:" hold for those behind them."""
    heads: dict[str, str] = {}
    difference: list[str] = []
    for line in [*text.splitlines(), "mutant: the end"]:
        key, colon, value = line.partition(": ")
        if colon and key in ("file", "tests", "mutant"):
            if difference:
                yield _mutant(heads, difference)
            difference = []
            heads[key] = value
        elif line[:1] in ("-", "+", " "):
            difference.append(line)


def _mutant(heads: dict[str, str], difference: Iterable[str]) -> Mutant:
    lines = [(line[0], line[1:]) for line in difference]
    old = tuple(line for kind, line in lines if kind != "+")
    new = tuple(line for kind, line in lines if kind != "-")
    tests = tuple(TESTS[test] for test in heads["tests"].split())
    return Mutant(heads["file"], heads["mutant"], old, new, tests)


MUTANTS = tuple(read_mutants(TABLE.read_text("utf-8")))
