"""tools/mutants.py plants what its table says, and tells what tests notice from what they do not."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tools.mutant_table import MUTANTS, Mutant
from tools.mutants import Copy, Outcome, _outcome

ROOT = Path(__file__).resolve().parents[2]


def test_every_mutant_is_one_of_the_code_as_it_is() -> None:
    """Who changes a line changes its mutants with it."""
    sources = {mutant.file: (ROOT / mutant.file).read_text("utf-8") for mutant in MUTANTS}
    meant = {file: ast.dump(ast.parse(source)) for file, source in sources.items()}
    for mutant in MUTANTS:
        after = ast.dump(ast.parse(mutant.applied_to(sources[mutant.file])))
        assert after != meant[mutant.file], f"{mutant.file}: {mutant.name} makes no difference"
        assert all((ROOT / test).is_file() for test in mutant.tests), mutant
    assert [name for name, count in Counter(mutant[:2] for mutant in MUTANTS).items() if count > 1] == []


def test_a_mutant_is_planted_and_dies() -> None:
    command = [sys.executable, str(ROOT / "dev.py"), "mutants", "--trust", "the ring's memory is taken without a mark"]
    environment = {**os.environ, "WEIGHTSTREAM_PYTHON": sys.executable, "PYTEST_ADDOPTS": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.stdout.endswith("1 of 1 mutants died\n"), result.stdout + result.stderr
    assert result.returncode == 0


def test_what_no_test_notices_lives_and_leaves_no_trace(tmp_path: Path) -> None:
    copy, file = Copy(tmp_path), "streaming/run/ring.py"
    before = (copy.root / file).read_bytes()
    line = "        self.slots.clear()"
    mutant = Mutant(file, "untested", (line,), (line, line), ("tests/streaming/test_config.py",))
    result = copy.try_out(mutant)
    assert result.outcome is Outcome.LIVES, result.told
    assert (copy.root / file).read_bytes() == before


def test_tests_that_cannot_run_say_nothing_of_a_mutant() -> None:
    assert _outcome(1, "\nFAILED tests/test_a.py::test_b\n") is Outcome.DIED
    assert _outcome(1, "Timeout (0:01:00)!\nThread 0x1") is Outcome.DIED
    assert _outcome(2, "dev.py: no ComfyUI\n") is Outcome.BROKEN
    assert _outcome(2, "\nERROR tests/test_a.py - NameError\n") is Outcome.BROKEN
    assert _outcome(1, "Traceback (most recent call last):") is Outcome.BROKEN
