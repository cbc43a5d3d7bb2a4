"""Pack ComfyUI and its wheels for a Linux x86_64 machine without network.

    python dev.py bundle DIR [--python 3.12]

DIR gets ``unpack.py`` and xz-packed parts of at most 55 MB. The target has torch, transformers, scipy and what these
bring; ``unpack.py`` says so when it does not. The parts build on each other, and any of them may stay at home:

- ``engine``: ComfyUI's source and what ``comfy.*``, ``nodes`` and ``comfy_extras`` need, with a stand-in for the video
  codecs;
- ``server``: what ``main.py`` needs beyond that (its page and templates are left out);
- ``video``: the codecs.

Runs in an interpreter that has pip; nothing else beside the standard library is needed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).absolute().parent
PART_BYTES = 55_000_000
# glibc up to that of Ubuntu 22.04 and RHEL 9; pip takes each version by name only.
PLATFORMS = ["linux_x86_64", "manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64"]
PLATFORMS += [f"manylinux_2_{minor}_x86_64" for minor in range(5, 36)]

# Not packed: torch, transformers and scipy, and what these and a usual machine-learning image bring.
PRESENT = [
    *("aiohttp", "einops", "filelock", "huggingface-hub", "jinja2", "markupsafe", "numpy", "packaging", "pillow"),
    *("psutil", "pyyaml", "regex", "requests", "safetensors", "scipy", "sentencepiece", "tokenizers", "torch"),
    *("torchaudio", "torchvision", "tqdm", "transformers", "typing-extensions", "yarl"),
]
# The page, its templates and documents; and the two that only the GLSL shader node needs.
LEFT_OUT = [
    *("comfyui-frontend-package", "comfyui-workflow-templates", "comfyui-embedded-docs"),
    *("comfy-angle", "pyopengl"),
]
# Requirements of ComfyUI by the part that needs them; all others are the engine's.
SERVER = ["alembic", "blake3"]
VIDEO = ["av"]

SOURCE_LEFT_OUT = {".ci", ".github", "blueprints", "openapi.yaml", "script_examples", "tests", "tests-unit"}
# Code for other makers' GPUs, which is imported only under their torch.
WHEEL_LEFT_OUT = re.compile(
    r"comfy_kitchen/backends/hip/|.*\.dist-info/(sboms|licenses)/.*|.*\.data/(?!purelib|platlib)"
)


class BundleError(Exception):
    """An expected failure; its text says what to do."""


def say(text: str) -> None:
    print(f"[bundle] {text}", file=sys.stderr, flush=True)


def pip_packaging(module: str) -> Any:
    """A module of ``packaging``: the one installed, else the one that every pip carries."""
    for name in (f"packaging.{module}", f"pip._vendor.packaging.{module}"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise BundleError("this interpreter has no pip: run it by `python dev.py bundle DIR`")


def normalize(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# --- wheels ----------------------------------------------------------------------------------------------------------


class Resolver:
    """Finds the wheels that a requirement brings, for the target's Python and not for the one that runs."""

    def __init__(self, python: str, folder: Path) -> None:
        self.python = python
        self.folder = folder
        self.requirement = pip_packaging("requirements").Requirement
        self.wheels: dict[str, Path] = {}
        self.asked: dict[str, Any] = {}
        self.environment = {
            "implementation_name": "cpython",
            "os_name": "posix",
            "platform_machine": "x86_64",
            "platform_python_implementation": "CPython",
            "platform_system": "Linux",
            "python_full_version": f"{python}.0",
            "python_version": python,
            "sys_platform": "linux",
            "extra": "",
        }

    def add(self, texts: Iterable[str]) -> list[Path]:
        """The wheels that ``texts`` need and that no earlier call has brought."""
        new: list[str] = []
        pending = [self.requirement(text) for text in texts]
        while pending:
            wanted = pending.pop(0)
            name = normalize(wanted.name)
            applies = wanted.marker is None or wanted.marker.evaluate(self.environment)
            if not applies or name in PRESENT or name in LEFT_OUT:
                continue
            known = self.asked.get(name)
            self.asked[name] = wanted.specifier if known is None else known & wanted.specifier
            if known is not None and self._version(name) in wanted.specifier:
                continue
            self._download(name)
            new.append(name)
            pending += [self.requirement(text) for text in requires(self.wheels[name])]
        return [self.wheels[name] for name in dict.fromkeys(new)]

    def _version(self, name: str) -> str:
        return self.wheels[name].name.split("-")[1]

    def _download(self, name: str) -> None:
        """Take the newest wheel that everything asked so far allows."""
        target = self.folder / name
        shutil.rmtree(target, ignore_errors=True)
        wanted = f"{name}{self.asked[name]}"
        say(f"wheel {wanted}")
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", self.python]
        command += [word for platform in PLATFORMS for word in ("--platform", platform)]
        done = subprocess.run(
            [*command, "--dest", os.fspath(target), wanted], capture_output=True, text=True, check=False
        )
        wheels = list(target.glob("*.whl"))
        if done.returncode != 0 or len(wheels) != 1:
            tail = "\n".join(line[:300] for line in (done.stdout + done.stderr).splitlines()[-4:])
            raise BundleError(f"no wheel of {wanted} for Python {self.python} on Linux x86_64:\n{tail}")
        self.wheels[name] = wheels[0]


