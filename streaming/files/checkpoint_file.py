"""One safetensors file, open: where each tensor lies, and reads that can fail but not kill.

[Note: reads, not mappings] A tensor of a checkpoint is a view of a private mapping, so that the model has its shapes,
dtypes and values; but bytes are moved with positioned reads through one open descriptor. A mapped page whose file was
truncated, or whose disk fails, ends the process with a signal; a read raises an error that names the tensor. The
descriptor stays with the file that was opened, also when that is deleted or another takes its place. After each read,
the file's size and modification time are compared with those at opening; if only the time differs, the contents are
compared (fingerprint.py, Note: touched is not changed).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import stat
import sys
import threading
import warnings
import weakref
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CheckpointChangedError, CheckpointError
from .fingerprint import fingerprint
from .header import MAX_HEADER_BYTES, Entry, parse_header
from .open_file import open_file

# Some systems read no more at once; the next read continues.
_MAX_READ = 1 << 30
# For a copy-on-write mapping Windows would reserve as much of its page file as the file is large.
_ACCESS = mmap.ACCESS_READ if os.name == "nt" else mmap.ACCESS_COPY
# Linux refuses a private mapping larger than memory and swap, unless told to reserve nothing for its copies. Python
# knows the flag's name since 3.13.
_LINUX_PC = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if _LINUX_PC else 0)


class CheckpointFile:
    """One safetensors file, open.

    Attributes:
        nbytes: size of the file.
        metadata: what the header carries beside the tensors, mostly texts.
        entries: the tensors by name, in the order of the file.
        fingerprint: equal for files with equal contents, and very seldom for others.
        touches: how often its modification time was found changed, and its contents not.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fsdecode(path)
        try:
            self._source = open_file(self.path)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: cannot be opened ({_reason(error)})") from error
        self._close = weakref.finalize(self, self._source.close)
        self._lock = threading.Lock()
        self._comparing = threading.Lock()
        self.touches = 0
        self._mapping: mmap.mmap | None = None
        self._address = 0
        self.metadata: dict[str, Any] = {}
        self.entries: dict[str, Entry] = {}
        try:
            self._stat = self._source.stat()
            self.nbytes = self._stat.st_size
            header = self._read_header()
            self.metadata, self.entries = parse_header(self.path, header, self.nbytes)
            self._header_bytes = 8 + len(header)
            self.fingerprint = self._take_fingerprint()
        except BaseException:
            self.close()
            raise

    def _read_header(self) -> bytes:
        if not stat.S_ISREG(self._stat.st_mode):
            raise CheckpointError(f"{self.path}: is not a regular file")
        if self.nbytes < 8:
            raise CheckpointError(f"{self.path}: {self.nbytes} bytes, too short for a header. Download it again.")
        prefix = bytearray(8)
        self.read_into(memoryview(prefix), 0)
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{self.path}: the header says it is {length} bytes long, more than the {MAX_HEADER_BYTES} allowed. "
                "The file is damaged or is no safetensors file; download it again."
            )
        if 8 + length > self.nbytes:
            raise CheckpointError(
                f"{self.path}: {self.nbytes} bytes found where the header alone takes {8 + length}. "
                "It is truncated; download it again."
            )
        raw = bytearray(length)
        self.read_into(memoryview(raw), 8)
        return bytes(raw)

    def views(self) -> dict[str, torch.Tensor]:
        """Return all tensors by name, as views of a private mapping.

        What is written to them stays in memory. Of such writes ``locate`` sees only those that torch counts.
        """
        mapping = self._map()
        with torch.inference_mode(False):
            return {name: _view(mapping, entry) for name, entry in self.entries.items()}

    def _map(self) -> mmap.mmap:
        with self._lock:
            if self._mapping is None:
                self.check_unchanged()
                try:
                    mapping = _map_private(self._source.fileno(), self.nbytes)
                except (OSError, ValueError) as error:
                    raise CheckpointError(f"{self.path}: cannot be mapped ({_reason(error)})") from error
                self._address = _from_buffer(mapping, torch.uint8).data_ptr()
                self._mapping = mapping
            return self._mapping

    def locate(self, tensor: torch.Tensor) -> FileSlice | None:
        """Return where in the file the bytes of ``tensor`` are, in the order of its memory; None if they are not there.

        The bytes of a tensor that was written to are not there: those of the file are older.
        """
        if tensor.is_inference() or tensor._version > 0:
            return None
        if self._mapping is None or tensor.device.type != "cpu" or tensor.layout is not torch.strided:
            return None
        if tensor.numel() == 0 or tensor.is_conj() or tensor.is_neg() or not _is_dense(tensor):
            return None
        offset = tensor.data_ptr() - self._address
        nbytes = tensor.numel() * tensor.element_size()
        first = next(iter(self.entries.values())).begin if self.entries else self.nbytes
        if offset < first or offset + nbytes > self.nbytes:
            return None
        return FileSlice(self, offset, nbytes)

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill ``target`` with the file's bytes from ``offset`` on. See [Note: reads, not mappings].

        Raises:
            CheckpointError: they cannot be read, or the file was changed (``CheckpointChangedError``).
        """
        if target.nbytes == 0:
            return
        target = target.cast("B")
        done = 0
        try:
            while done < len(target):
                count = self._source.read(target[done : done + _MAX_READ], offset + done)
                if count == 0:
                    break
                done += count
        except (OSError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            self.check_unchanged()
            raise CheckpointError(
                f"{self.path}: cannot read {self._what(offset, len(target))} ({_reason(error)}). "
                "Check the disk, or copy the file to another one."
            ) from error
        # Checked after the read: this sees changes made before it and meanwhile, and that the file was closed, after
        # which the descriptor may belong to another file.
        self.check_unchanged()
        if done < len(target):
            raise CheckpointError(
                f"{self.path}: {done} of {len(target)} bytes read of {self._what(offset, len(target))}: "
                f"the file ends at byte {offset + done}. Download it again."
            )

    def _what(self, offset: int, nbytes: int) -> str:
        """Describe these bytes for an error message."""
        end = offset + nbytes
        names = [entry.name for entry in self.entries.values() if max(entry.begin, offset) < min(entry.end, end)]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f"{nbytes} bytes at byte {offset} (tensor {', '.join(names[:3]) or 'none: header'}{more})"

    def drop_cached(self, offset: int, nbytes: int) -> None:
        """Have the system drop the whole pages inside this range from its file cache."""
        begin = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        self._advise("POSIX_FADV_DONTNEED", begin, (offset + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - begin)

    def _advise(self, advice: str, offset: int, nbytes: int) -> None:
        # A length of 0 would mean up to the end of the file. A refused advice or a closed file is no error.
        if nbytes > 0 and hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError, ValueError):
                os.posix_fadvise(self._source.fileno(), offset, nbytes, getattr(os, advice))

    def check_unchanged(self) -> None:
        """Raise ``CheckpointChangedError`` if the file has other contents than when it was opened."""
        if self._seems_unchanged(self._stat_now()):
            return
        with self._comparing:  # One thread compares the contents, for all that have noticed.
            now = self._stat_now()
            if self._seems_unchanged(now):
                return
            if now.st_size != self.nbytes or self._take_fingerprint() != self.fingerprint:
                raise CheckpointChangedError(
                    f"{self.path}: was changed while it was in use ({self.nbytes} bytes at opening, {now.st_size} "
                    "now). Load the model again."
                )
            self._stat = now
            self.touches += 1

    def identity(self) -> bytes:
        """Equal for two objects only if they have opened the same file of this machine, in the same state.

        The fingerprint alone would miss a few numbers (fingerprint.py, Note: touched is not changed), so the system's
        own signs of a change go in too: a file that was touched has another identity for whoever opens it afterwards.
        """
        now = self._stat
        signs = (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
        return self.fingerprint + repr(signs).encode()

    def _stat_now(self) -> os.stat_result:
        try:
            return self._source.stat()
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: is not open any more ({_reason(error)})") from error

    def _seems_unchanged(self, now: os.stat_result) -> bool:
        return (now.st_size, now.st_mtime_ns) == (self._stat.st_size, self._stat.st_mtime_ns)

    def _take_fingerprint(self) -> bytes:
        return fingerprint(self._read_some, self.nbytes, self._header_bytes, self.entries.values())

    def _read_some(self, offset: int, nbytes: int) -> bytes:
        """Return these bytes, or fewer at the file's end, without checking whether the file was changed."""
        target = bytearray(nbytes)
        try:
            return bytes(target[: self._source.read(memoryview(target), offset)])
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.path}: cannot read {self._what(offset, nbytes)} ({_reason(error)}). "
                "Check the disk, or copy the file to another one."
            ) from error

    def close(self) -> None:
        """Close the file; the mapping lives as long as there are views of it. A repeated call does nothing."""
        self._mapping = None
        self._close()


