"""A file is opened and mapped, and a tensor of it is located in it."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from files import POSIX, memory, read, write
from safetensors.torch import save_file
from weightstream.streaming import CheckpointError, CheckpointFile, StreamingError
from weightstream.streaming.files import checkpoint_file

# -- opening ---------------------------------------------------------------------------------------------------------


def test_a_file_has_the_tensors_that_were_saved(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    file = CheckpointFile(path)
    assert file.path == str(path)
    assert file.nbytes == path.stat().st_size
    assert file.metadata == {"format": "pt", "note": "é"}
    views = file.views()
    assert views.keys() == file.entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert views[name].dtype == file.entries[name].dtype == tensor.dtype
        assert views[name].shape == file.entries[name].shape == tensor.shape
        assert torch.equal(views[name].double(), tensor.double())


def test_tensors_come_in_the_order_of_the_file(path: Path) -> None:
    begins = [entry.begin for entry in CheckpointFile(path).entries.values()]
    assert begins == sorted(begins)


def test_views_are_neither_of_inference_mode_nor_of_the_default_device(path: Path) -> None:
    with torch.inference_mode(), torch.device("meta"):
        views = CheckpointFile(path).views()
    for view in views.values():
        assert not view.is_inference()
        assert view.device.type == "cpu"


def test_what_is_written_to_a_view_does_not_reach_the_file(path: Path) -> None:
    before = path.read_bytes()
    file = CheckpointFile(path)
    file.views()["b.weight"].zero_()
    assert path.read_bytes() == before
    file.check_unchanged()


def test_a_read_only_mapping_as_on_windows_gives_the_same_views(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    save_file(tensors, path)
    monkeypatch.setattr(checkpoint_file, "_NO_RESERVE", 0)
    monkeypatch.setattr(checkpoint_file, "_ACCESS", mmap.ACCESS_READ)
    file = CheckpointFile(path)
    views = file.views()
    assert all(torch.equal(views[name], tensor) for name, tensor in tensors.items())
    assert file.locate(views["b"]).nbytes == 8


def test_a_file_without_tensors_is_one(tmp_path: Path) -> None:
    file = CheckpointFile(write(tmp_path / "none.safetensors", {}, b""))
    assert file.views() == {}
    assert file.locate(torch.zeros(3)) is None


def test_data_need_not_be_aligned(tmp_path: Path) -> None:
    header = {
        "odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "wide": {"dtype": "F64", "shape": [1], "data_offsets": [3, 11]},
    }
    data = b"abc" + torch.tensor([1.25], dtype=torch.float64).numpy().tobytes()
    file = CheckpointFile(write(tmp_path / "odd.safetensors", header, data))
    views = file.views()
    assert views["wide"].item() == 1.25
    assert read(file.locate(views["wide"])) == data[3:]


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_file_larger_than_memory_and_swap_can_be_opened(tmp_path: Path) -> None:
    meminfo = dict(line.split()[:2] for line in Path("/proc/meminfo").read_text().splitlines())
    nbytes = 2 * 1024 * (int(meminfo["MemTotal:"]) + int(meminfo["SwapTotal:"]))
    header = {"a": {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}}
    path = write(tmp_path / "large.safetensors", header, b"\5")
    try:
        os.truncate(path, path.stat().st_size - 1 + nbytes)
    except OSError:
        pytest.skip("no sparse file of this size here")
    view = CheckpointFile(path).views()["a"]
    assert (view[0], view[-1]) == (5, 0)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.safetensors: cannot be opened \(No such file") as caught:
        CheckpointFile(tmp_path / "none.safetensors")
    assert isinstance(caught.value, StreamingError)
    assert isinstance(caught.value, ValueError)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be opened"):
        CheckpointFile(tmp_path)


@POSIX
def test_a_device_is_no_regular_file() -> None:
    with pytest.raises(CheckpointError, match="not a regular file"):
        CheckpointFile("/dev/null")


# -- where a tensor lies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part",
    [
        lambda weight: weight,
        lambda weight: weight[2:5],
        lambda weight: weight.chunk(3)[1],
        lambda weight: weight[4],
        lambda weight: weight[3, 2],
        lambda weight: weight.t(),
        lambda weight: weight.t()[:, 1:3],
        lambda weight: weight[1:2].t(),
        lambda weight: weight.view(2, 3, 4).permute(1, 2, 0)[..., 1],
        lambda weight: weight.view(2, 3, 4).permute(2, 0, 1),
        lambda weight: weight.view(torch.uint8),
        lambda weight: torch.nn.Parameter(weight),
        lambda weight: weight.detach().flatten(),
        lambda weight: weight[None, :, None],
    ],
)
def test_what_fills_its_memory_is_located(path: Path, part: Callable[[torch.Tensor], torch.Tensor]) -> None:
    file = CheckpointFile(path)
    tensor = part(file.views()["b.weight"])
    place = file.locate(tensor)
    assert place is not None
    assert place.nbytes == tensor.numel() * tensor.element_size()
    assert read(place) == memory(tensor.detach())


@pytest.mark.parametrize(
    "part",
    [
        lambda weight: weight[:, 1:3],
        lambda weight: weight[::2],
        lambda weight: weight[:, 0],
        lambda weight: weight[:1].expand(6, 4),
        lambda weight: weight.t()[::2],
        lambda weight: weight.view(-1).unfold(0, 4, 2),
        lambda weight: weight[:0],
        lambda weight: weight.clone(),
        lambda weight: weight.to("meta"),
        lambda weight: weight.to_sparse(),
        lambda weight: torch._neg_view(weight),
        lambda weight: torch.view_as_complex(weight.view(6, 2, 2)).conj(),
    ],
)
def test_what_is_elsewhere_or_leaves_gaps_is_not(path: Path, part: Callable[[torch.Tensor], torch.Tensor]) -> None:
    file = CheckpointFile(path)
    assert file.locate(part(file.views()["b.weight"])) is None


def test_the_header_is_no_tensors_memory(path: Path) -> None:
    file = CheckpointFile(path)
    first = next(iter(file.entries.values()))
    file.views()
    whole = torch.frombuffer(file._mapping, dtype=torch.uint8)
    assert file.locate(whole) is None
    assert file.locate(whole[first.begin - 1 : first.begin + 1]) is None
    assert file.locate(whole[first.begin :]) is not None


def test_another_files_tensor_is_not_located(path: Path) -> None:
    one, two = CheckpointFile(path), CheckpointFile(path)
    view = one.views()["b.weight"]
    assert two.locate(view) is None
    two.views()
    assert two.locate(view) is None
    assert one.locate(view) is not None


def test_a_slice_is_read_in_parts(path: Path) -> None:
    file = CheckpointFile(path)
    view = file.views()["b.weight"]
    place = file.locate(view)
    assert place is not None
    target = bytearray(8)
    place.read_into(memoryview(target), 16)
    assert target == memory(view)[16:24]
    for start in (-1, place.nbytes - 7):
        with pytest.raises(ValueError, match="of a slice of 96 bytes"):
            place.read_into(memoryview(target), start)
