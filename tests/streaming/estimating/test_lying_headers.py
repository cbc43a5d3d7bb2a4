"""Headers that say what cannot be, or too much: refused as safetensors refuses them, and in no time."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from weightstream.streaming import CheckpointError, UnsupportedModelError
from weightstream.streaming.command_line import main
from weightstream.streaming.estimating.cutting import MOST_UNITS, cut
from weightstream.streaming.estimating.estimate import Machine, plan_for
from weightstream.streaming.estimating.tensors import MOST_BYTES, Tensor, missing_bytes, read_tensors

TIB = 1 << 40


def entry(begin: int, end: int, dtype: Any = "BF16", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 2] if shape is None else shape, "data_offsets": [begin, end]}


def write(path: Path, header: dict[str, Any]) -> Path:
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    return path


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, "'b' begins at 4, and what is before it ends at 8"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, "'b' begins at 0"),
        ({"b": entry(12, 16), "a": entry(0, 8)}, "'b' begins at 12"),
        ({"a": entry(2, 8)}, "'a' begins at 2, and what is before it ends at 0"),
        ({"a": entry(0, MOST_BYTES)}, "no place in a file"),
        ({"a": entry(0, 8, shape=[5])}, "does not take 8 bytes"),
        ({"a": entry(0, 8, "F32", [4])}, "does not take 8 bytes"),
        ({"a": entry(0, 8, "F4", [4])}, "does not take 8 bytes"),
        ({"a": entry(0, 8, shape=[-2, -2])}, "no shape"),
        ({"a": entry(0, 2, shape=[True])}, "no shape"),
        ({"a": entry(0, 8, shape="4")}, "no shape"),
        ({"a": entry(0, 8, "\x1b[2J")}, "nothing is known of the dtype"),
        ({"a": entry(0, 8, ["BF16"])}, "nothing is known of the dtype"),
        ({"a": {"dtype": "BF16", "data_offsets": [0, 8]}}, "'shape'"),
    ],
)
def test_a_header_that_says_what_cannot_be(tmp_path: Path, tensors: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match="its header does not describe tensors") as error:
        read_tensors(write(tmp_path / "x.safetensors", tensors))
    assert says in str(error.value)


def test_tensors_in_any_order_and_empty_ones_are_read(tmp_path: Path) -> None:
    tensors = {"b": entry(8, 16), "none": entry(8, 8), "a": entry(0, 8), "half": entry(16, 18, "F4", [4])}
    path = write(tmp_path / "x.safetensors", {"__metadata__": {"a": "b"}, **tensors})
    assert [(tensor.name, tensor.nbytes) for tensor in read_tensors(path)] == [
        *(("b", 8), ("none", 0), ("a", 8), ("half", 2))
    ]
    assert missing_bytes(path) == 18


def test_a_model_without_blocks_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "x.safetensors", {"a": entry(0, 8)})
    assert main(["plan", str(path)]) == 2
    assert capsys.readouterr().err == f"{path}: most of its bytes lie in no repeated block, so it would not stream\n"


def test_names_with_control_characters_stay_on_their_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = {f"x\x1b[2J\r\x9b.{number}.a.weight": entry(8 * number, 8 * number + 8) for number in range(3)}
    path = write(tmp_path / "x.safetensors", blocks)
    assert main(["plan", str(path), "--vram", "8"]) == 0
    said = capsys.readouterr().out
    assert "3 in x\\x1b[2J\\r\\x9b" in said
    assert said.replace("\n", "").isprintable()
    assert main(["plan", str(tmp_path / "\x1b[2J")]) == 2
    assert capsys.readouterr().err.removesuffix("\n").isprintable()


def test_more_parts_than_any_model_has_are_refused_at_once() -> None:
    for blocks, parts in ((MOST_UNITS + 1, 1), (MOST_UNITS // 100 + 1, 100)):
        tensors = [Tensor(f"a.{block}.u{part}.w", "BF16", 1 << 20) for block in range(blocks) for part in range(parts)]
        with pytest.raises(UnsupportedModelError, match="parts, and no model has so many"):
            cut(tensors)


def test_many_lists_of_blocks_keep_their_order() -> None:
    found = cut([Tensor(f"list{number % 500}.{number // 500}.a.weight", "BF16", 1000) for number in range(1000)])
    assert list(found.lists) == [f"list{number}" for number in range(500)]
    assert found.outline.blocks == 1000


def test_a_model_of_very_many_blocks_has_a_plan() -> None:
    found = cut([Tensor(f"blocks.{block}.a.weight", "BF16", 1 << 20) for block in range(MOST_UNITS)])
    plan = plan_for(found, Machine(12, compute_seconds=0.5))
    assert len(plan.streamed) == pytest.approx(MOST_UNITS - 9.5 * 1024, rel=0.05)
