"""Programs of tests/gpu in their smallest form, on virtual devices: what no test runs is broken already."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import programs
import pytest
import test_programs_on_gpus as on_gpus

GPU_TESTS = Path(__file__).resolve().parents[1] / "gpu"
HOST = os.environ["COMFYUI_PATH"]
# The soak has devices on which next to nothing has room.
TOGETHER = ("host", "settings", "quantised", "encoders", "placement", "recordings", "split", "families", "late")
# Some that only a program which has gone all its way has found.
SOME_CASES = {
    "host": {"limit 16 MB, after unloading", "LoRA behind hooks", "fp8, limit 0 MB, lora -0.4"},
    "settings": {"auto, streams", "shared, streams, run 1"},
    "quantised": {"fp8, streamed, mode", "int8-rotated, resident, lora 0.7"},
    "encoders": {"qwen, auto, patched before", "shared, streams"},
    "placement": {"VAE on gpu:1", "wan VAE on cpu, encoded in tiles", "VAE on cpu"},
    "recordings": {"Flux, verified", "MiniMaxH3, out of memory: it did", "LTXAV, plain"},
    "split": {"limit 46 %, gpu:1,gpu:0, after giving way", "the host's own, lora 0.7"},
    "families": {"Flux, both"},
    "late": {"kernels", "patch kernels", "copies", "arrival", "unlocking"},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the programs find in one host."""
    folder = tmp_path_factory.mktemp("programs")
    return programs.run_all(TOGETHER, HOST, folder, ["--cpu"], WEIGHTSTREAM_VIRTUAL="2x100MB", OMP_NUM_THREADS="1")


@pytest.mark.parametrize("program", TOGETHER)
def test_a_program_finds_no_difference(found: dict[str, dict[str, Any]], program: str) -> None:
    assert programs.differences(found[program]) == [], found[program].get("error")
    assert SOME_CASES[program] <= found[program]["agree"].keys()


def test_every_program_is_run() -> None:
    assert {path.name.removesuffix("_program.py") for path in GPU_TESTS.glob("*_program.py")} == {*TOGETHER, "soak"}


def test_an_error_of_a_program_is_told_of_with_what_it_has_found_before(tmp_path: Path) -> None:
    def cases(found: programs.Found) -> None:
        found.check("one", True)
        found.check("two", True)
        found.check("two", False)
        raise ValueError("no more")

    found = programs.run(cases, tmp_path / "new").as_dict()
    assert found["agree"] == {"one": True, "two": False}
    assert programs.differences(found) == ["two", "ValueError: no more"]


CRASHES = """
import json, os, sys

comfyui, folder, names, *flags = sys.argv[1:]
said = {"a": [{"agree": {"a": True}}, {"error": "no"}], "c": [], "d": [{"agree": {}}]}[names[0]]
with open("started", "a") as file:
    print(json.dumps([names, os.path.basename(folder), flags, os.environ["GIVEN"]]), file=file)
print("a word")
for name, line in zip(names.split(","), said):
    print(json.dumps({"program": name, **line}))
sys.stdout.flush()
os.write(2, b"Segmentation fault")
os._exit(11)
"""


def test_what_comes_behind_a_program_that_ends_its_process_is_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One raises an error, one crashes at its begin, and one behind another that has ended well."""
    (tmp_path / "programs.py").write_text(CRASHES)
    monkeypatch.setattr(programs, "HERE", tmp_path)
    monkeypatch.chdir(tmp_path)
    told: list[str] = []
    found = programs.run_all("abcde", "ComfyUI", tmp_path, ["--cpu"], lambda name, what: told.append(name), GIVEN="1")
    started = [json.loads(line) for line in (tmp_path / "started").read_text().splitlines()]
    assert [names for names, _, _, _ in started] == ["a,b,c,d,e", "c,d,e", "d,e"]
    assert len({folder for _, folder, _, _ in started}) == 3
    assert all(rest == [["--cpu"], "1"] for _, _, *rest in started)
    assert [programs.differences(found[name]) for name in "abcde"] == [
        *([], ["no"], ["its process ended with 11"], [], ["its process ended with 11"])
    ]
    assert "Segmentation fault" in found["c"]["error"]
    assert told == [*"abcde"]


def test_who_wants_no_more_waits_for_no_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "programs.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(600)\n")
    monkeypatch.setattr(programs, "HERE", tmp_path)
    over = threading.Event()
    threading.Timer(1.0, over.set).start()
    found = programs.run_all("ab", "ComfyUI", tmp_path, [], over=over)
    assert [*found] == ["a"]
    assert "its process ended with" in found["a"]["error"]


def test_everybody_who_waits_for_a_program_hears_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of its result, of the error of what runs it, or that nothing came."""

    def run_all(
        wanted: dict[str, Any], comfyui: str, folder: Path, flags: object, tell: Any, *_: Any, **__: Any
    ) -> None:
        if "late" in wanted:
            raise OSError("no more memory")
        tell("host", {"agree": {"a": True}})

    monkeypatch.setattr(programs, "run_all", run_all)
    findings = {case: Future() for case in (("static", "host"), ("static", "settings"), ("late", "late"))}
    on_gpus._run_all(findings, {"static": tmp_path, "late": tmp_path}, threading.Event())
    assert findings["static", "host"].result(0) == {"agree": {"a": True}}
    assert str(findings["static", "settings"].exception(0)) == "the tests were stopped"
    assert str(findings["late", "late"].exception(0)) == "no more memory"


def test_a_soak(tmp_path: Path) -> None:
    """By itself. The seed has everything in six prompts; which faults find a call to fall on hangs on times."""
    command = [sys.executable, str(GPU_TESTS / "soak_program.py"), HOST, str(tmp_path), "1-6", "3492", "2", "--cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WEIGHTSTREAM_VIRTUAL": "2x14MB"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["failures"] == []
    assert sum(found["ended"].values()) == found["prompts"] == 6
    features = {"LoRA", "LoRA stack", "hooks", "ControlNet", "EasyCache", "ar_video", "2 devices"}
    assert found["features"].keys() == features | {"packing auto", "packing on"}
    assert found["packed"] >= 1
    assert len(found["planned"]) == 8
    assert len(found["happened"]) >= 5
    assert found["steps_run_again"] >= 1
