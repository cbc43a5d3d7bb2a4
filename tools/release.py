"""Whether this commit may be published as a tag says, and what is new in it.

    python tools/release.py v0.1.0

prints what CHANGELOG.md says of that version. It refuses a tag that is not the version of pyproject.toml, and a version
without a dated section of its own in the changelog.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent


class ReleaseError(Exception):
    """The tag, pyproject.toml and CHANGELOG.md do not agree. Its text says what to correct."""


def version_of(project: str) -> str:
    # Read without a parser of TOML: Python 3.10 has none.
    found = re.search(r'^version = "([^"]+)"', project, re.MULTILINE)
    if found is None:
        raise ReleaseError("pyproject.toml has no version")
    return found[1]


def changes(changelog: str, version: str) -> str:
    """The section of ``version``, without its heading."""
    heading = re.compile(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", re.MULTILINE)
    if (found := heading.search(changelog)) is None:
        raise ReleaseError(
            f'CHANGELOG.md has no heading "## [{version}] - YYYY-MM-DD": rename [Unreleased], put a new one above'
        )
    section = re.split(r"^## ", changelog[found.end() :], maxsplit=1, flags=re.MULTILINE)[0].strip()
    if not section:
        raise ReleaseError(f"CHANGELOG.md says nothing of {version}")
    return section


def check(tag: str, project: str, changelog: str) -> str:
    """What is new in the version that ``tag`` names.

    Raises:
        ReleaseError: it may not be published.
    """
    version = version_of(project)
    if tag.rsplit("/", 1)[-1] != f"v{version}":
        raise ReleaseError(f"the tag {tag} is not v{version}, the version of pyproject.toml: correct one of them")
    return changes(changelog, version)


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print("usage: release.py TAG", file=sys.stderr)
        return 2
    try:
        project, changelog = ((ROOT / name).read_text("utf-8") for name in ("pyproject.toml", "CHANGELOG.md"))
        print(check(argv[0], project, changelog))
    except ReleaseError as error:
        print(f"release: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
