"""What the documents quote is said by the pack, and where they link to is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
TROUBLES = ROOT / "docs" / "troubleshooting.md"
PAGE_TEXTS = ROOT / "web" / "lib" / "strings.mjs"
# Stands for what is not known.
DASH = "\N{EN DASH}"
# What is made with a browser comes with the page.
PICTURES = {"docs/images/widget.png", "docs/images/nodes.png"}


def texts() -> Iterator[str]:
    """Every text in the code; … stands for what is put in."""
    for folder in ("nodes", "streaming"):
        for path in (ROOT / folder).rglob("*.py"):
            for found in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(found, ast.JoinedStr):
                    parts = (str(part.value) if isinstance(part, ast.Constant) else "…" for part in found.values)
                    yield "".join(parts)
                elif isinstance(found, ast.Constant) and isinstance(found.value, str):
                    yield re.sub(r"%(?:\.\d)?[sdf]", "…", found.value)


def quoted(of_the_page: bool) -> list[str]:
    """The code in the first column of the tables: lines of the server, or words of the page."""
    text = TROUBLES.read_text("utf-8").split("## The page")[of_the_page]
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return [quote for row in rows for quote in re.findall(r"`([^`]+)`", row)]


def fragments(text: str) -> list[str]:
    """What is always the same in it."""
    return [part.strip() for part in re.split(r"\s*…[\s,;:()]*", text) if len(part.strip()) > 3]


@pytest.fixture(scope="module")
def said() -> list[str]:
    return [" ".join(text.split()) for text in texts()]


@pytest.mark.parametrize("quote", quoted(of_the_page=False))
def test_a_quoted_line_is_said(quote: str, said: list[str]) -> None:
    assert fragments(quote)
    assert any(all(part in text for part in fragments(quote)) for text in said), quote


@pytest.mark.parametrize("quote", quoted(of_the_page=True))
def test_a_quoted_word_is_shown(quote: str) -> None:
    english = PAGE_TEXTS.read_text("utf-8").split("const CHINESE")[0]
    assert quote == DASH or quote in english


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text("utf-8")):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        if path.relative_to(ROOT).as_posix() in PICTURES:
            continue
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target
