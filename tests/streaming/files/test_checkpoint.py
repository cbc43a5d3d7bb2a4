"""Models of one file, or of several."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from files import POSIX, memory, read
from safetensors.torch import save_file
from weightstream.streaming import Checkpoint, CheckpointError

NAMES = [f"big-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder with a model of three files, without an index."""
    for number, name in enumerate(NAMES):
        metadata = {"format": "pt", "part": str(number)} | ({"last": "yes"} if number == 2 else {})
        save_file({f"layer.{number}": torch.full((number + 1, 4), number)}, tmp_path / name, metadata=metadata)
    return tmp_path


def write_index(folder: Path, name: str = "big.safetensors.index.json", **changes: str) -> Path:
    weight_map = {f"layer.{number}": name for number, name in enumerate(NAMES)}
    index = folder / name
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map | changes}))
    return index


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_any_shard_opens_the_whole_model(shards: Path, name: str, indexed: bool) -> None:
    if indexed:
        write_index(shards)
    checkpoint = Checkpoint.open(shards / name)
    assert checkpoint.path == str(shards / name)
    assert [Path(file.path).name for file in checkpoint.files] == NAMES
    assert checkpoint.nbytes == sum((shards / name).stat().st_size for name in NAMES)
    assert checkpoint.metadata == {"format": "pt", "part": "0", "last": "yes"}
    state = checkpoint.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "layer.0": (1, 4),
        "layer.1": (2, 4),
        "layer.2": (3, 4),
    }
    for number, tensor in enumerate(state.values()):
        place = checkpoint.locate(tensor)
        assert place is not None
        assert place.file is checkpoint.files[number]
        assert read(place) == memory(tensor)
    assert checkpoint.locate(torch.zeros(4)) is None
    checkpoint.check_unchanged()
    checkpoint.close()
    with pytest.raises(CheckpointError, match="not open"):
        checkpoint.check_unchanged()


def test_a_single_file_is_a_checkpoint(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    checkpoint = Checkpoint.open(str(path))
    assert len(checkpoint.files) == 1
    assert checkpoint.state_dict().keys() == tensors.keys()


def test_an_index_names_the_files_whatever_they_are_called(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "first")
    save_file({"b": torch.zeros(2)}, tmp_path / "second.safetensors")
    index = tmp_path / "x.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "first", "b": "second.safetensors"}}))
    assert Checkpoint.open(index).state_dict().keys() == {"a", "b"}


@pytest.mark.parametrize("indexed", [False, True])
def test_a_missing_shard_is_named(shards: Path, indexed: bool) -> None:
    if indexed:
        write_index(shards)
    (shards / NAMES[1]).unlink()
    with pytest.raises(CheckpointError, match=f"the model has 3 files, and {NAMES[1]} is missing. Download it"):
        Checkpoint.open(shards / NAMES[0])


def test_a_broken_shard_is_named(shards: Path) -> None:
    os.truncate(shards / NAMES[1], 50)
    with pytest.raises(CheckpointError, match=f"{NAMES[1]}: 50 bytes found"):
        Checkpoint.open(shards / NAMES[0])


def test_a_shard_that_is_not_in_the_index_is_refused(shards: Path) -> None:
    index = write_index(shards)
    index.write_text(json.dumps({"weight_map": {"layer.0": NAMES[0]}}))
    with pytest.raises(CheckpointError, match=f"{NAMES[2]}: is not one of the files of its model, {NAMES[0]}"):
        Checkpoint.open(shards / NAMES[2])


@pytest.mark.parametrize("name", ["big-00004-of-00003.safetensors", "big-00000-of-00000.safetensors"])
def test_a_number_beyond_the_count_is_refused(shards: Path, name: str) -> None:
    (shards / NAMES[0]).rename(shards / name)
    with pytest.raises(CheckpointError, match="is not one of the files"):
        Checkpoint.open(shards / name)


def test_a_tensor_that_no_file_has_is_named(shards: Path) -> None:
    index = write_index(shards, more=NAMES[0])
    with pytest.raises(CheckpointError, match=f"tensor 'more' is in {NAMES[0]}, but it is in no file"):
        Checkpoint.open(index)


def test_a_tensor_in_another_file_than_the_index_says_is_named(shards: Path) -> None:
    index = write_index(shards, **{"layer.0": NAMES[2], "layer.1": NAMES[0]})
    save_file({"layer.1": torch.zeros(1)}, shards / NAMES[1])
    with pytest.raises(CheckpointError, match=f"tensor 'layer.0' is in {NAMES[2]}, but it is in {NAMES[0]}"):
        Checkpoint.open(index)


@pytest.mark.parametrize("indexed", [False, True])
def test_a_name_in_two_files_is_refused(shards: Path, indexed: bool) -> None:
    if indexed:
        write_index(shards)
    save_file({"layer.0": torch.zeros(1), "layer.2": torch.zeros(1)}, shards / NAMES[2])
    with pytest.raises(CheckpointError, match=f"tensor 'layer.0' is in two files, .*{NAMES[0]} and .*{NAMES[2]}"):
        Checkpoint.open(shards / NAMES[0])


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a\\b", "..", ".", "", "c:x", "a\0b"])
def test_an_index_reaches_no_other_folder(shards: Path, name: str) -> None:
    index = write_index(shards, **{"layer.0": name})
    for path in (index, shards / NAMES[0]):
        with pytest.raises(CheckpointError, match=r"has tensor 'layer\.0' in .*, which is no name of a file beside it"):
            Checkpoint.open(path)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map":[]}', '{"weight_map":{"a":1}}', '{"weight_map":null}', "[" * 100_000, "\udcff"],
)
def test_a_broken_index_is_named(shards: Path, text: str) -> None:
    index = write_index(shards)
    index.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"big\.safetensors\.index\.json: is no index of a model's files"):
        Checkpoint.open(shards / NAMES[0])


def test_a_missing_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no index of a model's files"):
        Checkpoint.open(tmp_path / "x.index.json")


@POSIX
def test_a_linked_shard_finds_the_others_beside_the_link(shards: Path, tmp_path: Path) -> None:
    """As download caches keep files: the names are links to files that are named by their contents."""
    links = tmp_path / "snapshot"
    links.mkdir()
    for number, name in enumerate(NAMES):
        (shards / name).rename(tmp_path / f"blob{number}")
        (links / name).symlink_to(tmp_path / f"blob{number}")
    assert len(Checkpoint.open(links / NAMES[1]).files) == 3


def test_an_empty_index_is_named(tmp_path: Path) -> None:
    index = tmp_path / "empty.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(CheckpointError, match=r"empty\.safetensors\.index\.json: is no index .*weight_map is empty"):
        Checkpoint.open(index)
