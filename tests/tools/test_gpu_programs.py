"""Programs of tests/gpu in their smallest form, on virtual devices: what no test runs is broken already."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import programs
import pytest
from program_runs import CASES, RUNS, Findings, Run

GPU_TESTS = Path(__file__).resolve().parents[1] / "gpu"
HOST = os.environ["COMFYUI_PATH"]
# The soak has devices on which next to nothing has room.
TOGETHER = (
    "host",
    "settings",
    "quantised",
    "encoders",
    "placement",
    "recordings",
    "split",
    "parallel",
    "families",
    "sharing",
    "late",
)
# Some that only a program which has gone all its way has found.
SOME_CASES = {
    "host": {"limit 16 MB, after unloading", "LoRA behind hooks", "fp8, limit 0 MB, lora -0.4"},
    "settings": {"auto, streams", "shared, streams, run 1"},
    "quantised": {"fp8, streamed, mode", "int8-rotated, resident, lora 0.7"},
    "encoders": {"qwen, auto, patched before", "shared, streams"},
    "placement": {"VAE on gpu:1", "wan VAE on cpu, encoded in tiles", "VAE on cpu"},
    "recordings": {"Flux, verified", "MiniMaxH3, out of memory: it did", "LTXAV, plain"},
    "split": {"limit 46 %, gpu:1,gpu:0, after giving way", "the host's own, lora 0.7"},
    "parallel": {"limit 46 %, one prompt, out of memory on the other GPU", "the host's own, two prompts"},
    "families": {"Flux, both"},
    "sharing": {"and the packed memory is gone" if sys.platform == "linux" else "this system cannot share"},
    "late": {"kernels", "patch kernels", "copies", "arrival", "unlocking"},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the programs find in one host, whose turn it is."""
    folder, turn = tmp_path_factory.mktemp("programs"), threading.Event()
    turn.set()
    environment = {"WEIGHTSTREAM_VIRTUAL": "2x100MB", "OMP_NUM_THREADS": "1"}
    return programs.run_all(TOGETHER, HOST, folder, ["--cpu"], turn=turn, **environment)


@pytest.mark.parametrize("program", TOGETHER)
def test_a_program_finds_no_difference(found: dict[str, dict[str, Any]], program: str) -> None:
    assert programs.differences(found[program]) == [], found[program].get("error")
    assert SOME_CASES[program] <= found[program]["agree"].keys()


def test_every_program_is_run() -> None:
    known = {path.name.removesuffix("_program.py") for path in GPU_TESTS.glob("*_program.py")}
    assert known == {*TOGETHER, "soak"} == {program for _, program in CASES}
    assert sorted(CASES) == sorted((name, program) for name, run in RUNS.items() for program in run.names.split())


def test_parts_of_a_program_are_told_of_with_what_they_took(found: dict[str, dict[str, Any]]) -> None:
    parts = found["late"]["parts"]
    assert parts.keys() == found["late"]["agree"].keys()
    assert sum(parts.values()) <= found["late"]["seconds"] + 0.5


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


