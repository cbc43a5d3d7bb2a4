"""The queue and the history on the disk, so that they outlive the ComfyUI in front.

One SQLite file. Each change is one transaction, on the disk before the client hears of it. Keys of a client (for nodes
that call paid services) are never written: a prompt that has some and waits through a restart runs without them.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .errors import FleetError

SCHEMA = 1
# As many as ComfyUI keeps.
MOST_HISTORY = 10_000

_TABLES = """
CREATE TABLE IF NOT EXISTS prompts (
    id TEXT PRIMARY KEY, number REAL NOT NULL, item TEXT NOT NULL, attempts INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS history (
    place INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, entry TEXT NOT NULL);
"""


class Kept(NamedTuple):
    """A prompt that had no result when the file was last written.

    Attributes:
        number: its priority; smaller is earlier.
        item: what the queue needs of it, as values of JSON.
        attempts: how often it was begun.
    """

    id: str
    number: float
    item: Any
    attempts: int


class Store:
    """The file. May be used by any thread.

    Raises:
        FleetError: it cannot be opened, or is of a later version.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            # Whoever else writes there is a second front, which would run all prompts twice.
            self._file.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._file.execute("PRAGMA journal_mode = WAL")
            self._file.execute("PRAGMA synchronous = FULL")
            (version,) = self._file.execute("PRAGMA user_version").fetchone()
            if version not in (0, SCHEMA):
                raise FleetError(f"{path} is of a later version of this pack ({version}, known is {SCHEMA})")
            self._file.executescript(_TABLES)
            self._file.execute(f"PRAGMA user_version = {SCHEMA}")
        except (OSError, sqlite3.Error) as error:
            raise FleetError(
                f"{path}, the queue of the fleet, cannot be used: {error}. Is one running already?"
            ) from error

    def close(self) -> None:
        with self._lock:
            self._file.close()

    def add(self, prompt_id: str, number: float, item: Any) -> None:
        """Keep a prompt until it has a result."""
        self._write(
            "INSERT OR REPLACE INTO prompts (id, number, item) VALUES (?, ?, ?)", prompt_id, number, _text(item)
        )

    def begin(self, prompt_id: str) -> None:
        """Note that a prompt is about to run."""
        self._write("UPDATE prompts SET attempts = attempts + 1 WHERE id = ?", prompt_id)

    def put_back(self, prompt_id: str, attempts: int) -> None:
        """Note that a prompt waits again; so often it counts as begun."""
        self._write("UPDATE prompts SET attempts = ? WHERE id = ?", attempts, prompt_id)

    def finish(self, prompt_id: str, entry: Any) -> None:
        """Keep the result in the place of the prompt, in one step."""
        text = _text(entry)
        with self._lock, self._errors():
            self._file.execute("BEGIN IMMEDIATE")
            try:
                self._file.execute("INSERT OR REPLACE INTO history (id, entry) VALUES (?, ?)", (prompt_id, text))
                self._file.execute("DELETE FROM prompts WHERE id = ?", (prompt_id,))
                self._file.execute(
                    "DELETE FROM history WHERE place <= (SELECT MAX(place) FROM history) - ?", (MOST_HISTORY,)
                )
                self._file.execute("COMMIT")
            except sqlite3.Error:
                if self._file.in_transaction:
                    self._file.execute("ROLLBACK")
                raise

    def keep_only(self, prompt_ids: Iterable[str]) -> None:
        """Forget prompts that were taken from the queue."""
        known = {prompt_id for (prompt_id,) in self._read("SELECT id FROM prompts")}
        for prompt_id in known - set(prompt_ids):
            self._write("DELETE FROM prompts WHERE id = ?", prompt_id)

    def forget(self, prompt_id: str) -> None:
        """Take a result out of the history."""
        self._write("DELETE FROM history WHERE id = ?", prompt_id)

    def forget_all(self) -> None:
        self._write("DELETE FROM history")

    def prompts(self) -> list[Kept]:
        """All prompts without a result, in the order of the queue."""
        rows = self._read("SELECT id, number, item, attempts FROM prompts ORDER BY number, rowid")
        return [Kept(prompt_id, number, json.loads(item), attempts) for prompt_id, number, item, attempts in rows]

    def history(self) -> dict[str, Any]:
        """All results, the oldest first."""
        return {
            prompt_id: json.loads(entry)
            for prompt_id, entry in self._read("SELECT id, entry FROM history ORDER BY place")
        }

    def _read(self, statement: str) -> list[Any]:
        with self._lock, self._errors():
            return self._file.execute(statement).fetchall()

    def _write(self, statement: str, *values: Any) -> None:
        with self._lock, self._errors():
            self._file.execute(statement, values)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise FleetError(f"{self._path}, the queue of the fleet, cannot be used: {error}") from error


def _text(value: Any) -> str:
    """JSON; what has no place in it (a node's own object in an output) as its text, as the server would send it."""
    return json.dumps(value, default=str)
