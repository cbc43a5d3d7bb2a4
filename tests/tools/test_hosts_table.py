"""docs/hosts.md and the tests of the host's contracts are together."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "hosts.md"
CONTRACTS = sorted((ROOT / "tests" / "nodes" / "contracts").glob("test_*.py"))


def rows() -> list[list[str]]:
    """The cells of each row that names a test."""
    lines = TABLE.read_text("utf-8").split("## Contracts")[1].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "`test_" in line]


def named(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_each_contract_has_a_test_and_each_test_a_row() -> None:
    tests = [
        function.name
        for path in CONTRACTS
        for function in ast.parse(path.read_text("utf-8")).body
        if isinstance(function, ast.FunctionDef) and function.name.startswith("test_")
    ]
    told = [test for row in rows() for test in named(row[2])]
    assert sorted(told) == sorted(tests)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_a_row_says_what_where_and_since_when(row: list[str]) -> None:
    contract, where, tests, since = row
    assert contract
    assert named(tests)
    assert named(where)
    for path in named(where):
        assert (ROOT / path).is_file(), path
    assert all(re.fullmatch(r"0\.\d+", version) for version in re.findall(r"\d[\d.]*\d", since))
