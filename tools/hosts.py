"""Which releases of ComfyUI the daily run tests, and what it found there.

    git ls-remote --tags URL | python tools/hosts.py releases    ->  refs=["v0.30.0", ..., "master"]
    python tools/hosts.py summary v0.40.1 FOLDER                 ->  Markdown: the broken contracts, the failed tests

``.github/workflows/hosts.yml`` calls both. Only the standard library is used here.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent
# ComfyUI's branch of what will be the next release.
NEXT = "master"
# The step's summary is read by people: a suite that fails as a whole is told by its first tests.
MOST_TOLD = 40
MOST_CHARACTERS = 200

Version = tuple[int, int, int]


def oldest_supported(pyproject: str) -> Version:
    """The version that ``requires-comfyui`` names in the text of pyproject.toml."""
    found = re.search(r'^requires-comfyui = ">=(\d+)\.(\d+)\.(\d+)"$', pyproject, re.MULTILINE)
    if found is None:
        raise ValueError("pyproject.toml has no requires-comfyui of the form >=X.Y.Z")
    major, minor, patch = map(int, found.groups())
    return major, minor, patch


def releases(lines: Iterable[str], oldest: Version) -> list[str]:
    """The tags to test among what ``git ls-remote --tags`` prints: the oldest, and the last patch of each minor."""
    tags = (re.search(r"refs/tags/v(\d+)\.(\d+)\.(\d+)$", line.strip()) for line in lines)
    found = sorted({tuple(map(int, tag.groups())) for tag in tags if tag} | {oldest})
    found = found[found.index(oldest) :]
    last_patches = {version[:2]: version for version in found}
    return [f"v{major}.{minor}.{patch}" for major, minor, patch in sorted({oldest, *last_patches.values()})]


def outcomes(report: Path, *kinds: str) -> dict[str, str]:
    """The tests of a JUnit report that ended as one of ``kinds``, each with the first line of why."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        for outcome in (each for kind in kinds for each in case.iter(kind)):
            reason = outcome.get("message", "").strip().splitlines() or ["no reason given"]
            name = ".".join(filter(None, (case.get("classname"), case.get("name"))))
            found.setdefault(name, reason[0][:MOST_CHARACTERS].replace("`", "'"))
    return found


def summary(ref: str, reports: Path, environment: str) -> str:
    """Markdown: which contracts ComfyUI ``ref`` breaks or was not asked for, and which other tests fail with it.

    Args:
        ref: the release or branch.
        reports: the folder of contracts.xml and all.xml.
        environment: how the step that makes the interpreter ended, as GitHub says it.
    """
    text, told = [f"### ComfyUI {ref}", ""], set()
    if environment != "success":
        return "\n".join([*text, f"Its environment could not be made ({environment}): nothing was tested."])
    for what, name in (("Contracts of the host", "contracts.xml"), ("Tests", "all.xml")):
        report = reports / name
        if not report.is_file():
            text += [f"{what} did not run to their end.", ""]
            continue
        failed = {name: why for name, why in outcomes(report, "failure", "error").items() if name not in told}
        told.update(failed)
        text += _listed(f"{what} that failed", failed)
        if name == "contracts.xml":
            text += _listed(f"{what} that were not asked for", outcomes(report, "skipped"))
    return "\n".join(text)


def _listed(what: str, found: dict[str, str]) -> list[str]:
    lines = [f"- `{name}`: `{reason}`" for name, reason in found.items()]
    more = [f"- and {len(lines) - MOST_TOLD} more"] if len(lines) > MOST_TOLD else []
    return [f"{what}: {len(found)}", "", *lines[:MOST_TOLD], *more, ""] if found else []


def main() -> None:
    parser = argparse.ArgumentParser(description="Which releases of ComfyUI are tested every day.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("releases", help="tags on standard input, a matrix on standard output")
    tell = commands.add_parser("summary", help="what JUnit reports say, as Markdown")
    tell.add_argument("ref")
    tell.add_argument("reports", type=Path)
    tell.add_argument("--environment", default="success")
    args = parser.parse_args()
    if args.command == "summary":
        print(summary(args.ref, args.reports, args.environment))
        return
    oldest = oldest_supported((ROOT / "pyproject.toml").read_text("utf-8"))
    found = releases(sys.stdin, oldest)
    if len(found) == 1:
        # No answer, or tags of another form: to test the oldest alone would look like a success.
        raise SystemExit(f"hosts: no release after {found[0]} among the tags on standard input")
    print(f"refs={json.dumps([*found, NEXT])}")


if __name__ == "__main__":
    main()
