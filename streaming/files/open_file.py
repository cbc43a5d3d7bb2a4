"""A file that is open, for reads at any offset on any thread.

[Note: what others may do with an open file]
On POSIX systems others may do anything: an open descriptor goes on reading the file that was opened. On Windows the
program that opens a file states whether others may rename or delete it meanwhile, and Python's own functions forbid it.
We allow it, so a file may be renamed, or moved on its disk, and another one may take its name. While it is mapped,
Windows itself refuses to delete it, to truncate it, or to replace it by another file.
"""

from __future__ import annotations

import os
import threading
from io import FileIO

_WINDOWS = os.name == "nt"
# Windows' flags that let others read, write, and rename or delete an open file.
_SHARE_ALL = 0x1 | 0x2 | 0x4
_ORDINARY_FILE = 0x80
# Handles that are kept for the next reads of a file, beside the one that is always open.
SPARE_HANDLES = 3


def open_file(path: str) -> OpenFile:
    """Open the file at ``path`` for reads at any offset, in the way that this system offers."""
    return OpenFile(path) if hasattr(os, "preadv") else OpenFileInTurns(path)


class OpenFile:
    """A file whose system can read at an offset."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._file = _open(path)

    def stat(self) -> os.stat_result:
        return os.fstat(self._file.fileno())

    def fileno(self) -> int:
        return self._file.fileno()

    def read(self, target: memoryview, offset: int) -> int:
        return os.preadv(self._file.fileno(), [target], offset)

    def close(self) -> None:
        self._file.close()


class OpenFileInTurns(OpenFile):
    """A file whose system reads at the position of a handle (Windows), so that each handle serves one thread at a time.

    Threads that read at the same time get handles of their own. If no other handle can be opened, because the file has
    another name now, they take turns.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._turn = threading.Lock()
        self._files: list[FileIO] = []

    def read(self, target: memoryview, offset: int) -> int:
        if not self._turn.acquire(blocking=False):
            if (handle := self._take()) is not None:
                try:
                    return _read_at(handle, target, offset)
                finally:
                    self._put_back(handle)
            self._turn.acquire()
        try:
            return _read_at(self._file, target, offset)
        finally:
            self._turn.release()

    def _take(self) -> FileIO | None:
        """Return a handle that no thread reads through; None if there is none and none can be opened."""
        try:
            return self._files.pop()
        except IndexError:
            return self._open_again()

    def _open_again(self) -> FileIO | None:
        ours = self.stat()
        try:
            handle = _open(self._path)
        except OSError:
            return None
        if os.path.samestat(os.fstat(handle.fileno()), ours):
            return handle
        handle.close()  # Another file has the name now.
        return None

    def _put_back(self, handle: FileIO) -> None:
        self._files.append(handle)
        while self._files and (self._file.closed or len(self._files) > SPARE_HANDLES):
            self._close_spare()

    def _close_spare(self) -> None:
        try:
            self._files.pop().close()
        except IndexError:
            """Another thread was faster."""

    def close(self) -> None:
        super().close()
        while self._files:
            self._close_spare()


def _open(path: str) -> FileIO:
    return FileIO(path, "rb", opener=_share) if _WINDOWS else FileIO(path, "rb")


def _share(path: str, _flags: int) -> int:
    """Open a file on Windows as [Note: what others may do with an open file] describes."""
    import _winapi  # Other systems have no such modules.
    import msvcrt

    handle = _winapi.CreateFile(
        path, _winapi.GENERIC_READ, _SHARE_ALL, _winapi.NULL, _winapi.OPEN_EXISTING, _ORDINARY_FILE, _winapi.NULL
    )
    return msvcrt.open_osfhandle(handle, os.O_RDONLY)


def _read_at(handle: FileIO, target: memoryview, offset: int) -> int:
    handle.seek(offset)
    return handle.readinto(target)
