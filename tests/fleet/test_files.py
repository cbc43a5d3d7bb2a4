"""Files of prompts: what they are called in front, which of them a prompt reads, and that none is outside."""

from __future__ import annotations

from pathlib import Path

import pytest
from weightstream.fleet import files
from weightstream.fleet.files import Folders, Place, pieces_of, places_in, read_by, rename, write_piece


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    found = Folders(tmp_path / "in", tmp_path / "out", tmp_path / "temp")
    for folder in (found.input, found.output, found.temp):
        (folder / "sub").mkdir(parents=True)
    return found


def test_outputs_get_the_folder_of_their_worker() -> None:
    outputs = {
        "9": {"images": [{"filename": "a.png", "subfolder": "", "type": "output"}]},
        "10": {"gifs": [{"filename": "b.mp4", "subfolder": "x/y", "type": "temp", "format": "video/mp4"}]},
        "11": {"text": ["a.png"], "other": [{"filename": "c.png", "type": "input"}, {"type": "output"}]},
    }
    rename(outputs, {"output": "gpu-0", "temp": "gpu-0/temp"})
    assert [place for _, place in places_in(outputs)] == [
        Place("output", "gpu-0", "a.png"),
        Place("temp", "gpu-0/temp/x/y", "b.mp4"),
    ]
    assert outputs["11"]["other"] == [{"filename": "c.png", "type": "input"}, {"type": "output"}]


def test_what_a_prompt_reads_is_found(folders: Folders) -> None:
    for path in (folders.input / "a.png", folders.input / "sub" / "b.png", folders.output / "sub" / "c.png"):
        path.write_bytes(b"x")
    (folders.temp / "d.png").write_bytes(b"x")
    (folders.input / "e.png").write_bytes(b"x")
    prompt = {
        "1": {"inputs": {"image": "a.png", "other": 3, "link": ["2", 0], "missing": "z.png"}},
        "2": {"inputs": {"image": "sub/b.png [input]", "again": "a.png"}},
        "3": {"inputs": {"image": "sub/c.png [output]", "shown": "d.png [temp]", "folder": "sub"}},
        "4": {"inputs": {"image": "../in/a.png", "absolute": str(folders.input / "a.png"), "text": "a\nb", "no": ""}},
        "5": "no node",
        "6": {"inputs": {"text": "a long prompt " * 60, "longer": "\u957f" * 500}},
        "7": {"inputs": {"slots": [{"on": True, "name": "e.png"}]}},
    }
    assert read_by(prompt, folders) == [
        Place("input", "", "a.png"),
        Place("input", "sub", "b.png"),
        Place("output", "sub", "c.png"),
        Place("temp", "", "d.png"),
        Place("input", "", "e.png"),
    ]


@pytest.mark.parametrize(
    "place", [Place("output", "..", "x"), Place("temp", "", "/etc/passwd"), Place("models", "", "x")]
)
def test_no_name_leads_outside(folders: Folders, place: Place) -> None:
    with pytest.raises(ValueError, match="is not in the"):
        folders.path(place)


@pytest.mark.parametrize("size", [0, 1, 9, 10, 11, 30])
def test_a_file_goes_over_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(files, "PIECE", 10)
    source, target = tmp_path / "a", tmp_path / "new" / "b"
    source.write_bytes(bytes(range(size)))
    target.parent.mkdir()
    target.write_bytes(b"older and longer than what comes, by far")
    pieces = list(pieces_of(source))
    assert [len(piece) for _, piece in pieces] == [10] * (size // 10) + [size % 10] * bool(size % 10 or not size)
    for offset, piece in pieces:
        write_piece(target, offset, piece)
    assert target.read_bytes() == bytes(range(size))
