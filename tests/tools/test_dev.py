"""dev.py, as a user on a fresh machine meets it; what needs the network is left to its own first run."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEV = ROOT / "dev.py"


@pytest.fixture
def dev() -> ModuleType:
    spec = importlib.util.spec_from_file_location("weightstream_dev", DEV)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(DEV), *arguments], env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_env_prints_json_and_nothing_else() -> None:
    result = run("env", WEIGHTSTREAM_PYTHON=sys.executable)
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert set(facts) == {"python", "comfyui", "comfyui_version"}
    assert Path(facts["comfyui"]) == Path(os.environ["COMFYUI_PATH"])
    assert facts["comfyui_version"].count(".") == 2


def test_the_tests_say_which_host_they_run_in() -> None:
    arguments = ("--collect-only", "-p", "no:cacheprovider", str(Path(__file__).with_name("test_hosts.py")))
    result = run("test", *arguments, WEIGHTSTREAM_PYTHON=sys.executable, PYTEST_ADDOPTS="")
    assert result.returncode == 0, result.stdout + result.stderr
    host = Path(os.environ["COMFYUI_PATH"])
    version = re.search(r'__version__ = "(.+)"', (host / "comfyui_version.py").read_text("utf-8"))
    assert version is not None
    said = f"ComfyUI {version[1]} in {host} (COMFYUI_PATH)"
    assert f"[dev] {said}\n" in result.stderr
    header = next(line for line in result.stdout.splitlines() if line.startswith("host: "))
    assert header.startswith(f"host: {said}, torch ")
    for package in ("torch", "comfy-aimdo", "comfy-kitchen"):
        assert f"{package} {importlib.metadata.version(package)}" in header


def test_the_byte_code_of_our_own_comfyui_is_written_once(dev: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text("VALUE = 1\n", "utf-8")
    (tmp_path / "for_another_python.py").write_text("no Python\n", "utf-8")
    dev.compile_once(Path(sys.executable), tmp_path)
    written = [*(tmp_path / "__pycache__").glob("main.*.pyc")]
    assert len(written) == 1
    written[0].unlink()
    dev.compile_once(Path(sys.executable), tmp_path)
    assert not written[0].exists()


@pytest.mark.parametrize("command", ["env", "test", "demo"])
def test_a_wrong_path_is_explained_without_a_traceback(command: str, tmp_path: Path) -> None:
    result = run(command, COMFYUI_PATH=str(tmp_path))
    assert result.returncode != 0
    assert "COMFYUI_PATH" in result.stderr
    assert "unset it" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_surrounding_comfyui_is_found(dev: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = tmp_path / "ComfyUI" / "custom_nodes" / "weightstream"
    pack.mkdir(parents=True)
    monkeypatch.setattr(dev, "ROOT", pack)
    assert dev.surrounding_comfyui() is None
    for name in dev.COMFYUI_MARKS:
        (tmp_path / "ComfyUI" / name).touch()
    assert dev.surrounding_comfyui() == tmp_path / "ComfyUI"
    monkeypatch.delenv("COMFYUI_PATH")
    monkeypatch.delenv("WEIGHTSTREAM_PYTHON", raising=False)
    assert dev.find_comfyui() == (tmp_path / "ComfyUI", Path(sys.executable), "around this pack")
    assert dev.own_python(tmp_path / "ComfyUI") == Path(sys.executable)
    own = dev.venv_python(tmp_path / "ComfyUI" / ".venv")
    own.parent.mkdir(parents=True)
    own.touch()
    assert dev.own_python(tmp_path / "ComfyUI") == own


def test_what_a_host_does_not_ask_for_is_not_installed(dev: ModuleType, tmp_path: Path) -> None:
    requirements = tmp_path / "requirements.txt"
    keys = set()
    for text, expected in (
        ("torch\ntorchsde\ntorchvision\ntorchaudio\nnumpy>=1.25.0\n", list(dev.TORCH_PINS)),
        ("torch>=2.8  # newer\ntorchvision\n#torchaudio\n", [dev.TORCH_PINS[0], dev.TORCH_PINS[1]]),
    ):
        requirements.write_text(text, "utf-8")
        assert dev.torch_pins(tmp_path) == expected
        keys.add(dev.environment_key(tmp_path))
    assert len(keys) == 2


def test_another_archive_is_refused(dev: ModuleType, tmp_path: Path) -> None:
    archive = tmp_path / "comfy.tar.gz"
    archive.write_bytes(b"something else")
    with pytest.raises(dev.SetupError, match="not the pinned file"):
        dev._check_sha256(archive)


@pytest.mark.parametrize("name", ["../../outside.py", "/etc/outside.py"])
def test_an_archive_cannot_write_outside(dev: ModuleType, tmp_path: Path, name: str) -> None:
    archive = tmp_path / "comfy.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        member = tarfile.TarInfo(dev.SDIST_COMFYUI + name)
        member.size = 3
        tar.addfile(member, io.BytesIO(b"bad"))
    with pytest.raises(dev.SetupError, match="unsafe path"):
        dev._unpack_comfyui(archive, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_the_cache_can_be_moved(dev: ModuleType, tmp_path: Path) -> None:
    assert dev.cache_dir({"WEIGHTSTREAM_CACHE": str(tmp_path / "elsewhere")}) == tmp_path / "elsewhere"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], ["--numprocesses"]),
        (["--fast"], ["--numprocesses", "tests/streaming", "not slow"]),
        (["-x", "--fast"], ["--numprocesses", "not slow", "-x"]),
        (["-q"], ["--numprocesses", "-q"]),
        (["-q", "tests/web"], ["-q", "tests/web"]),
        (
            ["tests/tools/test_dev.py::test_the_cache_can_be_moved"],
            ["tests/tools/test_dev.py::test_the_cache_can_be_moved"],
        ),
        (["-n", "1"], ["-n", "1"]),
    ],
)
def test_what_pytest_is_asked_for(
    dev: ModuleType, monkeypatch: pytest.MonkeyPatch, given: list[str], expected: list[str]
) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(dev, "call", lambda host, command: called.append(command) or 0)
    assert dev.test(given) == 0
    asked = called[0][called[0].index("pytest") + 1 :]
    assert set(expected) <= set(asked)
    assert "--fast" not in asked
    if "--numprocesses" not in expected:
        assert asked == given


def test_what_is_fast_is_not_a_part(dev: ModuleType) -> None:
    with pytest.raises(dev.SetupError, match="leave out either"):
        dev.test(["--fast", "tests/web"])


def test_what_is_fast_is_there(dev: ModuleType) -> None:
    assert all((ROOT / path).exists() for path in dev.FAST if path.startswith("tests"))