def requires(wheel: Path) -> list[str]:
    """What a wheel says it depends on."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        return HeaderParser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []


def install_wheel(wheel: Path, site: Path) -> None:
    """Unpack a wheel into ``site``: what pip would do, less scripts and compiled caches."""
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            if info.is_dir() or WHEEL_LEFT_OUT.match(info.filename):
                continue
            relative = re.sub(r"^[^/]+\.data/(purelib|platlib)/", "", info.filename)
            if ".." in Path(relative).parts:
                raise BundleError(f"{wheel.name} holds an unsafe path: {info.filename}")
            path = site / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(info) as source, open(path, "wb") as out:
                shutil.copyfileobj(source, out)


# --- parts -----------------------------------------------------------------------------------------------------------


def copy_comfyui(comfyui: Path, target: Path) -> None:
    def left_out(folder: str, names: list[str]) -> set[str]:
        gone = {name for name in names if name == "__pycache__" or name.startswith(".git")}
        if Path(folder) != comfyui:
            return gone
        # A ComfyUI in use holds its user's models, pictures and packs: none of them belongs in a bundle.
        return gone | (SOURCE_LEFT_OUT & set(names)) | {"models", "output", "input", "user", "temp", "custom_nodes"}

    shutil.copytree(comfyui, target, ignore=left_out)
    for name in ("models", "output", "input", "user", "custom_nodes"):
        (target / name).mkdir()
        (target / name / ".keep").touch()
    if (comfyui / "models" / "configs").is_dir():
        shutil.copytree(comfyui / "models" / "configs", target / "models" / "configs")


def requirements(comfyui: Path) -> list[str]:
    lines = (line.split("#")[0].strip() for line in (comfyui / "requirements.txt").read_text("utf-8").splitlines())
    return [line for line in lines if line]


def split_requirements(lines: Sequence[str]) -> dict[str, list[str]]:
    """ComfyUI's requirements by part."""
    parts: dict[str, list[str]] = {"engine": [], "server": [], "video": []}
    for line in lines:
        name = normalize(re.split(r"[^A-Za-z0-9._-]", line)[0])
        part = "server" if name in SERVER else "video" if name in VIDEO else "engine"
        parts[part].append(line)
    return parts


def write_manifest(tree: Path, part: str, python: str, wheels: Sequence[Path]) -> None:
    names = [wheel.name for wheel in wheels]
    manifest = {"part": part, "python": python, "wheels": names, "present": PRESENT if part == "engine" else []}
    tree.mkdir(parents=True, exist_ok=True)
    (tree / f"manifest-{part}.json").write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")


def stage(part: str, comfyui: Path, tree: Path, wheels: Sequence[Path], python: str) -> None:
    """Lay out one part as it will lie on the target."""
    for wheel in wheels:
        install_wheel(wheel, tree / "site")
    if part == "engine":
        copy_comfyui(comfyui, tree / "ComfyUI")
        shutil.copytree(TOOLS / "stubs", tree / "stubs", ignore=shutil.ignore_patterns("__pycache__"))
    if part == "server":
        # What main.py is given by --front-end-root: the real page is 80 MB that nobody looks at on such a machine.
        (tree / "page").mkdir(parents=True)
        (tree / "page" / "index.html").write_text("<!doctype html><title>headless</title>\n", "utf-8")
    write_manifest(tree, part, python, wheels)


def pack(tree: Path, files: Sequence[Path], target: Path) -> list[Path]:
    """Pack ``files``; what comes out too large is packed again as two halves."""
    with tarfile.open(target, "w:xz", preset=6) as tar:
        for path in files:
            info = tar.gettarinfo(path, os.fspath(path.relative_to(tree)))
            # Equal contents give equal parts, whoever packs them and when.
            info.uid = info.gid = info.mtime = 0
            info.uname = info.gname = ""
            with open(path, "rb") as source:
                tar.addfile(info, source)
    if target.stat().st_size <= PART_BYTES:
        return [target]
    size = target.stat().st_size
    target.unlink()
    if len(files) == 1:
        raise BundleError(f"{files[0].name} alone is {size / 1e6:.0f} MB packed, more than a part may be")
    middle = half(files)
    stem = target.name.removesuffix(".tar.xz")
    return [
        done
        for letter, share in (("a", files[:middle]), ("b", files[middle:]))
        for done in pack(tree, share, target.with_name(f"{stem}{letter}.tar.xz"))
    ]


def half(files: Sequence[Path]) -> int:
    """Where to cut so that both sides hold about as many bytes; neither is empty."""
    left, total = 0, sum(path.stat().st_size for path in files)
    for index, path in enumerate(files[:-1], 1):
        left += path.stat().st_size
        if left >= total / 2:
            return index
    return len(files) - 1


def bundle(folder: Path, comfyui: Path, python: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("weightstream-*.tar.xz"):
        old.unlink()
    with tempfile.TemporaryDirectory(prefix="bundle-", dir=folder) as scratch:
        work = Path(scratch)
        resolver = Resolver(python, work / "wheels")
        for part, lines in split_requirements(requirements(comfyui)).items():
            tree = work / part
            stage(part, comfyui, tree, resolver.add(lines), python)
            files = sorted(path for path in tree.rglob("*") if path.is_file())
            for done in pack(tree, files, folder / f"weightstream-{part}.tar.xz"):
                say(f"{done.name}: {done.stat().st_size / 1e6:.1f} MB")
    shutil.copy2(TOOLS / "unpack.py", folder / "unpack.py")
    say(f'on the target: eval "$(python3 {folder.name}/unpack.py TARGET)"')


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="dev.py bundle", description="Pack ComfyUI for a machine without network.")
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("--comfyui", required=True, type=Path)
    parser.add_argument("--python", default="3.12", metavar="X.Y")
    args = parser.parse_args(argv)
    if not re.fullmatch(r"3\.\d+", args.python):
        parser.error(f"--python {args.python}: expected a version such as 3.12")
    try:
        bundle(args.folder.absolute(), args.comfyui.absolute(), args.python)
    except BundleError as error:
        print(f"bundle: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
