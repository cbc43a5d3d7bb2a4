"""Headers with a fault are refused, with the place of the fault; odd but valid ones are not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from files import F32, memory, read, write
from weightstream.streaming import CheckpointError, CheckpointFile


@pytest.mark.parametrize("lost", [1, 8])
def test_a_truncated_file_says_how_long_it_should_be(path: Path, lost: int) -> None:
    size = path.stat().st_size
    os.truncate(path, size - lost)
    with pytest.raises(CheckpointError, match=rf"{size - lost} bytes found where the header says {size}\. It is trunc"):
        CheckpointFile(path)


def _at(begin: int, size: int = 2) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [size], "data_offsets": [begin, begin + 4 * size]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": _at(0), "b": _at(8)},
        {"a": _at(5), "b": _at(28)},
        {"a": _at(8), "b": _at(0)},
        {"a": _at(0), "b": _at(4)},
        {"a": _at(0), "b": _at(0)},
        {"a": _at(0), "b": _at(0, 1)},
        {"a": _at(0), "b": _at(8), "none": _at(2, 0), "beyond": _at(99, 0)},
    ],
)
def test_tensors_may_lie_anywhere(tmp_path: Path, header: dict[str, Any]) -> None:
    """With bytes of nobody before, between and behind them, in any order, and with bytes that they share."""
    data = bytes(range(40))
    file = CheckpointFile(write(tmp_path / "odd.safetensors", header, data))
    views = file.views()
    assert file.entries.keys() == header.keys()
    for name, info in header.items():
        begin, end = info["data_offsets"]
        assert memory(views[name]) == data[begin:end]
        assert begin == end or read(file.locate(views[name])) == data[begin:end]


@pytest.mark.parametrize(
    ("text", "metadata"),
    [
        ('{"step":12,"list":[1,{"a":null}],"nan":NaN}', {"step": 12, "list": [1, {"a": None}]}),
        ('{"half":"\\ud800"}', {"half": "\ud800"}),
        ('{"deep":' + "[" * 200 + "]" * 200 + "}", {}),
        ('{"first":"1"},"__metadata__":{"last":"2"}', {"last": "2"}),
        ("null", {}),
        ('["config"]', {}),
        ("1e999", {}),
    ],
)
def test_metadata_may_be_anything(tmp_path: Path, text: str, metadata: dict[str, Any]) -> None:
    header = f'{{"__metadata__":{text},"a":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}}}'
    file = CheckpointFile(write(tmp_path / "odd.safetensors", header))
    assert metadata.items() <= file.metadata.items()
    assert list(file.entries) == ["a"]


def test_of_a_name_that_occurs_twice_the_last_counts(tmp_path: Path) -> None:
    text = '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    file = CheckpointFile(write(tmp_path / "odd.safetensors", f'{{"a":{{}},{text},"b":1,{text.replace("a", "b", 1)}}}'))
    assert file.entries["a"].shape == file.entries["b"].shape == (2,)


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
        ('{"a":NaN}', "'a' is not described by a JSON object"),
        ('{"\\ud800":1}', "is not described by a JSON object"),
        ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "not valid JSON"),
        ({"a": 1}, "'a' is not described by a JSON object"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "'a' has no data_offsets"),
        ({"a": F32 | {"dtype": "F33"}}, "'a' has the dtype 'F33'"),
        ({"a": F32 | {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}, "'a' .F6_E2M3, .4.. .* this torch"),
        ({"a": F32 | {"dtype": "F4", "shape": [16, 1]}}, "'a' .F4, .16, 1.. needs an even last size"),
        ({"a": F32 | {"dtype": "F4", "shape": [15]}}, "'a' .F4, .15.. takes 7.5 bytes"),
        ({"a": F32 | {"shape": [2.0]}}, r"'a' has the shape \[2.0\]"),
        ({"a": F32 | {"shape": [True, 2]}}, r"'a' has the shape \[True, 2\]"),
        ({"a": F32 | {"shape": [-2]}}, r"'a' has the shape \[-2\]"),
        ({"a": F32 | {"shape": [3]}}, "takes 12 bytes, but its data_offsets hold 8"),
        ({"a": F32 | {"shape": [2**32, 2**32, 0]}}, "takes 0 bytes, but its data_offsets hold 8"),
        ({"a": F32 | {"shape": [0, 2**63], "data_offsets": [0, 0]}}, "torch does not hold"),
        ({"a": F32 | {"data_offsets": [0, 8, 8]}}, r"'a' has the data_offsets \[0, 8, 8\], not two"),
        ({"a": F32 | {"data_offsets": [8, 0]}}, r"'a' has the data_offsets \[8, 0\], not two"),
        ({"a": F32 | {"data_offsets": [-8, 0]}}, r"'a' has the data_offsets \[-8, 0\], not two"),
        ({"a": F32 | {"data_offsets": [4, 12]}}, r"bytes found where the header says \d+\. It is truncated"),
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


def test_a_dtype_that_nobody_knows_is_no_damage(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'a' has the dtype 'F33', which nothing is known of here") as caught:
        CheckpointFile(write(tmp_path / "new.safetensors", {"a": F32 | {"dtype": "F33"}}))
    assert "ownload" not in str(caught.value)
