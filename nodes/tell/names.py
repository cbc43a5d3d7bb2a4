"""Files by the names under which the host lists them, so that no text reveals where they lie."""

from __future__ import annotations

import contextlib
import os
import tempfile

import folder_paths


def shown_name(path: str) -> str:
    """The name by which the host lists a file: its path below the host's folder of models, else its bare name."""
    for folder in _model_folders():
        with contextlib.suppress(ValueError):  # Another drive has no common path.
            if os.path.commonpath([folder, path]) == os.path.normpath(folder):
                return os.path.relpath(path, folder)
    return os.path.basename(path)


def _model_folders() -> list[str]:
    """The host's folders of files, the longest paths first: a folder inside of another comes before that."""
    folders = {folder for paths, _ in folder_paths.folder_names_and_paths.values() for folder in paths}
    return sorted(folders, key=len, reverse=True)


def without_folders(text: str) -> str:
    """``text`` with files named as the host lists them: routes do not reveal where they lie."""
    others = [folder_paths.models_dir, folder_paths.base_path, os.path.expanduser("~"), tempfile.gettempdir()]
    for folder in [*_model_folders(), *others]:
        if len(folder) > 1:
            text = text.replace(os.path.join(folder, ""), "")
    return text
