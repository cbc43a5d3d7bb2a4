"""ComfyUI, started once, and programs of this folder that run in it one after the other.

    python programs.py COMFYUI FOLDER PROGRAM[,PROGRAM...] [host flags]

A program is a file NAME_program.py with a function ``cases``; ``python NAME_program.py COMFYUI FOLDER [host flags]`` is
it alone. FOLDER is empty, for files. ComfyUI reads its command line once, so each set of flags is a process, which
takes longer to start than most programs to run. With --cpu, and WEIGHTSTREAM_VIRTUAL set, they run in their smallest
form.

What a program finds is a line of JSON as soon as it has ended. One that raises an error, crashes or hangs ends the
process, as nobody knows what it has left behind; :func:`run_all` starts another one for those that come after it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# As the modules of the test suite know it, so that there is one of it.
PACK = "weightstream"
LINE = '{"program": '
# Many times what the longest one takes.
PROGRAM_SECONDS = 240
LOOK_SECONDS = 0.5
# Set for a host that is to wait, when it has started, for a line on its standard input.
WAITS = "WEIGHTSTREAM_PROGRAMS_WAIT"


@dataclass
class Found:
    """What a program has found.

    Attributes:
        folder: empty at first, for its files.
        small: there is no GPU, and each way is gone once.
        agree: whether what was compared is the same, by the case's name.
        facts: what else is worth knowing. Its "parts" are told of with the result: what they took, in seconds.
        error: what it was ended by.
    """

    folder: Path
    small: bool
    agree: dict[str, bool] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    def check(self, case: str, same: bool) -> None:
        """One more comparison of this case, all of which must agree."""
        self.agree[case] = self.agree.get(case, True) and bool(same)

    def as_dict(self) -> dict[str, Any]:
        return {"agree": self.agree, **self.facts} | ({"error": self.error} if self.error else {})


Cases = Callable[[Found], None]


# ---------------------------------------------------------------------------------------- in the process of the host


def start_host(comfyui: Path, flags: list[str]) -> None:
    """Start ComfyUI with ``flags`` and load the pack into it; before anything imports torch."""
    tests = ROOT / "tests"
    # ComfyUI's folder comes before them: its nodes are not ours.
    sys.path[:0] = map(str, (ROOT / "benchmarks", tests / "streaming", tests / "nodes", ROOT))
    import comfy_host

    comfy_host.start(comfyui, flags)
    node("WeightStreamModelLoader")


def node(node_id: str) -> Any:
    """The pack's node of this id."""
    import comfy_host

    return comfy_host.load_pack(node_id, PACK)


def write_flux_files(folder: Path, *kinds: str) -> None:
    """Write the tiny FLUX and its LoRA, and have ComfyUI look there first for models of these ``kinds``."""
    import folder_paths
    from sampling import LORA, MODEL

    from tools.checkpoints import write_flux, write_flux_lora

    write_flux(folder / MODEL)
    write_flux_lora(folder / LORA)
    for kind in kinds:
        folder_paths.add_model_folder_path(kind, str(folder), is_default=True)


def run(cases: Cases, folder: Path) -> Found:
    """What ``cases`` find; an error of theirs is told of, with the cases before it."""
    import comfy.model_management as mm

    device = mm.get_torch_device()
    found = Found(folder, small=device.type == "cpu", facts={"device": mm.get_torch_device_name(device)})
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    try:
        cases(found)
    except Exception:
        found.error = traceback.format_exc()
    found.facts["seconds"] = round(time.monotonic() - began, 1)
    return found


def unload_all() -> None:
    """Unload every model; ComfyUI's own function for it does not look at virtual devices."""
    import comfy.model_management as mm

    for device in {loaded.device for loaded in mm.current_loaded_models}:
        mm.free_memory(1e30, device)


def tidy_up() -> None:
    """As between prompts of different models: nothing of the last program is in the next one's way."""
    import comfy.model_management as mm

    unload_all()
    gc.collect()
    mm.cleanup_models_gc()
    mm.soft_empty_cache()


def end_after(seconds: float) -> None:
    """What hangs says where, and ends. Called again it begins anew."""
    faulthandler.dump_traceback_later(seconds, exit=True)


