"""What the page is made of, run by node, and how its files are laid out."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from weightstream.streaming import ConfigError, parse_gpus

TESTS = Path(__file__).parent
WEB = TESTS.parent.parent / "web"
# The host's own, from where it serves our registration.
HOST_MODULES = {"../../scripts/app.js", "../../scripts/api.js"}
IMPORT = re.compile(
    r"""^\s*(?:import|export)\b[^;]*?\bfrom\s*["']([^"']+)["']|\bimport\s*\(?\s*["']([^"']+)["']""", re.MULTILINE
)
SOURCES = sorted([*WEB.rglob("*.js"), *WEB.rglob("*.mjs"), *WEB.rglob("*.css")])
LONGEST_FILE = 300
# Parts of lists of GPUs, and what is none.
PARTS = ["", "0", "gpu:1", " cuda : 1 ", "GPU:01", "gpu:12", "gpu:12345", "default", "cpu", "gpu", "-1", "1.0", "gpu:²"]
READ_GPUS = """
import { readFileSync } from 'node:fs'
const [module, texts] = process.argv.slice(2)
const { readGpus } = await import(module)
console.log(JSON.stringify(JSON.parse(readFileSync(texts)).map(readGpus)))
"""
# One of a pair stands for no character.
CHARACTERS = [chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000]


def node() -> str:
    """An interpreter for JavaScript: the machine's, or the one that a browser driver brings."""
    if found := shutil.which("node"):
        return found
    try:
        from playwright._impl._driver import compute_driver_executable
    except ImportError:
        pytest.skip("neither node nor playwright, which brings one, is installed")
    executable = compute_driver_executable()
    return str(executable[0] if isinstance(executable, tuple) else executable)


@pytest.mark.parametrize("file", sorted(TESTS.glob("*.test.mjs")), ids=lambda file: file.name)
def test_helpers(file: Path) -> None:
    command = [node(), "--test", "--test-reporter=tap", str(file)]
    result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^# pass [1-9]", result.stdout, re.MULTILINE), result.stdout


def test_lists_of_gpus_are_read_as_by_the_server(tmp_path: Path) -> None:
    def by_the_server(text: str) -> list[str] | None:
        try:
            return list(parse_gpus(text))
        except ConfigError:
            return None

    texts = [*PARTS, *map(",".join, itertools.product(PARTS, PARTS)), *(f"{each}0{each}" for each in CHARACTERS)]
    program = tmp_path / "read_gpus.mjs"
    program.write_text(READ_GPUS, "utf-8")
    file = tmp_path / "texts.json"
    file.write_text(json.dumps(texts), "utf-8")
    command = [node(), str(program), (WEB / "lib" / "gpu_choice.mjs").as_uri(), str(file)]
    result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=60)
    assert result.returncode == 0, result.stderr
    read = dict(zip(texts, json.loads(result.stdout), strict=True))
    assert read == {text: by_the_server(text) for text in texts}
    assert read["GPU:01,0"] == ["gpu:1", "gpu:0"]


def test_the_page_imports_one_file() -> None:
    assert [file.relative_to(WEB).as_posix() for file in WEB.rglob("*.js")] == ["weightstream.js"]


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.relative_to(WEB).as_posix())
def test_imports_stay_within_the_folder(file: Path) -> None:
    text = file.read_text("utf-8")
    for one, other in IMPORT.findall(text):
        target = one or other
        if file.name == "weightstream.js" and target in HOST_MODULES:
            continue
        assert target.startswith("."), f"{file.name} imports {target}, which is neither ours nor the host's"
        resolved = (file.parent / target).resolve()
        assert resolved.is_relative_to(WEB.resolve()), f"{file.name} imports {target} from outside"
        assert resolved.is_file(), f"{file.name} imports {target}, which is not there"


def test_files_are_short() -> None:
    lengths = {file.name: len(file.read_text("utf-8").splitlines()) for file in SOURCES}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}
