"""The browser of these tests: a Chromium, or one built on it, that is installed already."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

VARIABLE = "WEIGHTSTREAM_CHROMIUM"
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MAC_PROGRAMS = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
WINDOWS_FOLDERS = ("PROGRAMFILES", "PROGRAMFILES(X86)", "LOCALAPPDATA")
WINDOWS_PROGRAMS = ("Google/Chrome/Application/chrome.exe", "Chromium/Application/chrome.exe")
NOT_FOUND = f"no Chromium or Chrome is installed here; install one, or set {VARIABLE} to its program"


class NoBrowser(Exception):
    """There is no browser to test with. Its text says what to do."""


def find_chromium() -> Path:
    """The program that the environment names, else the first of the usual ones.

    Raises:
        NoBrowser: none is there, or what the environment names is no program.
    """
    if chosen := os.environ.get(VARIABLE):
        if found := shutil.which(chosen):
            return Path(found)
        raise NoBrowser(f"{VARIABLE}={chosen} names no program that can be run")
    for name in PROGRAMS:
        if found := shutil.which(name):
            return Path(found)
    for path in _usual_places():
        if path.is_file():
            return path
    raise NoBrowser(NOT_FOUND)


def _usual_places() -> list[Path]:
    if sys.platform == "darwin":
        return [Path(program) for program in MAC_PROGRAMS]
    folders = [Path(os.environ[name]) for name in WINDOWS_FOLDERS if os.environ.get(name)]
    return [folder / program for folder in folders for program in WINDOWS_PROGRAMS]
