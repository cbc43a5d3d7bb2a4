#!/usr/bin/env python3
"""Plants small faults in a copy of the pack, one after another, and runs the tests that ought to notice each.

    python3 dev.py mutants                       all of them
    python3 dev.py mutants streaming/run/lane.py     those in a file
    python3 dev.py mutants "resident is read"    those whose file or name contains any of these texts
    python3 dev.py mutants --list

mutants.txt says what is planted. A mutant that lives is a test that is missing: whoever changes waits, marks, orders or
page-locking asks here whether the tests would still notice. Leaves with 1 if any lives.
"""

from __future__ import annotations

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path
from typing import NamedTuple

if __package__:
    from .mutant_table import MUTANTS, Mutant
else:
    from mutant_table import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parent.parent
LEFT_BEHIND = shutil.ignore_patterns(".git", "__pycache__", ".*_cache", ".venv", "venv", "node_modules")
# Many times what tests of a mutant take: whoever waits for ever is noticed too.
MUTANT_SECONDS = 300


class Outcome(Enum):
    """What became of a mutant."""

    DIED = "died"  # A test has failed.
    LIVES = "lives"  # None has.
    BROKEN = "broken"  # Tests could not run at all: nothing was tried.


class Result(NamedTuple):
    """What tests said of a copy of the pack.

    Attributes:
        told: the first test that failed, or the end of what was printed.
    """

    outcome: Outcome
    seconds: float
    told: str


class Copy:
    """A copy of the pack, in which one mutant at a time is planted."""

    def __init__(self, folder: Path, source: Path = ROOT) -> None:
        self.root = folder / source.name
        shutil.copytree(source, self.root, ignore=LEFT_BEHIND)

    def try_out(self, mutant: Mutant) -> Result:
        """Run the mutant's tests on it; the copy is as it was afterwards."""
        path = self.root / mutant.file
        before = path.read_bytes()
        try:
            path.write_bytes(mutant.applied_to(before.decode()).encode())
            return self.test(mutant.tests)
        finally:
            path.write_bytes(before)

    def test(self, tests: Sequence[str]) -> Result:
        """Run tests until one fails."""
        command = [sys.executable, str(self.root / "dev.py"), "test", "-x", "-q", "-p", "no:cacheprovider", *tests]
        # Byte code is told from the time and the size of its source, and mutants may share both.
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "WEIGHTSTREAM_PYTHON": sys.executable}
        began = time.monotonic()
        process = subprocess.Popen(
            command, cwd=self.root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            printed, _ = process.communicate(timeout=MUTANT_SECONDS)
        except subprocess.TimeoutExpired:
            process.terminate()  # dev.py takes its tests along.
            process.communicate()
            return Result(Outcome.DIED, time.monotonic() - began, f"no end after {MUTANT_SECONDS} s")
        seconds = time.monotonic() - began
        return Result(_outcome(process.returncode, printed), seconds, _told(printed))


def _outcome(code: int, printed: str) -> Outcome:
    if code == 0:
        return Outcome.LIVES
    hung = "Timeout (" in printed  # Of the fixture that watches threads.
    return Outcome.DIED if code == 1 and ("\nFAILED " in printed or "\nERROR " in printed or hung) else Outcome.BROKEN


def _told(printed: str) -> str:
    lines = printed.strip().splitlines() or [""]
    failed = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return (failed or lines[-1:])[0]


def chosen(words: Sequence[str]) -> list[Mutant]:
    """The mutants whose file or name has any of ``words``; all without words."""
    return [each for each in MUTANTS if not words or any(word in f"{each.file} {each.name}" for word in words)]


def try_all(mutants: Sequence[Mutant], jobs: int) -> dict[Mutant, Result]:
    """Plant each in one of ``jobs`` copies, and say what becomes of it."""
    results: dict[Mutant, Result] = {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies: queue.SimpleQueue[Copy] = queue.SimpleQueue()
        for number in range(jobs):
            copies.put(Copy(Path(folder) / str(number)))

        def try_one(mutant: Mutant) -> None:
            copy = copies.get()
            try:
                result = results[mutant] = copy.try_out(mutant)
            finally:
                copies.put(copy)
            say(f"{result.outcome.value:6} {result.seconds:5.1f} s  {mutant.file}: {mutant.name}  [{result.told}]")

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(try_one, mutants))
    return results


def all_pass(mutants: Sequence[Mutant]) -> bool:
    """Whether the tests of ``mutants`` pass without any: else that they fail says nothing."""
    tests = list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        result = Copy(Path(folder)).test(tests)
    if result.outcome is not Outcome.LIVES:
        say(f"the tests fail without a mutant: {result.told}")
    return result.outcome is Outcome.LIVES


def say(text: str) -> None:
    print(text, flush=True)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="dev.py mutants", description="Do the tests notice faults on the hot path?")
    parser.add_argument("words", nargs="*", metavar="WORDS", help="of a file's or a mutant's name; all by default")
    parser.add_argument("--list", action="store_true", help="show what would be planted, and run nothing")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="copies that are tried at once (default: 1)")
    parser.add_argument("--trust", action="store_true", help="do not run the tests without a mutant first")
    options = parser.parse_args(argv)
    mutants = chosen(options.words)
    if options.list:
        for mutant in mutants:
            say(f"{mutant.file}: {mutant.name}")
        return 0
    if not mutants:
        say(f"no mutant has {' or '.join(options.words)} in its name")
        return 2
    if not (options.trust or all_pass(mutants)):
        return 2
    results = try_all(mutants, options.jobs)
    left = {mutant: result for mutant, result in results.items() if result.outcome is not Outcome.DIED}
    say(f"{len(results) - len(left)} of {len(results)} mutants died")
    for mutant, result in left.items():
        say(f"  {result.outcome.value}: {mutant.file}: {mutant.name}")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
