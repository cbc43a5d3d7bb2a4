"""Which browser is taken, and what is said where there is none."""

from __future__ import annotations

import sys
from pathlib import Path

import chromium
import pytest


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(chromium.VARIABLE, raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(chromium, "_usual_places", list)


def program(path: Path) -> Path:
    path.touch()
    path.chmod(0o755)
    return path


def test_the_chosen_one_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = program(tmp_path / "mine.exe")
    monkeypatch.setattr(chromium, "_usual_places", lambda: [program(tmp_path / "usual.exe")])
    assert chromium.find_chromium() == tmp_path / "usual.exe"
    monkeypatch.setenv(chromium.VARIABLE, str(chosen))
    assert chromium.find_chromium() == chosen


@pytest.mark.skipif(sys.platform == "win32", reason="a program's name ends differently there")
def test_one_on_the_path_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "google-chrome")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert chromium.find_chromium() == tmp_path / "google-chrome"


def test_without_one_it_is_said_what_to_do() -> None:
    with pytest.raises(chromium.NoBrowser, match=f"install one, or set {chromium.VARIABLE}"):
        chromium.find_chromium()


def test_a_chosen_one_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(chromium.VARIABLE, str(tmp_path / "gone"))
    with pytest.raises(chromium.NoBrowser, match="gone names no program"):
        chromium.find_chromium()
