"""A page of ComfyUI that is newer than the one that its own requirements name, for ComfyUI's ``--front-end-root``."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from pathlib import Path

from dev import cache_dir, mark_ready, pip, ready, run_step, setup_lock, tool_python

PACKAGE = "comfyui-frontend-package"
# The newest that was tried. Not whatever is newest today: then a release of ComfyUI's page could break our tests.
VERSION = "1.58.1"
# Another version, or "newest".
VARIABLE = "WEIGHTSTREAM_FRONTEND"
NEWEST = "newest"


def fetch_page() -> Path:
    """The folder of the page, which is downloaded once.

    Raises:
        dev.SetupError: it cannot be had.
    """
    version = os.environ.get(VARIABLE) or VERSION
    target = _folder(version)
    if version == NEWEST or not ready(target):
        python = tool_python()
        with setup_lock():
            target = _download(python, version)
    return target / PACKAGE.replace("-", "_") / "static"


def _folder(version: str) -> Path:
    return cache_dir() / f"frontend-{version}"


def _download(python: Path, version: str) -> Path:
    wanted = PACKAGE if version == NEWEST else f"{PACKAGE}=={version}"
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=cache_dir()) as scratch:
        command = pip(python, "download", "--no-deps", "--only-binary=:all:", "--dest", scratch, wanted)
        run_step("downloading a newer page of ComfyUI", command, "Check the network, then try again.")
        (wheel,) = Path(scratch).glob("*.whl")
        target = _folder(wheel.name.split("-")[1])
        if not ready(target):
            shutil.rmtree(target, ignore_errors=True)
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(target)
            mark_ready(target)
    return target
