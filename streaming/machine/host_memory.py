"""How much memory this process may use, where a container or a service manager limits it (Linux control groups)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# A group without limit says so with a number near 2**63 in version 1 and with "max" in version 2.
UNLIMITED = 1 << 60


class HostMemory(NamedTuple):
    """Bytes of host memory.

    Attributes:
        total: the limit.
        available: what may still be allocated; the system's file cache counts as free.
    """

    total: int
    available: int


def group_memory(
    groups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> HostMemory | None:
    """Return the tightest limits that this process's control group and those around it set; None without limit."""
    found = [memory for folder in _folders(groups, membership) if (memory := _read(folder)) is not None]
    if not found:
        return None
    return HostMemory(min(memory.total for memory in found), min(memory.available for memory in found))


def _folders(groups: Path, membership: Path) -> Iterator[Path]:
    """Folders of the memory controller, from the process's own group outwards."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0":
            root = groups
        elif "memory" in controllers.split(","):
            root = groups / "memory"
        else:
            continue
        # Inside a container the path is often the one that the group has outside, and only the root exists.
        folder = root / path.lstrip("/")
        yield folder
        yield from (parent for parent in folder.parents if parent.is_relative_to(root))


def _read(folder: Path) -> HostMemory | None:
    limit = _number(folder / "memory.max", folder / "memory.limit_in_bytes")
    used = _number(folder / "memory.current", folder / "memory.usage_in_bytes")
    if limit is None or used is None or limit >= UNLIMITED:
        return None
    return HostMemory(limit, max(0, limit - used + _file_cache(folder / "memory.stat")))


def _number(*files: Path) -> int | None:
    for file in files:
        try:
            text = file.read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdigit() else None
    return None


def _file_cache(stat: Path) -> int:
    """Bytes of file cache, which the system frees on demand; in version 1 "total_" marks sums with groups below."""
    try:
        values = dict(line.split()[:2] for line in stat.read_text().splitlines())
    except OSError:
        return 0
    names = ("active_file", "inactive_file")
    return sum(int(values.get(f"total_{name}", values.get(name, 0))) for name in names)
