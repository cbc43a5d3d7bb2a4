"""The queue on the disk: what was written is there after a kill, and there is one front for it."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from weightstream.fleet.errors import FleetError
from weightstream.fleet.store import MOST_HISTORY, Store

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "queue.sqlite"


def test_prompts_come_back_in_the_order_of_the_queue(path: Path) -> None:
    store = Store(path)
    for number, name in ((3.0, "c"), (-1.0, "front"), (2.0, "b"), (2.0, "b2")):
        store.add(name, number, [number, name, {"1": {"class_type": "X"}}])
    store.begin("b")
    store.close()
    again = Store(path)
    assert [(kept.id, kept.number, kept.attempts) for kept in again.prompts()] == [
        ("front", -1.0, 0),
        ("b", 2.0, 1),
        ("b2", 2.0, 0),
        ("c", 3.0, 0),
    ]
    assert again.prompts()[0].item == [-1.0, "front", {"1": {"class_type": "X"}}]


def test_a_result_takes_the_place_of_its_prompt(path: Path) -> None:
    store = Store(path)
    store.add("a", 1.0, ["a"])
    store.finish("a", {"outputs": {"9": {"images": []}}, "odd": object})
    assert store.prompts() == []
    assert store.history()["a"]["outputs"] == {"9": {"images": []}}
    store.forget("a")
    assert store.history() == {}


def test_the_history_ends_somewhere(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MOST_HISTORY == 10_000
    monkeypatch.setattr("weightstream.fleet.store.MOST_HISTORY", 3)
    store = Store(path)
    for number in range(5):
        store.finish(str(number), {})
    assert list(store.history()) == ["2", "3", "4"]
    store.forget_all()
    assert store.history() == {}


def test_what_is_put_back_counts_as_often_as_is_said(path: Path) -> None:
    store = Store(path)
    store.add("a", 0.0, [])
    store.begin("a")
    store.put_back("a", 0)
    store.begin("a")
    assert [kept.attempts for kept in store.prompts()] == [1]


def test_a_file_that_takes_nothing_is_an_error_of_the_fleet(path: Path) -> None:
    store = Store(path)
    store.add("a", 0.0, [])
    store.close()
    for refused in (lambda: store.add("b", 0.0, []), lambda: store.begin("a"), lambda: store.finish("a", {})):
        with pytest.raises(FleetError, match=r"queue\.sqlite, the queue of the fleet, cannot be used"):
            refused()


def test_what_was_taken_from_the_queue_is_forgotten(path: Path) -> None:
    store = Store(path)
    for name in "abc":
        store.add(name, 0.0, [name])
    store.keep_only(["b", "unknown"])
    assert [kept.id for kept in store.prompts()] == ["b"]


WRITES = """
import sys
from fleet.store import Store
from pathlib import Path
store = Store(Path(sys.argv[1]))
for number in range(1_000_000):
    store.add(str(number), float(number), [number])
    if number % 2:
        store.begin(str(number))
    if number % 3 == 0:
        store.finish(str(number), {"number": number})
    print(number, flush=True)
"""


def test_what_was_said_is_written(path: Path) -> None:
    """The writer is killed in the middle; all that it has told of is there, in whole."""
    command = [sys.executable, "-c", WRITES, os.fspath(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for line in writer.stdout:
            if int(line) == 40:
                break
        writer.kill()
        told = [int(line) for line in writer.stdout]
    last = max([40, *told])
    store = Store(path)
    waiting, done = {kept.id: kept for kept in store.prompts()}, store.history()
    for number in range(last + 1):
        name = str(number)
        assert (name in done) == (number % 3 == 0)
        assert (name in waiting) == (number % 3 != 0)
        if name in waiting:
            assert waiting[name].attempts == number % 2
    assert writer.returncode == (-signal.SIGKILL if os.name != "nt" else 1)


def test_a_second_front_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *given, **options: connect(*given, **options, timeout=0.1))
    first = Store(path)
    first.add("a", 0.0, [])
    with pytest.raises(FleetError, match=r"queue\.sqlite.* Is one running already\?"):
        Store(path)
    assert [kept.id for kept in first.prompts()] == ["a"]


def test_a_file_of_a_later_version_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    file = sqlite3.connect(path)
    file.execute("PRAGMA user_version = 99")
    file.commit()
    file.close()
    with pytest.raises(FleetError, match="later version"):
        Store(path)
