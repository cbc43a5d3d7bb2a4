"""The offline bundle: its parts stay small, and come back as they were; what goes into them needs the network."""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def bundle(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    spec = importlib.util.spec_from_file_location("weightstream_bundle", TOOLS / "bundle.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unpack(folder: Path, target: Path) -> subprocess.CompletedProcess[str]:
    shutil.copy(TOOLS / "unpack.py", folder)
    return subprocess.run(
        [sys.executable, str(folder / "unpack.py"), str(target)], capture_output=True, text=True, check=False
    )


def test_large_parts_are_cut_and_come_back_whole(
    bundle: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "PART_BYTES", 30_000)
    tree, folder = tmp_path / "tree", tmp_path / "bundle"
    folder.mkdir()
    for index in range(12):
        path = tree / "ComfyUI" / f"package{index % 3}" / f"file{index}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(10_000))
    bundle.write_manifest(tree, "engine", f"{sys.version_info[0]}.{sys.version_info[1]}", [])
    files = sorted(path for path in tree.rglob("*") if path.is_file())
    parts = bundle.pack(tree, files, folder / "weightstream-engine.tar.xz")
    assert len(parts) >= 4
    assert all(part.stat().st_size <= 30_000 for part in parts)
    result = unpack(folder, tmp_path / "target")
    assert result.returncode == 0, result.stderr
    assert "COMFYUI_PATH" in result.stdout
    for path in files:
        assert (tmp_path / "target" / path.relative_to(tree)).read_bytes() == path.read_bytes()


def test_one_file_larger_than_a_part_is_an_error(
    bundle: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "PART_BYTES", 1000)
    path = tmp_path / "large.bin"
    path.write_bytes(os.urandom(5000))
    with pytest.raises(bundle.BundleError, match=r"large\.bin alone"):
        bundle.pack(tmp_path, [path], tmp_path / "weightstream-engine.tar.xz")


@pytest.mark.parametrize("name", ["../outside.py", "/outside.py"])
def test_a_part_cannot_write_outside(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    with tarfile.open(folder / "weightstream-engine.tar.xz", "w:xz") as tar:
        member = tarfile.TarInfo(name)
        member.size = 3
        tar.addfile(member, io.BytesIO(b"bad"))
    result = unpack(folder, tmp_path / "target")
    assert result.returncode != 0
    assert "does not belong in a part" in result.stderr
    assert not (tmp_path / "outside.py").exists()


def test_every_requirement_of_the_host_is_in_one_part(bundle: ModuleType) -> None:
    lines = bundle.requirements(Path(os.environ["COMFYUI_PATH"]))
    parts = bundle.split_requirements(lines)
    assert sorted(line for part in parts.values() for line in part) == sorted(lines)
    engine = {bundle.normalize(line.split("=")[0].split(">")[0]) for line in parts["engine"]}
    assert {"comfy-aimdo", "comfy-kitchen", "torchsde"} <= engine
    assert not {"av", "alembic"} & engine
