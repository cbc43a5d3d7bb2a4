"""Headers with a fault are refused, with the place of the fault; odd but valid ones are not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from files import F32, read, write
from weightstream.streaming import CheckpointError, CheckpointFile


@pytest.mark.parametrize("lost", [1, 8])
def test_a_truncated_file_says_how_long_it_should_be(path: Path, lost: int) -> None:
    size = path.stat().st_size
    os.truncate(path, size - lost)
    with pytest.raises(CheckpointError, match=rf"{size - lost} bytes found where the header says {size}\. It is trunc"):
        CheckpointFile(path)


def test_a_file_with_bytes_of_no_tensor_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="bytes that belong to no tensor; download it again"):
        CheckpointFile(write(tmp_path / "a.safetensors", {"a": F32}, bytes(9)))


@pytest.mark.parametrize("size", [0, 7])
def test_a_file_too_short_for_any_header_says_so(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(bytes(size))
    with pytest.raises(CheckpointError, match=f"{size} bytes, too short for a header"):
        CheckpointFile(path)


def test_a_truncated_header_says_how_long_the_file_should_be(path: Path) -> None:
    os.truncate(path, 40)
    with pytest.raises(CheckpointError, match=r"40 bytes found where the header alone takes \d+\. It is truncated"):
        CheckpointFile(path)


@pytest.mark.parametrize("length", [100_000_001, 2**63, 2**64 - 1])
def test_an_impossible_length_of_the_header_is_refused(tmp_path: Path, length: int) -> None:
    with pytest.raises(CheckpointError, match=f"says it is {length} bytes long, more than the 100000000 allowed"):
        CheckpointFile(write(tmp_path / "a.safetensors", {"a": F32}, length=length))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("", "not valid JSON"),
        ("[1]", "not a JSON object"),
        ('{"a":NaN}', "NaN is no JSON"),
        ('{"a":1e999}', "out of range"),
        ('{"\\ud800":1}', "character is incomplete"),
        ('{"a":' + "[" * 127 + "]" * 127 + "}", "nested more than 127 deep"),
        ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "not valid JSON"),
        ('{"__metadata__":{},"__metadata__":{}}', "__metadata__ twice"),
        ({"__metadata__": {"a": 1}}, "not a map of names to texts"),
        ({"a": 1}, "'a' is not described by a JSON object"),
        ({"a": {"dtype": "F32", "shape": [2]}}, r"'a' has the fields \['dtype', 'shape'\]"),
        ({"a": F32 | {"dtype": "F33"}}, "'a' has the dtype 'F33'"),
        ({"a": F32 | {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}, "'a' .F6_E2M3, .4.. .* this torch"),
        ({"a": F32 | {"dtype": "F4", "shape": [16, 1]}}, "'a' .F4, .16, 1.. needs an even last size"),
        ({"a": F32 | {"dtype": "F4", "shape": [15]}}, "'a' .F4, .15.. takes 7.5 bytes"),
        ({"a": F32 | {"shape": [2.0]}}, r"'a' has the shape \[2.0\]"),
        ({"a": F32 | {"shape": [True, 2]}}, r"'a' has the shape \[True, 2\]"),
        ({"a": F32 | {"shape": [-2]}}, r"'a' has the shape \[-2.0\]"),
        ({"a": F32 | {"shape": [3]}}, "takes 12 bytes, but its data_offsets hold 8"),
        ({"a": F32 | {"shape": [2**32, 2**32, 0]}}, "more elements than can be counted"),
        ({"a": F32 | {"shape": [0, 2**63], "data_offsets": [0, 0]}}, "torch does not hold"),
        ({"a": F32 | {"data_offsets": [0, 8, 8]}}, r"'a' has the data_offsets \[0, 8, 8\], not two"),
        ({"a": F32 | {"data_offsets": [8, 0]}}, "begin at 0: tensors overlap or leave a hole"),
        ({"a": F32, "b": F32}, "'b' has the bytes 0 to 8 of the data where its bytes should begin at 8"),
        ({"a": F32 | {"shape": [1], "data_offsets": [4, 8]}}, "'a' has the bytes 4 to 8"),
        ({"a": F32, "b": F32 | {"shape": [0], "data_offsets": [4, 4]}}, "'b' has the bytes 4 to 4"),
    ],
)
def test_a_header_with_a_fault_is_refused_with_its_place(tmp_path: Path, header: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        CheckpointFile(write(tmp_path / "bad.safetensors", header))
    assert "bad.safetensors" in str(caught.value)


def test_a_header_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes((2).to_bytes(8, "little") + b"{\xff")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        CheckpointFile(path)


def test_zero_size_tensors_lie_between_others_in_any_order(tmp_path: Path) -> None:
    header = {
        "end": {"dtype": "F16", "shape": [3, 0], "data_offsets": [8, 8]},
        "a": F32,
        "start": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},
    }
    file = CheckpointFile(write(tmp_path / "a.safetensors", header))
    assert list(file.entries) == ["start", "a", "end"]
    assert {name: tuple(view.shape) for name, view in file.views().items()} == {"start": (0,), "a": (2,), "end": (3, 0)}


def test_two_four_bit_elements_are_one_of_torchs(tmp_path: Path) -> None:
    if not hasattr(torch, "float4_e2m1fn_x2"):
        pytest.skip("this torch has no four-bit floats")
    file = CheckpointFile(write(tmp_path / "a.safetensors", {"a": F32 | {"dtype": "F4", "shape": [2, 8]}}))
    assert file.entries["a"].shape == (2, 4)
    assert read(file.locate(file.views()["a"])) == bytes(8)
