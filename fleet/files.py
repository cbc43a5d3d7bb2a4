"""Files that prompts read and write: what they are called in front, and what must be on a worker's host before it runs.

[Note: whose folder]
Each worker writes into a folder of its own: two that shared one would give the same name to different pictures. In
front that folder is ``output/NAME OF THE WORKER``, and where the worker says ``subfolder`` the client reads
``NAME/subfolder``. On the front's own host the worker writes there itself; from other hosts the file comes before the
message that names it. What a prompt reads (``LoadImage``) is found by its name among the front's files. Inputs are
shared on the front's host. Another host gets them before the prompt, and any worker gets files of ``[output]`` and
``[temp]``, which lie in the front's folders and not in its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

INPUT, OUTPUT, TEMP = "input", "output", "temp"
KINDS = (INPUT, OUTPUT, TEMP)
# Files are carried in pieces of so many bytes.
PIECE = 32 << 20


class Place(NamedTuple):
    """A file in one of ComfyUI's folders."""

    kind: str
    subfolder: str
    name: str


@dataclass(frozen=True)
class Folders:
    """Where the files of each kind are."""

    input: Path
    output: Path
    temp: Path

    def path(self, place: Place) -> Path:
        """Where a file is.

        Raises:
            ValueError: its name leads out of the folder.
        """
        folder: Path = getattr(self, place.kind) if place.kind in KINDS else Path()
        inside = PurePosixPath(place.subfolder, place.name)
        path = folder / inside
        # The last finds what only Windows takes for another drive.
        leads_out = inside.is_absolute() or ".." in inside.parts or folder not in path.parents
        if place.kind not in KINDS or leads_out:
            raise ValueError(f"{inside} is not in the {place.kind} folder")
        return path


def places_in(value: Any) -> Iterator[tuple[dict[str, Any], Place]]:
    """Each description of a file in what a node put out, with the file that it describes."""
    if isinstance(value, dict):
        name, kind = value.get("filename"), value.get("type")
        if isinstance(name, str) and kind in (OUTPUT, TEMP):
            yield value, Place(kind, str(value.get("subfolder") or ""), name)
        for each in value.values():
            yield from places_in(each)
    elif isinstance(value, list):
        for each in value:
            yield from places_in(each)


def rename(value: Any, prefixes: Mapping[str, str]) -> None:
    """Give files in what a node put out, in place, the subfolders that they have in front (Note: whose folder)."""
    for description, place in list(places_in(value)):
        description["subfolder"] = "/".join(part for part in (prefixes[place.kind], place.subfolder) if part)


def read_by(prompt: Mapping[str, Any], folders: Folders) -> list[Place]:
    """The front's files that a prompt names: an input's name, or one with ``[output]`` or ``[temp]`` behind it."""
    found: dict[Place, None] = {}
    for value in texts_of(prompt):
        place = _read_place(value)
        if place is None:
            continue
        try:
            if folders.path(place).is_file():
                found[place] = None
        except (ValueError, OSError):  # No name of a file: it leads elsewhere, or is a longer text.
            continue
    return list(found)


def texts_of(prompt: Mapping[str, Any]) -> Iterator[str]:
    """The texts that nodes of a prompt get, those within lists and objects too."""
    left: list[Any] = [node.get("inputs") for node in prompt.values() if isinstance(node, Mapping)]
    while left:
        value = left.pop(0)
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, list):
            left += value


def _read_place(value: str) -> Place | None:
    if not value or "\0" in value or "\n" in value:
        return None
    kind = INPUT
    for each in KINDS:
        if value.endswith(f" [{each}]"):
            kind, value = each, value[: -len(each) - 3]
    subfolder, _, name = value.replace("\\", "/").rpartition("/")
    return Place(kind, subfolder, name) if name else None


def pieces_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """The bytes of a file, with where each piece begins. An empty file has one piece."""
    with open(path, "rb") as file:
        offset = 0
        while (piece := file.read(PIECE)) or not offset:
            yield offset, piece
            offset += len(piece)
            if not piece:
                return


def write_piece(path: Path, offset: int, piece: bytes, changed_ns: int | None = None) -> None:
    """Write what :func:`pieces_of` read, in its order. ``changed_ns``: when the original was last changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "r+b" if offset else "wb") as file:
        file.seek(offset)
        file.write(piece)
    if changed_ns is not None:
        os.utime(path, ns=(changed_ns, changed_ns))
