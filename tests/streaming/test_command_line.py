"""``convert`` on the command line: what it reads, writes, prints and refuses."""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from weightstream import streaming
from weightstream.streaming.command_line import main
from workflow_files import node, workflow

OURS = "WeightStreamModelLoader"
PROGRAM = Path(streaming.__path__[0])


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


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_a_number_that_json_cannot_carry_is_refused(
    number: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(file.read_text("utf-8").replace('"default"', number), "utf-8")
    assert main(["convert", str(file)]) == 2
    assert f"{file}: it has the number {number}, which JSON cannot carry" in capsys.readouterr().err
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("source", [".", "/", ""])
def test_a_folder_is_no_file_to_convert(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", source]) == 2
    assert "cannot be read: " in capsys.readouterr().err


@pytest.mark.parametrize("target", [".", "/", ".."])
def test_a_folder_is_no_file_to_write(target: str, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(file), target]) == 2
    assert "cannot be written: " in capsys.readouterr().err
    assert list(file.parent.iterdir()) == [file]


def test_a_name_cannot_forge_a_line_or_command_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inner = workflow(node(1, "UNETLoader", ["f", "default"]), node(2, "KSampler", [], model=(1, 0)))
    name = "\x1b]0;mine\x07\nchanged  node 7: all is well\u2028\u202e"
    subgraph = {**inner, "id": "s", "name": name, "inputs": [], "outputs": [], "links": as_objects(inner["links"])}
    path = tmp_path / "in.json"
    path.write_text(json.dumps({**workflow(node(9, "s", [])), "definitions": {"subgraphs": [subgraph]}}))
    assert main(["convert", str(path)]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert r"\x1b]0;mine\x07\nchanged  node 7: all is well\u2028\u202e, node 1 (UNETLoader)" in first
    assert last.startswith("written to ")


def as_objects(links: list[list[Any]]) -> list[dict[str, Any]]:
    """Links as a subgraph has them."""
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    return [dict(zip(names, link, strict=True)) for link in links]


def to_the_terminal(file: Path, size: int) -> list[str]:
    """The command that converts a workflow, a long one or one that fits into a buffer, to the terminal."""
    graph = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({**graph, "extra": ["x"] * size}), "utf-8")
    return [sys.executable, str(PROGRAM), "convert", str(file), "-"]


def in_a_shell(file: Path, rest: str, size: int = 1) -> subprocess.CompletedProcess[str]:
    """Run that command with ``rest`` behind it."""
    line = f"{shlex.join(to_the_terminal(file, size))} {rest}"
    return subprocess.run(["bash", "-c", line], env=buffered(), capture_output=True, text=True, check=False)


def buffered() -> dict[str, str]:
    """The environment of a process whose output has a buffer, as it has by default."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@pytest.mark.skipif(sys.platform == "win32", reason="it has other pipes")
@pytest.mark.parametrize("size", [1, 100_000])
def test_who_has_read_enough_is_told_nothing(size: int, file: Path) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    try:
        ended = subprocess.run(
            to_the_terminal(file, size), stdout=writes, env=buffered(), stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(writes)
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1, "what the conversion did"


@pytest.mark.skipif(sys.platform == "win32", reason="it has other shells")
@pytest.mark.parametrize("size", [1, 100_000])
@pytest.mark.parametrize(
    ("rest", "code", "says"),
    [
        (">&-", 2, "there is no output to write to: it was closed"),
        pytest.param(
            *("> /dev/full", 1, "the output cannot be written: No space left on device"),
            marks=pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it"),
        ),
    ],
)
def test_an_output_that_takes_nothing_is_no_traceback(rest: str, code: int, says: str, size: int, file: Path) -> None:
    ended = in_a_shell(file, rest, size)
    assert ended.returncode == code
    assert ended.stderr.splitlines()[1:] == [says], "the first line is of the conversion"


@pytest.mark.skipif(sys.platform == "win32", reason="it has other shells")
def test_notes_never_go_into_the_workflow(file: Path) -> None:
    ended = in_a_shell(file, "2>&-")
    assert ended.returncode == 0
    assert json.loads(ended.stdout)["nodes"][0]["type"] == OURS


def test_a_byte_order_mark_is_no_obstacle(file: Path) -> None:
    file.write_text(file.read_text("utf-8"), "utf-8-sig")
    assert main(["convert", str(file)]) == 0


def test_what_is_nested_too_deeply_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "deep.json"
    for depth in (400, 200_000):
        path.write_text('{"nodes": ' + "[" * depth + "]" * depth + "}")
        assert main(["convert", str(path)]) == 2
        assert str(path) in capsys.readouterr().err