WAITING = """
import os, sys, time

programs = sys.argv[3]
with open(os.path.join(os.environ["SEEN"], programs + ".started"), "w"):
    pass
if os.environ.get("WEIGHTSTREAM_PROGRAMS_WAIT"):
    sys.stdin.readline()
time.sleep(0.2)
seen = sorted(os.listdir(os.environ["SEEN"]))
print('{"program": "' + programs + '", "agree": {"' + " ".join(seen) + '": true}}', flush=True)
with open(os.path.join(os.environ["SEEN"], programs + ".ended"), "w"):
    pass
"""


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Programs that tell who had started and ended before they did, and where they see it."""
    for name in ("code", "seen"):
        (tmp_path / name).mkdir()
    (tmp_path / "code" / "programs.py").write_text(WAITING)
    monkeypatch.setattr(programs, "HERE", tmp_path / "code")
    monkeypatch.setattr(programs, "LOOK_SECONDS", 0.05)
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    for name, run in {"a": Run("a"), "b": Run("b"), "c": Run("c", alone=True), "d": Run("d", alone=True)}.items():
        monkeypatch.setitem(RUNS, name, run)
    return tmp_path / "seen"


@pytest.mark.parametrize("cores", [1, 16])
def test_a_program_that_is_alone_begins_when_the_others_have_ended_and_somebody_waits(
    waiting: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cores: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    findings = Findings((name, name) for name in "acbd")
    running = threading.Thread(target=findings.find, args=(dict.fromkeys("abcd", tmp_path), threading.Event()))
    running.start()
    for name in "ab":
        findings.of(name, name)
    while not (waiting / "c.started").exists():  # Its host starts meanwhile.
        time.sleep(0.05)
    time.sleep(0.5)
    assert not (waiting / "c.ended").exists()
    (seen_by_c,) = findings.of("c", "c")["agree"]
    (seen_by_d,) = findings.of("d", "d")["agree"]
    running.join()
    assert {"a.ended", "b.ended"} <= set(seen_by_c.split())
    assert "d.ended" not in seen_by_c
    assert "c.ended" in seen_by_d.split()


def test_a_program_that_is_alone_waits_for_the_others_whoever_asks_first(waiting: Path, tmp_path: Path) -> None:
    findings = Findings((name, name) for name in "abc")
    running = threading.Thread(target=findings.find, args=(dict.fromkeys("abc", tmp_path), threading.Event()))
    running.start()
    (seen,) = findings.of("c", "c")["agree"]
    running.join()
    assert {"a.ended", "b.ended"} <= set(seen.split())


def test_who_waits_for_a_turn_that_does_not_come_is_ended(waiting: Path, tmp_path: Path) -> None:
    findings, over = Findings([("c", "c")]), threading.Event()
    running = threading.Thread(target=findings.find, args=({"c": tmp_path}, over))
    running.start()
    while not (waiting / "c.started").exists():
        time.sleep(0.05)
    over.set()
    running.join()
    assert "its process ended with" in findings.of("c", "c")["error"]


def test_a_host_that_waits_ends_with_whoever_has_started_it() -> None:
    programs.wait_for_turn(io.StringIO("\n"))
    with pytest.raises(SystemExit):
        programs.wait_for_turn(io.StringIO(""))


def test_everybody_who_waits_for_a_program_hears_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of its result, of the error of what runs it, or that nothing came."""

    def run_all(
        wanted: dict[str, Any], comfyui: str, folder: Path, flags: object, tell: Any, *_: Any, **__: Any
    ) -> None:
        if "soak" in wanted:
            raise OSError("no more memory")
        tell("host", {"agree": {"a": True}})

    monkeypatch.setattr(programs, "run_all", run_all)
    findings = Findings([("static", "host"), ("static", "settings"), ("soak-static", "soak")])
    findings.find({"static": tmp_path, "soak-static": tmp_path}, threading.Event())
    assert findings.of("static", "host")["agree"] == {"a": True}
    with pytest.raises(RuntimeError, match="the tests were stopped"):
        findings.of("static", "settings")
    with pytest.raises(OSError, match="no more memory"):
        findings.of("soak-static", "soak")


SMALL = {
    "program_runs.py": """
import os
from types import SimpleNamespace

RUNS = {"one": SimpleNamespace(gpus=0), "many": SimpleNamespace(gpus=99)}


class Findings:
    def __init__(self, wanted):
        self.wanted, self.runs = list(wanted), ["one"]

    def find(self, folders, over):
        assert [*folders] == self.runs
        os.environ["BEGUN"] = "yes"
        over.wait(60)
""",
    "test_programs_on_gpus.py": """
import os
import pytest

@pytest.mark.parametrize(("run", "program"), [("one", "soak"), ("many", "soak")])
def test_program(found, run, program, record_property):
    assert os.environ["BEGUN"]
    assert found.wanted == [("one", "soak")]
    for name, value in {"seconds": 3.21, "at": 54.3, "parts": {"first": 1.21, "second": 2}}.items():
        record_property(name, value)
""",
    "test_small.py": """
import os, time
from pathlib import Path
import pytest

BEGUN = Path(__file__).with_name("begun")

@pytest.mark.child("-c", f"open({str(BEGUN)!r}, 'w').close(); print('a word')")
def test_child(child):
    assert child.stdout.split() == ["a", "word"]

@pytest.mark.beside
def test_beside():
    for _ in range(600):
        if BEGUN.exists() and "BEGUN" in os.environ:
            return
        time.sleep(0.1)
    pytest.fail("programs or the process have not begun")

def test_alone():
    assert not BEGUN.exists() and "BEGUN" not in os.environ
""",
}


def test_tests_of_a_gpu_run_alone_then_beside_programs_and_then_look_at_these(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((GPU_TESTS / "conftest.py").read_text("utf-8"), "utf-8")
    for name, text in SMALL.items():
        (tmp_path / name).write_text(text, "utf-8")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-c", os.devnull, "."]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = [line for line in ended.stdout.splitlines() if " PASSED in " in line]
    assert [line.partition("::")[2].partition(" ")[0] for line in lines] == [
        *("test_alone", "test_beside", "test_child", "test_program[one-soak]", "test_program[many-soak]")
    ]
    assert "PASSED in 3.2 s (over 54 s after the first began, first 1.2, second 2.0)" in lines[-1]


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
