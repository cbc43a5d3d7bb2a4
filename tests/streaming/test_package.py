from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from weightstream import streaming
from weightstream.streaming.command_line import NO_GPU, NO_NVIDIA_GPU, NO_TORCH, NOT_LOOKED, main
from weightstream.streaming.machine import gpus

ROOT = Path(streaming.__file__).parent.parent


def test_the_public_surface_is_what_init_lists() -> None:
    assert sorted(streaming.__all__) == streaming.__all__
    for name in streaming.__all__:
        assert hasattr(streaming, name)


def test_each_name_is_imported_from_where_type_checkers_find_it() -> None:
    """The names are listed three times in that file, and each list is needed."""
    tree = ast.parse(Path(streaming.__file__).read_text("utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    homes = {name.name: node.module for node in imports for name in node.names}
    assert homes == streaming._HOMES
    assert sorted(homes) == sorted(streaming.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Stream'"):
        _ = streaming.Stream


# Runs the folder in a process in which torch cannot be found.
WITHOUT_TORCH = (
    "import runpy, sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
    "runpy.run_path('streaming', run_name='__main__')"
)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["status", "--url", "127.0.0.1:9"], "no ComfyUI answers"),
        (["convert", "example_workflows/flux1-dev_one_small_gpu.json"], "there is nothing to change"),
        (["gpus"], "this Python has n"),
        (["plan", "missing.safetensors"], "missing.safetensors cannot be read"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_command_line_needs_no_torch(arguments: list[str], says: str) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, "streaming", *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert says in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("torch", "pynvml", "printed", "noted"),
    [
        (True, True, NO_GPU, ""),
        (False, True, NO_NVIDIA_GPU, NO_TORCH),
        (False, False, "", NOT_LOOKED),
    ],
)
def test_where_no_gpu_is_found_it_says_whether_it_could_look(
    torch: bool,
    pynvml: bool,
    printed: str,
    noted: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpus, "list_gpus", list)
    monkeypatch.setattr(gpus, "has_torch", lambda: torch)
    monkeypatch.setattr(gpus, "has_nvml", lambda: pynvml)
    assert main(["gpus"]) == 0
    assert capsys.readouterr() == (f"{printed}\n" if printed else "", f"{noted}\n" if noted else "")


def test_a_python_that_finds_no_modules_in_the_current_folder_runs_the_folder() -> None:
    """Windows portable's is such a one; ``-I`` makes one of any other."""
    lines = {"module": ["-m", "streaming"], "folder": ["streaming"]}
    ended = {
        name: subprocess.run([sys.executable, "-I", *line, "--help"], cwd=ROOT, capture_output=True, text=True)
        for name, line in lines.items()
    }
    assert "No module named streaming" in ended["module"].stderr
    assert ended["folder"].returncode == 0, ended["folder"].stderr
    assert "convert" in ended["folder"].stdout


def test_the_engine_needs_no_host() -> None:
    """In a fresh interpreter that has nothing of ComfyUI on its path."""
    code = "import sys, streaming; assert not [name for name in sys.modules if name.startswith(('comfy', 'nodes'))]"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env={"PATH": ""})


def test_the_pack_imports_without_torch() -> None:
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('pack', '__init__.py', submodule_search_locations=['.'])\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "assert 'torch' not in sys.modules and module.WEB_DIRECTORY == './web'"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
