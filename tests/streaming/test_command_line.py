"""``convert`` on the command line: what it reads, writes, prints and refuses."""

from __future__ import annotations

import io
import json
import sys
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
    assert said == ["changed  node 1 (UNETLoader): is a Streamed Model Loader now", f"written to {written}"]
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
    assert "is a Streamed Model Loader now" in printed.err


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


def test_what_is_there_already_is_not_written_over(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = file.with_name("flux 工作流_streamed.json")
    there.write_text("mine")
    assert main(["convert", str(file)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert there.read_text() == "mine"
    assert main(["convert", str(file), str(there)]) == 0


def test_a_place_under_a_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(file), str(file / "out.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_title_that_no_encoding_has_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "in.json"
    graph = workflow(node(1, "UNETLoader", ["f", "default"]), node(2, "KSampler", [], model=(1, 0)))
    graph["nodes"][0]["title"] = "\ud83d"
    path.write_text(json.dumps(graph))
    assert main(["convert", str(path)]) == 0
    assert json.loads((tmp_path / "in_streamed.json").read_text("utf-8"))["nodes"][0]["title"] == "\ud83d"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_console_of_another_encoding_gets_json_all_the_same(
    encoding: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert main(["convert", str(file), "-"]) == 0
    assert main(["convert", str(file)]) == 0
    out.seek(0)
    printed, _, said = out.read().partition("\n}\n")
    assert json.loads(printed + "}")["nodes"][0]["widgets_values"][0] == "模型.safetensors"
    assert "\\u5de5" in said, "the name of the file that was written"


def test_a_byte_order_mark_is_no_obstacle(file: Path) -> None:
    file.write_text(file.read_text("utf-8"), "utf-8-sig")
    assert main(["convert", str(file)]) == 0


def test_what_is_nested_too_deeply_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "deep.json"
    for depth in (400, 200_000):
        path.write_text('{"nodes": ' + "[" * depth + "]" * depth + "}")
        assert main(["convert", str(path)]) == 2
        assert str(path) in capsys.readouterr().err
