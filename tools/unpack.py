"""Unpack the parts that lie beside this script, and print what to export.

    eval "$(python3 unpack.py TARGET)"

Standard output is shell code; everything said to people goes to standard error.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shlex
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).absolute().parent


def say(text: str) -> None:
    print(f"[unpack] {text}", file=sys.stderr)


def unpack(archive: Path, target: Path) -> None:
    """Unpack one part: plain files that stay within ``target``."""
    with tarfile.open(archive) as tar:
        for member in tar:
            path = Path(member.name)
            if not member.isfile() or path.is_absolute() or ".." in path.parts:
                raise SystemExit(f"unpack: {archive.name} holds {member.name}, which does not belong in a part")
            # "tar" is what older versions do anyway; "data" would drop the mode bits of shared libraries.
            options = {"filter": "tar"} if hasattr(tarfile, "tar_filter") else {}
            tar.extract(member, target, **options)


def missing(names: list[str]) -> list[str]:
    """Those distributions that this interpreter does not have."""
    absent = []
    for name in names:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            absent.append(name)
    return absent


def check(target: Path) -> None:
    """Say what will not work here, before it fails somewhere else."""
    for path in sorted(target.glob("manifest-*.json")):
        manifest = json.loads(path.read_text("utf-8"))
        running = f"{sys.version_info[0]}.{sys.version_info[1]}"
        if manifest["python"] != running:
            say(f"part {manifest['part']} is for Python {manifest['python']}; this is {running}: make another bundle")
        if absent := missing(manifest["present"]):
            say(f"this interpreter lacks what the bundle expects here: {', '.join(absent)}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Unpack the parts beside this script.")
    parser.add_argument("target", type=Path)
    target = parser.parse_args().target.absolute()
    parts = sorted(HERE.glob("weightstream-*.tar.xz"))
    if not parts:
        print(f"unpack: no weightstream-*.tar.xz in {HERE}", file=sys.stderr)
        return 2
    for part in parts:
        unpack(part, target)
        say(part.name)
    check(target)
    path = [target / "site"]
    if not (target / "site" / "av").is_dir() and importlib.util.find_spec("av") is None:
        path.append(target / "stubs")
    before = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    print(f"export PYTHONPATH={shlex.quote(os.pathsep.join([*map(str, path), *before]))}")
    print(f"export COMFYUI_PATH={shlex.quote(str(target / 'ComfyUI'))}")
    print(f"export WEIGHTSTREAM_PYTHON={shlex.quote(sys.executable)}")
    if (target / "page").is_dir():
        say(f"start: python3 $COMFYUI_PATH/main.py --front-end-root {shlex.quote(str(target / 'page'))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
