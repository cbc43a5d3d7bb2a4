from __future__ import annotations

import gc
import json
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from weightstream.streaming import (
    Checkpoint,
    CheckpointChangedError,
    CheckpointError,
    CheckpointFile,
    FileSlice,
    StreamingError,
    checkpoint_file,
)

POSIX = pytest.mark.skipif(os.name != "posix", reason="an open file cannot be replaced or deleted here")
PREADV = pytest.mark.skipif(not hasattr(os, "preadv"), reason="no positioned reads here")
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(path: Path, header: Any, data: bytes = bytes(8), length: int | None = None) -> Path:
    """A file with this header (text, or what becomes JSON), as it is."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "b.weight": torch.randn(6, 4, generator=generator),
        "a.weight": torch.randn(8, 3, 2, generator=generator).to(torch.bfloat16),
        "a.scale": torch.tensor(0.5),
        "a.empty": torch.empty(0, 5),
        "a.fp8": torch.randn(7, generator=generator).to(torch.float8_e4m3fn),
        "a.mask": torch.tensor([True, False, True]),
    }


@pytest.fixture
def path(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "note": "é"})
    return path


def read(place: FileSlice | None) -> bytes:
    assert place is not None
    target = bytearray(place.nbytes)
    place.read_into(memoryview(target))
    return bytes(target)


def memory(tensor: torch.Tensor) -> bytes:
    """The bytes of a dense tensor in the order of its memory."""
    flat = torch.as_strided(tensor, (tensor.numel(),), (1,), tensor.storage_offset())
    return bytes(flat.view(torch.uint8).numpy())


# Opening


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


# Faults of the file


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


# Where a tensor lies


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


# Reads


@pytest.fixture(params=["positioned", "handles"])
def reads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With positioned reads, and as where there are none."""
    if request.param == "handles":
        monkeypatch.delattr(os, "preadv", raising=False)
    elif not hasattr(os, "preadv"):
        pytest.skip("no positioned reads here")
    return request.param


def test_any_bytes_are_read_into_any_memory(path: Path, reads: str) -> None:
    raw = path.read_bytes()
    file = CheckpointFile(path)
    for offset, nbytes in [(0, 8), (5, 0), (17, 30), (0, len(raw)), (len(raw) - 1, 1), (len(raw), 0)]:
        target = bytearray(nbytes + 2)
        file.read_into(memoryview(target)[1:-1], offset)
        assert target == b"\0" + raw[offset : offset + nbytes] + b"\0"
    numbers = torch.empty(4)
    file.read_into(memoryview(numbers.numpy()), file.entries["b.weight"].begin)
    assert torch.equal(numbers, file.views()["b.weight"][0])


def test_many_threads_read_one_file(path: Path, reads: str) -> None:
    raw = path.read_bytes()
    file = CheckpointFile(path)
    wrong = []

    def work(seed: int) -> None:
        for number in range(200):
            offset = (seed * 31 + number * 7) % (len(raw) - 16)
            target = bytearray(16)
            file.read_into(memoryview(target), offset)
            if target != raw[offset : offset + 16]:
                wrong.append(offset)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    file.close()


def test_bytes_beyond_the_end_are_an_error(path: Path, reads: str) -> None:
    file = CheckpointFile(path)
    with pytest.raises(CheckpointError, match=rf"3 of 8 bytes read .* ends at byte {file.nbytes}\. Download"):
        file.read_into(memoryview(bytearray(8)), file.nbytes - 3)


@POSIX
@pytest.mark.parametrize("replace", [True, False])
def test_the_opened_file_is_read_also_when_replaced_or_deleted(path: Path, replace: bool) -> None:
    raw = path.read_bytes()
    file = CheckpointFile(path)
    if replace:
        other = path.with_suffix(".new")
        other.write_bytes(bytes(len(raw) + 5))
        os.replace(other, path)
    else:
        path.unlink()
    target = bytearray(len(raw))
    file.read_into(memoryview(target), 0)
    assert target == raw
    assert read(file.locate(file.views()["b.weight"])) == memory(file.views()["b.weight"])


@POSIX
def test_a_thread_never_reads_another_file_of_the_same_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "preadv", raising=False)
    raw = path.read_bytes()
    file = CheckpointFile(path)
    other = path.with_suffix(".new")
    other.write_bytes(raw)
    os.replace(other, path)
    caught: list[Exception] = []

    def work() -> None:
        for _ in range(2):
            try:
                file.read_into(memoryview(bytearray(8)), 0)
            except CheckpointChangedError as error:
                caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(caught) == 2
    file.close()


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def _rewrite(path: Path) -> None:
    raw = path.read_bytes()
    stamp = path.stat().st_mtime_ns
    path.write_bytes(raw)
    if path.stat().st_mtime_ns == stamp:  # the clock of a file system may be coarse
        os.utime(path, ns=(stamp + 1_000_000_000, stamp + 1_000_000_000))