def alone(cases: Cases) -> None:
    """A program by itself: what it has found is the last line that it prints."""
    comfyui, folder, *flags = sys.argv[1:]
    start_host(Path(comfyui), flags)
    found = run(cases, Path(folder))
    print(json.dumps(found.as_dict()))
    if found.error:
        raise SystemExit(found.error)


def wait_for_turn(lines: IO[str]) -> None:
    """Wait for a line. Where none comes, whoever has started this is gone."""
    if not lines.readline():
        raise SystemExit("nobody wants to know what the programs find")


def main() -> None:
    comfyui, folder, names, *flags = sys.argv[1:]
    faulthandler.enable()
    end_after(PROGRAM_SECONDS)
    start_host(Path(comfyui), flags)
    if os.environ.get(WAITS):
        faulthandler.cancel_dump_traceback_later()
        wait_for_turn(sys.stdin)
    for name in names.split(","):
        end_after(PROGRAM_SECONDS)
        found = run(importlib.import_module(f"{name}_program").cases, Path(folder) / name)
        print(json.dumps({"program": name, **found.as_dict()}), flush=True)
        if found.error:
            raise SystemExit(found.error)
        del found
        tidy_up()


# ------------------------------------------------------------------------------------------------ for who starts it


def run_all(
    names: Iterable[str],
    comfyui: str,
    folder: Path,
    flags: Sequence[str],
    tell: Callable[[str, dict[str, Any]], None] = lambda name, found: None,
    over: threading.Event | None = None,
    turn: threading.Event | None = None,
    **environment: str,
) -> dict[str, dict[str, Any]]:
    """What each program finds, or its ``error``, in as few processes as it takes.

    Args:
        folder: for files; not shared with another call.
        tell: is called with a program's name and what it has found, as soon as it has ended.
        over: once it is set, the process that runs is ended, and no other is started.
        turn: until it is set, no program begins; the host starts meanwhile.
        environment: variables that the processes have beside those of this one.
    """
    found: dict[str, dict[str, Any]] = {}
    left = list(names)

    def keep(name: str, what: dict[str, Any]) -> None:
        found[name] = what
        left.remove(name)
        tell(name, what)

    over = over or threading.Event()
    while left and not over.is_set():
        own = folder / f"from-{left[0]}"
        command = [sys.executable, HERE / "programs.py", comfyui, own, ",".join(left), *flags]
        failed = False
        with (folder / f"{own.name}.err").open("w+", errors="replace") as errors:
            environ = {**os.environ, **environment, **({WAITS: "1"} if turn else {})}
            stdin, pipe = subprocess.PIPE if turn else subprocess.DEVNULL, subprocess.PIPE
            with subprocess.Popen(
                command, stdin=stdin, stdout=pipe, stderr=errors, text=True, errors="replace", env=environ
            ) as process:
                assert process.stdout is not None
                threading.Thread(target=_watch, args=(process, over, turn), daemon=True).start()
                for line in process.stdout:
                    if line.startswith(LINE):
                        what = json.loads(line)
                        failed = failed or "error" in what
                        keep(what.pop("program"), what)
            if left and not failed:
                errors.seek(0)
                said = errors.read()[-4000:]
                keep(left[0], {"error": f"{said}\nits process ended with {process.returncode}"})
    return found


def _watch(process: subprocess.Popen[str], over: threading.Event, turn: threading.Event | None) -> None:
    """Let ``process`` begin when it is its ``turn``, and end it when it is ``over``, if it runs still."""
    while process.poll() is None:
        if over.is_set():  # First: whoever ends everything also gives those a turn that wait for one.
            process.kill()
            return
        if turn is not None and turn.is_set():
            turn = None
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # It has ended just now.
                process.stdin.write("\n")
                process.stdin.flush()
        over.wait(LOOK_SECONDS)


def differences(found: dict[str, Any]) -> list[str]:
    """The cases that differ, and the last line of the error that has ended the program."""
    differing = [case for case, same in found.get("agree", {}).items() if not same]
    return [*differing, *found.get("error", "").strip().splitlines()[-1:]]


if __name__ == "__main__":
    # The module that the programs know, not a second one of it.
    import programs

    programs.main()
