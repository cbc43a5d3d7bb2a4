"""Reads of a file: any bytes, on any thread, as long as nobody writes to it; and its closing."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from files import POSIX, PREADV, memory, read, write
from weightstream.streaming import Checkpoint, CheckpointChangedError, CheckpointError, CheckpointFile

# -- reads -----------------------------------------------------------------------------------------------------------


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


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def _touch(path: Path) -> None:
    stamp = path.stat().st_mtime_ns + 1_000_000_000
    os.utime(path, ns=(stamp, stamp))


def _write_same(path: Path) -> None:
    path.write_bytes(path.read_bytes())
    _touch(path)


def _write_other(path: Path) -> None:
    """Another number at the end of one of its tensors."""
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    _touch(path)


@POSIX
@pytest.mark.parametrize("change", [_truncate, _append, _write_other])
def test_a_file_that_is_written_to_is_read_no_more(path: Path, reads: str, change: Callable[[Path], None]) -> None:
    checkpoint = Checkpoint.open(path)
    place = checkpoint.locate(checkpoint.state_dict()["b.weight"])
    checkpoint.check_unchanged()
    change(path)
    with pytest.raises(CheckpointChangedError, match=r"model\.safetensors: was changed while it was in use"):
        read(place)
    with pytest.raises(CheckpointChangedError):
        checkpoint.check_unchanged()


@POSIX
@pytest.mark.parametrize("change", [_touch, _write_same])
def test_a_file_with_another_time_and_the_same_contents_is_read_on(
    path: Path, reads: str, change: Callable[[Path], None]
) -> None:
    file = CheckpointFile(path)
    views = file.views()
    for touches in (1, 2):
        change(path)
        file.check_unchanged()
        assert read(file.locate(views["b.weight"])) == memory(views["b.weight"])
        assert file.touches == touches
    _write_other(path)
    with pytest.raises(CheckpointChangedError):
        read(file.locate(views["b.weight"]))
    with pytest.raises(CheckpointChangedError):
        file.check_unchanged()


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


# -- advice and closing ----------------------------------------------------------------------------------------------


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


def test_advice_is_harmless_also_to_a_closed_file(path: Path) -> None:
    file = CheckpointFile(path)
    for _ in range(2):
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