@POSIX
@pytest.mark.parametrize("change", [_truncate, _append, _rewrite])
def test_a_file_that_is_written_to_is_read_no_more(path: Path, reads: str, change: Callable[[Path], None]) -> None:
    checkpoint = Checkpoint.open(path)
    place = checkpoint.locate(checkpoint.state_dict()["b.weight"])
    checkpoint.check_unchanged()
    change(path)
    with pytest.raises(CheckpointChangedError, match=r"model\.safetensors: was changed while it was in use"):
        read(place)
    with pytest.raises(CheckpointChangedError):
        checkpoint.check_unchanged()


@PREADV
def test_a_change_during_a_read_is_noticed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = CheckpointFile(path)
    real = os.preadv

    def preadv(*arguments: Any) -> int:
        count = real(*arguments)
        _truncate(path)
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(CheckpointChangedError):
        file.read_into(memoryview(bytearray(8)), 0)


@POSIX
def test_a_file_truncated_before_it_is_mapped_is_an_error(path: Path) -> None:
    file = CheckpointFile(path)
    _truncate(path)
    with pytest.raises(CheckpointChangedError):
        file.views()


@PREADV
def test_short_reads_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, targets, offset: real(fd, [targets[0][:3]], offset))
    raw = path.read_bytes()
    target = bytearray(len(raw))
    CheckpointFile(path).read_into(memoryview(target), 0)
    assert target == raw


@PREADV
def test_a_read_error_names_the_file_the_tensors_and_the_reason(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = CheckpointFile(path)
    entry = file.entries["b.weight"]
    real = os.preadv

    def preadv(descriptor: int, targets: list[memoryview], offset: int) -> int:
        if offset > entry.begin:
            raise OSError(5, "Input/output error")
        return real(descriptor, [targets[0][:10]], offset)

    monkeypatch.setattr(os, "preadv", preadv)
    message = r"model\.safetensors: cannot read 96 bytes at byte \d+ \(tensor b\.weight\) \(Input/output error\)"
    with pytest.raises(CheckpointError, match=message) as caught:
        file.read_into(memoryview(bytearray(96)), entry.begin)
    assert not isinstance(caught.value, CheckpointChangedError)
    with pytest.raises(CheckpointError, match=r"\(tensor [\w.]+, [\w.]+, [\w.]+ and 2 more\)"):
        file.read_into(memoryview(bytearray(file.nbytes)), 0)


@PREADV
def test_other_threads_run_during_a_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read from a pipe waits for its writer, which is a thread of this process."""
    file = CheckpointFile(path)
    source, sink = os.pipe()
    monkeypatch.setattr(os, "preadv", lambda _, targets, offset: os.readv(source, targets))
    writer = threading.Thread(target=lambda: (time.sleep(0.01), os.write(sink, b"12345678")))
    writer.start()
    target = bytearray(8)
    file.read_into(memoryview(target), 0)
    writer.join()
    os.close(source)
    os.close(sink)
    assert target == b"12345678"


# Advice and closing


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no advice here")
def test_only_whole_pages_are_dropped_and_never_the_rest_of_the_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    given: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *arguments: given.append(arguments))
    file = CheckpointFile(path)
    for offset, nbytes in [(1, 2 * page), (0, page), (page - 1, page), (page, 0), (3, page - 3), (3, 2 * page - 3)]:
        file.drop_cached(offset, nbytes)
    drop = os.POSIX_FADV_DONTNEED
    assert given == [(page, page, drop), (0, page, drop), (page, page, drop)]
    given.clear()
    file.will_need(5, 10)
    file.will_need(5, 0)
    assert given == [(5, 10, os.POSIX_FADV_WILLNEED)]


def test_advice_is_harmless_also_to_a_closed_file(path: Path) -> None:
    file = CheckpointFile(path)
    for _ in range(2):
        file.will_need(0, file.nbytes)
        file.drop_cached(0, file.nbytes)
        file.close()


def test_views_outlive_the_file(path: Path, tensors: dict[str, torch.Tensor], reads: str) -> None:
    file = CheckpointFile(path)
    views = file.views()
    place = file.locate(views["b.weight"])
    file.close()
    file.close()
    assert torch.equal(views["b.weight"], tensors["b.weight"])
    assert file.locate(views["b.weight"]) is None
    with pytest.raises(CheckpointError, match="is not open any more"):
        read(place)
    with pytest.raises(CheckpointError, match="is not open any more"):
        file.check_unchanged()
    with pytest.raises(CheckpointError, match="is not open any more"):
        file.views()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts descriptors where Linux lists them")
def test_forgotten_and_refused_files_leave_no_descriptor(path: Path, tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.safetensors", "[1]")
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    file = CheckpointFile(path)
    file.views()
    del file
    with pytest.raises(CheckpointError):
        CheckpointFile(bad)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


# Models of several files


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
