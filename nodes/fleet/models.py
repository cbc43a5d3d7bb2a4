"""Which model files a prompt loads."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import folder_paths

from ...fleet.files import texts_of
from ...fleet.scheduling import ModelFile

# Folders that hold no models.
OTHERS = ("custom_nodes", "configs")


def models_of(prompt: Mapping[str, Any]) -> frozenset[ModelFile]:
    """The files in ComfyUI's folders of models that inputs of a prompt name, with their sizes in bytes.

    A name that is in several folders counts as it is in the first, and a file in two kinds of folder counts once.
    """
    known = dict(reversed(list(_known_files())))
    found: dict[str, ModelFile] = {}
    for value in texts_of(prompt):
        if (folder := known.get(value)) is None:
            continue
        path = folder_paths.get_full_path(folder, value)
        if path is not None:
            with contextlib.suppress(OSError):  # Gone since it was listed: the host says so itself.
                found[os.path.realpath(path)] = ModelFile(folder, value, os.path.getsize(path))
    return frozenset(found.values())


def _known_files() -> Iterator[tuple[str, str]]:
    """The names of all model files, with the kind of their folder. ComfyUI keeps the lists until a folder changes."""
    for folder in folder_paths.folder_names_and_paths:
        if folder not in OTHERS:
            for name in folder_paths.get_filename_list(folder):
                yield name, folder