@dataclass(frozen=True)
class FileSlice:
    """Bytes of an open file."""

    file: CheckpointFile
    offset: int
    nbytes: int

    def read_into(self, target: memoryview, start: int = 0) -> None:
        """Fill ``target`` from byte ``start`` of the slice."""
        if not 0 <= start <= start + target.nbytes <= self.nbytes:
            raise ValueError(f"bytes {start} to {start + target.nbytes} of a slice of {self.nbytes} bytes")
        self.file.read_into(target, self.offset + start)

    def identity(self) -> bytes:
        """Equal for two slices only if they are the same bytes of the same file (:meth:`CheckpointFile.identity`)."""
        return repr((self.file.identity(), self.offset, self.nbytes)).encode()

    @property
    def writable(self) -> bool:
        """Whether the mapping of these bytes can be written to, privately to this process."""
        return bool(_NO_RESERVE) or _ACCESS != mmap.ACCESS_READ

    def forget(self, start: int, nbytes: int) -> None:
        """Have the system drop these bytes of the slice from its file cache."""
        self.file.drop_cached(self.offset + start, nbytes)


def _map_private(descriptor: int, nbytes: int) -> mmap.mmap:
    """Map the whole file privately, where possible copy-on-write and with no memory reserved for the copies."""
    if _NO_RESERVE:
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        return mmap.mmap(descriptor, nbytes, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=protection)
    return mmap.mmap(descriptor, nbytes, access=_ACCESS)


def _from_buffer(mapping: mmap.mmap, dtype: torch.dtype, count: int = -1, offset: int = 0) -> torch.Tensor:
    with warnings.catch_warnings():
        # Nobody writes to what was loaded; ComfyUI's own mapping on Windows is read-only too.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapping, dtype=dtype, count=count, offset=offset)


def _view(mapping: mmap.mmap, entry: Entry) -> torch.Tensor:
    if entry.begin == entry.end:
        return torch.empty(0, dtype=entry.dtype, device="cpu").reshape(entry.shape)
    count = (entry.end - entry.begin) // entry.dtype.itemsize
    return _from_buffer(mapping, entry.dtype, count, entry.begin).reshape(entry.shape)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill their memory, each place once, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
