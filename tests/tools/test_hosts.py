"""tools/hosts.py: which releases of ComfyUI the daily run tests, and how it tells what broke there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools import hosts

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "hosts.py"
OLDEST = (0, 30, 0)


def remote(*tags: str) -> list[str]:
    """What ``git ls-remote --tags`` prints."""
    return [f"{number:040x}\trefs/tags/{tag}\n" for number, tag in enumerate(tags)]


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        (["v0.30.0"], ["v0.30.0"]),
        (["v0.31.0", "v0.30.0", "v0.30.2", "v0.31.1", "v0.30.1"], ["v0.30.0", "v0.30.2", "v0.31.1"]),
        (["v0.30.0", "v0.29.9", "v0.3.64", "v0.4.0"], ["v0.30.0"]),
        (["v0.30.0", "v0.39.0", "v0.39.10", "v0.39.9"], ["v0.30.0", "v0.39.10"]),
        (["v0.30.0", "v0.99.3", "v1.0.0", "v1.0.1"], ["v0.30.0", "v0.99.3", "v1.0.1"]),
        (["v0.30.0", "v0.30.0^{}", "v0.31.0-rc1", "latest", "0.32.0", "v0.33"], ["v0.30.0"]),
    ],
)
def test_the_oldest_and_the_last_patch_of_each_minor_are_tested(tags: list[str], expected: list[str]) -> None:
    assert hosts.releases(remote(*tags), OLDEST) == expected


def test_the_matrix_is_one_line_of_json_and_ends_with_what_comes_next() -> None:
    command = [sys.executable, str(SCRIPT), "releases"]
    text = "".join(remote("v0.30.0", "v0.46.1"))
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    name, _, value = done.stdout.strip().partition("=")
    assert name == "refs"
    assert json.loads(value) == ["v0.30.0", "v0.46.1", "master"]


def test_no_answer_is_a_failure() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "releases"], input="", capture_output=True, text=True)
    assert done.returncode != 0
    assert "no release after v0.30.0" in done.stderr


def test_the_oldest_release_is_the_one_that_the_pack_requires() -> None:
    assert hosts.oldest_supported((ROOT / "pyproject.toml").read_text("utf-8")) == OLDEST
    with pytest.raises(ValueError, match="requires-comfyui"):
        hosts.oldest_supported("[tool.comfy]")


def junit(path: Path, failed: dict[str, str], skipped: dict[str, str] | None = None) -> Path:
    """A report as pytest writes it, with one test that passed beside those that failed or were skipped."""
    cases = [
        f'<testcase classname="tests.nodes" name="{name}"><{outcome} message="{why}">trace</{outcome}></testcase>'
        for outcome, found in (("failure", failed), ("skipped", skipped or {}))
        for name, why in found.items()
    ]
    passed = '<testcase classname="tests.nodes" name="test_fine"/>'
    path.write_text(f"<testsuites><testsuite>{passed}{''.join(cases)}</testsuite></testsuites>", "utf-8")
    return path


def test_the_summary_names_broken_contracts_once_and_then_the_rest(tmp_path: Path) -> None:
    broken = {"test_clone": "TypeError: got &apos;fast_disk&apos;&#10;second line"}
    junit(tmp_path / "contracts.xml", broken, {"test_records": "it keeps none"})
    junit(tmp_path / "all.xml", broken | {"test_lora": "`wrong`"}, {"test_browser": "no browser"})
    text = hosts.summary("v0.46.1", tmp_path, "success")
    assert text.startswith("### ComfyUI v0.46.1\n")
    assert "Contracts of the host that failed: 1\n" in text
    assert text.count("test_clone") == 1
    assert "- `tests.nodes.test_clone`: `TypeError: got 'fast_disk'`" in text
    assert (
        text.index("test_clone")
        < text.index("Tests that failed: 1\n")
        < text.index("- `tests.nodes.test_lora`: `'wrong'`")
    )
    assert "that were not asked for: 1\n\n- `tests.nodes.test_records`: `it keeps none`" in text
    assert "test_fine" not in text
    assert "test_browser" not in text


def test_a_report_that_is_not_there_is_said(tmp_path: Path) -> None:
    junit(tmp_path / "all.xml", {})
    text = hosts.summary("master", tmp_path, "success")
    assert "Contracts of the host did not run to their end." in text
    assert "failed" not in text


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    junit(tmp_path / "contracts.xml", {})
    junit(tmp_path / "all.xml", {f"test_{number}": "no" for number in range(hosts.MOST_TOLD + 3)})
    text = hosts.summary("master", tmp_path, "success")
    assert text.count("tests.nodes.test_") == hosts.MOST_TOLD
    assert "- and 3 more" in text


def test_an_environment_that_could_not_be_made_is_said(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "summary", "master", str(tmp_path), "--environment", "failure"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Its environment could not be made (failure): nothing was tested." in done.stdout
