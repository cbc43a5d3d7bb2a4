"""``convert`` on the command line: what it reads, writes, prints and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from weightstream.streaming.command_line import main
from workflow_files import node, workflow

OURS = "WeightStreamModelLoader"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "flux 工作流.json"
    graph = workflow(node(1, "UNETLoader", ["模型.safetensors", "default"]), node(2, "KSampler", [], model=(1, 0)))
    path.write_text(json.dumps(graph), "utf-8")
    return path


def test_it_writes_beside_the_file_and_says_what_it_did(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(file)]) == 0
    written = file.with_name("flux 工作流_streamed.json")
    assert json.loads(written.read_text("utf-8"))["nodes"][0]["type"] == OURS
    said = capsys.readouterr().out.splitlines()
    assert said == ["changed  node 1 (UNETLoader): is Streamed Model Loader now", f"written to {written}"]
    assert "UNETLoader" in file.read_text("utf-8"), "the file itself stays"

    assert main(["convert", str(written)]) == 0
    assert capsys.readouterr().out == "there is nothing to change; no file is written\n"
    assert len(list(file.parent.iterdir())) == 2


def test_it_writes_where_it_is_told_also_over_the_file(file: Path) -> None:
    assert main(["convert", str(file), str(file)]) == 0
    assert OURS in file.read_text("utf-8")
    assert "模型" in file.read_text("utf-8")


def test_the_terminal_gets_the_workflow_alone(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(file), "-"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["nodes"][0]["type"] == OURS
    assert "is Streamed Model Loader now" in printed.err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read: No such file"),
        (b"{", "Expecting property name"),
        (b"\xff\xfe", "codec can't decode"),
        (b"[]", "it is no workflow of ComfyUI's page, and no API prompt"),
    ],
)
def test_a_file_that_cannot_be_converted(
    content: bytes | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "in.json"
    if content is not None:
        path.write_bytes(content)
    assert main(["convert", str(path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert str(path) in printed.err
    assert says in printed.err


def test_a_place_that_cannot_be_written_to(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(file), str(file.parent / "missing" / "out.json")]) == 2
    assert "cannot be written: No such file" in capsys.readouterr().err
