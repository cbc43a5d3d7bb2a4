from __future__ import annotations

from pathlib import Path

from weightstream.streaming.machine.host_memory import HostMemory, group_memory


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_the_tightest_limit_counts_and_the_file_cache_is_free(tmp_path: Path) -> None:
    (tmp_path / "self").write_text("0::/service/job\n")
    stat = "anon 5\nactive_file 200\ninactive_file 100\nfile 999"
    write(tmp_path / "cg/service/job", memory__max="max", memory__current="700", memory__stat=stat)
    write(tmp_path / "cg/service", memory__max="1000", memory__current="900", memory__stat=stat)
    write(tmp_path / "cg", memory__max="5000", memory__current="4990", memory__stat="active_file 0")
    assert group_memory(tmp_path / "cg", tmp_path / "self") == HostMemory(1000, 10)


def test_version_1_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "self").write_text("5:cpu,cpuacct:/a\n4:memory:/docker/x\n")
    stat = "active_file 1\ntotal_active_file 20\ntotal_inactive_file 30"
    write(tmp_path / "cg/memory", memory__limit_in_bytes="1000", memory__usage_in_bytes="400", memory__stat=stat)
    assert group_memory(tmp_path / "cg", tmp_path / "self") == HostMemory(1000, 650)


def test_no_limit_and_no_groups_are_no_memory(tmp_path: Path) -> None:
    assert group_memory(tmp_path / "cg", tmp_path / "self") is None
    (tmp_path / "self").write_text("4:memory:/\n")
    write(tmp_path / "cg/memory", memory__limit_in_bytes=str(2**63 - 4096), memory__usage_in_bytes="1")
    assert group_memory(tmp_path / "cg", tmp_path / "self") is None
