"""Files that are open: how many handles they take, and what others may do with them meanwhile."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from files import POSIX
from models import Stored
from weightstream.streaming.files import open_file as module
from weightstream.streaming.files.open_file import SPARE_HANDLES, OpenFileInTurns, open_file

HANDLES = Path("/proc/self/fd")
counted = pytest.mark.skipif(not HANDLES.is_dir(), reason="counts descriptors where Linux lists them")


def handles() -> int:
    gc.collect()
    return len(os.listdir(HANDLES))


@pytest.fixture
def in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, which has no positioned reads."""
    monkeypatch.delattr(os, "preadv", raising=False)


@pytest.fixture
def file(tmp_path: Path, in_turns: None) -> Iterator[OpenFileInTurns]:
    path = tmp_path / "numbers"
    path.write_bytes(bytes(range(256)) * 64)
    file = open_file(str(path))
    assert isinstance(file, OpenFileInTurns)
    yield file
    file.close()


def read_at_once(file: OpenFileInTurns, count: int, rounds: int = 100) -> None:
    """Read on so many new threads."""
    wrong: list[int] = []

    def work(offset: int) -> None:
        for number in range(rounds):
            target = bytearray(200)
            file.read(memoryview(target), at := (offset * 7 + number * 31) % 256)
            if target != (bytes(range(256)) * 2)[at : at + 200]:
                wrong.append(at)

    threads = [threading.Thread(target=work, args=[number]) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def read_while_one_reads(file: OpenFileInTurns) -> bytes:
    """What a thread reads while the file's own handle is another's."""
    target = bytearray(4)
    with file._turn:
        file.read(memoryview(target), 10)
    return bytes(target)


@pytest.mark.slow
@counted
def test_handles_are_as_many_as_threads_that_read_at_once_and_few_are_kept(file: OpenFileInTurns) -> None:
    before = handles()
    read_at_once(file, 1)
    assert handles() == before
    for _ in range(5):
        read_at_once(file, 12)
        assert handles() <= before + SPARE_HANDLES
    file.close()
    assert handles() == before - 1


@counted
def test_a_handle_that_comes_back_to_a_closed_file_is_closed(file: OpenFileInTurns) -> None:
    before = handles()
    handle = file._take()
    assert handle is not None
    file.close()
    file._put_back(handle)
    assert handles() == before - 1
    with pytest.raises(ValueError, match="closed"):
        file.read(memoryview(bytearray(4)), 0)
    assert handles() == before - 1


@POSIX
def test_where_the_name_is_another_files_threads_take_turns(file: OpenFileInTurns, tmp_path: Path) -> None:
    assert read_while_one_reads(file) == bytes([10, 11, 12, 13])
    path = tmp_path / "numbers"
    path.rename(tmp_path / "renamed")
    file._close_spare()
    assert file._take() is None
    read_at_once(file, 6)
    path.write_bytes(bytes(999))
    assert file._take() is None
    read_at_once(file, 6)


@pytest.mark.slow
@counted
@pytest.mark.parametrize("positioned", [True, False])
def test_handles_of_a_model_do_not_grow_and_go_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, positioned: bool
) -> None:
    if not positioned:
        monkeypatch.delattr(os, "preadv", raising=False)
    before = handles()
    stored = Stored(tmp_path, pin_memory=False)
    seen = []
    for _ in range(8):
        stored.streamer.load(stored.half)
        stored.check(2)
        stored.streamer.unload()
        seen.append(handles())
    assert max(seen) <= before + 2 + SPARE_HANDLES  # One for the mapping.
    stored.close()
    del stored
    assert handles() == before


def test_on_windows_others_may_rename_an_open_file(file: OpenFileInTurns, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for the two modules of Python that only Windows has."""
    asked: list[tuple[int, ...]] = []

    def create_file(path: str, access: int, share: int, security: int, creation: int, *rest: int) -> int:
        asked.append((access, share, creation))
        return os.open(path, os.O_RDONLY)

    constants = {"GENERIC_READ": 1 << 31, "OPEN_EXISTING": 3, "NULL": 0}
    monkeypatch.setitem(sys.modules, "_winapi", SimpleNamespace(CreateFile=create_file, **constants))
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(open_osfhandle=lambda handle, flags: handle))
    monkeypatch.setattr(module, "_WINDOWS", True)
    assert read_while_one_reads(file) == bytes([10, 11, 12, 13])
    read, write, delete = 1, 2, 4
    assert asked == [(constants["GENERIC_READ"], read | write | delete, constants["OPEN_EXISTING"])]
