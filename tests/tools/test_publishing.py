"""What is published: the files in the archive, what pyproject.toml says, and the check of a release's tag."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

import pytest

from tools.host import PACK_PARTS
from tools.release import ReleaseError, check, version_of

ROOT = Path(__file__).resolve().parents[2]
# At the top of the published archive. What else is added to the repository has to be decided here.
PUBLISHED = {
    "CHANGELOG.md",
    "LICENSE",
    "README.md",
    "__init__.py",
    "assets",
    "example_workflows",
    "fleet",
    "locales",
    "nodes",
    "pyproject.toml",
    "streaming",
    "web",
}
PROJECT = (ROOT / "pyproject.toml").read_text("utf-8")
CHANGES = """# Changelog

## [Unreleased]

## [1.2.0] - 2026-01-31

### Added

- A thing.

## [1.1.0] - 2026-01-01

- Old.
"""


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("this is no git checkout")
    return listed.stdout.splitlines()


def ignored() -> list[str]:
    """The lines of .comfyignore; all name something at the top."""
    lines = (ROOT / ".comfyignore").read_text("utf-8").split()
    assert all(re.fullmatch(r"/[\w.-]+", line) for line in lines)
    return [line[1:] for line in lines]


def test_what_is_published() -> None:
    top = {path.split("/", 1)[0] for path in tracked()}
    assert set(ignored()) <= top, "a line names nothing"
    assert top - set(ignored()) == PUBLISHED
    # What the tests and the demo run is what is published.
    assert set(PACK_PARTS) <= PUBLISHED


def test_published_files_are_small() -> None:
    published = [path for path in tracked() if path.split("/", 1)[0] in PUBLISHED]
    assert sum((ROOT / path).stat().st_size for path in published) < 2.5e6


def test_pictures_have_the_sizes_that_the_registry_wants() -> None:
    sizes = {}
    for name in ("Icon", "Banner"):
        url = re.search(rf'^{name} = "(https://\S+)"$', PROJECT, re.MULTILINE)
        assert url is not None
        path = ROOT / url[1].split("/main/", 1)[1]
        sizes[name] = struct.unpack(">II", path.read_bytes()[16:24])
    width, height = sizes["Icon"]
    assert width == height <= 400
    width, height = sizes["Banner"]
    assert width * 9 == height * 21


def test_one_repository_everywhere() -> None:
    repository = re.search(r'^Repository = "(\S+)"$', PROJECT, re.MULTILINE)
    assert repository is not None
    assert repository[1] in (ROOT / "README.md").read_text("utf-8")
    assert repository[1].removeprefix("https://github.com/") in (ROOT / ".github/workflows/publish.yml").read_text(
        "utf-8"
    )


def test_a_release_needs_its_tag_and_its_section() -> None:
    project = 'name = "weightstream"\nversion = "1.2.0"\n'
    assert version_of(project) == "1.2.0"
    assert check("v1.2.0", project, CHANGES) == "### Added\n\n- A thing."
    assert check("refs/tags/v1.2.0", project, CHANGES) == "### Added\n\n- A thing."
    with pytest.raises(ReleaseError, match=r"v1\.2\.1 is not v1\.2\.0"):
        check("v1.2.1", project, CHANGES)
    with pytest.raises(ReleaseError, match=r'no heading "## \[1\.3\.0\]'):
        check("v1.3.0", project.replace("1.2.0", "1.3.0"), CHANGES)
    with pytest.raises(ReleaseError, match="no heading"):
        check("v1.2.0", project, CHANGES.replace("- 2026-01-31", "- soon"))


def test_the_version_has_a_place_in_the_changelog() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    version = version_of(PROJECT)
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert "## [Unreleased]" in changelog or f"## [{version}]" in changelog
