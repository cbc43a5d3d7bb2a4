"""What the documents quote is said by the pack, and where they link to is there; so are files that any text names."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
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

FOLDERS = (
    ".github",
    "benchmarks",
    "docs",
    "example_workflows",
    "locales",
    "nodes",
    "fleet",
    "streaming",
    "tests",
    "tools",
    "web",
)
PROGRAMS = [ROOT / "dev.py", *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
# A file of a room is named by its room and its own name, too.
ABOVE_ROOMS = (ROOT / "streaming", ROOT / "nodes")
FILE = re.compile(r"(?<![\w./<>*$-])(?:[\w.-]+/)*[\w-]+\.(?:py|mjs|js|css|html|md|yml|toml|txt)\b(?![\w/])")
FOLDER = re.compile(rf"(?<![\w./<>*$-])(?:{'|'.join(map(re.escape, FOLDERS))})(?:/[\w-]+)+(?![\w/<*-]|\.\w)")
# Cited as (hooks.py, Note: compiled models), `hooks.py` (*Note: compiled models*), or with "in `hooks.py`" behind it.
NOTE = re.compile(r"(?<!\[)Note: (?P<title>[^`]+?)(?=\* in `(?P<file>[\w/]+\.py)|\*|\)|$)")
BEFORE_NOTE = re.compile(r"([\w/]+\.py)[`,:( ]*\*?$")
# Of ComfyUI, written by a command, or standing for a name.
FOREIGN = {"main.py", "custom_node_manager.py", "table.txt", "NAME_program.py"}


def texts() -> Iterator[str]:
    """Every text in the code; … stands for what is put in."""
    for folder in ("fleet", "nodes", "streaming"):
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


def translated() -> list[str]:
    """The sentences of the server for which the page has Chinese ones."""
    table = (
        (ROOT / "web" / "lib" / "server_texts.mjs").read_text("utf-8").split("CHINESE_TEXTS = [")[1].split("\n];")[0]
    )
    return re.findall(r'^  \["(.+?)",', table, re.MULTILINE)


@pytest.mark.parametrize("sentence", translated())
def test_what_is_translated_is_said(sentence: str, said: list[str]) -> None:
    # Blocks and segments are counted in the singular too, and a sentence is put together from parts.
    counted = re.sub(r"\b(?:block|segment)s\b", "…", sentence)
    parts = [part.strip() for part in re.split(r"…|[,;:()]| over ", counted) if len(part.strip()) > 3]
    assert parts
    assert [part for part in parts if not any(part in text for text in said)] == []


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


def test_the_readme_is_short() -> None:
    """Words of tables count; marks and comments do not."""
    read = (ROOT / "README.md").read_text("utf-8").split("\n## Reference")[0]
    words = [word for word in re.sub("<!--.*?-->", "", read).split() if re.search(r"\w", word)]
    assert len(words) <= 1200


def test_every_picture_is_shown_somewhere() -> None:
    shown = {
        (document.parent / target).resolve().name
        for document in DOCUMENTS
        for target in re.findall(r"\]\(([^)\s]+\.png)\)", document.read_text("utf-8"))
    }
    assert {path.name for path in (ROOT / "docs" / "images").glob("*.png")} - shown == set()


def names_of_files(text: str) -> list[str]:
    """Files and folders that a text names; a part in capitals stands for a name."""
    text = re.sub(r"https?://\S+", "", text)
    found = [*FILE.findall(text), *FOLDER.findall(text)]
    return [name for name in found if name not in FOREIGN and not any(part.isupper() for part in Path(name).parts[:-1])]


def is_there(name: str, beside: Path, known: set[str]) -> bool:
    """A bare name may be that of any file."""
    places = (ROOT, beside, *ABOVE_ROOMS)
    return any((place / name).exists() for place in places) or ("/" not in name and name in known)


@pytest.fixture(scope="module")
def known() -> set[str]:
    """The names of all files."""
    paths = (*ROOT.iterdir(), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*")))
    return {path.name for path in paths if path.is_file()}


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "tools" / "mutants.txt"], ids=lambda path: path.name)
def test_files_that_a_document_names_are_there(document: Path, known: set[str]) -> None:
    names = names_of_files(document.read_text("utf-8"))
    assert [name for name in names if not is_there(name, document.parent, known)] == []


@cache
def explanations(program: Path) -> list[str]:
    """Docstrings, and comments; of several lines that follow each other as one text."""
    return [text for text in _explanations(program) if text]


def _explanations(program: Path) -> Iterator[str]:
    source, comment, last = program.read_text("utf-8"), "", 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != last + 1:
                yield comment
                comment = ""
            comment, last = f"{comment} {token.string.lstrip('# ')}", token.start[0]
    yield comment


def test_files_that_a_program_explains_are_there(known: set[str]) -> None:
    told = [(path, name) for path in PROGRAMS for text in explanations(path) for name in names_of_files(text)]
    assert len(told) > 100
    assert [(path.name, name) for path, name in told if not is_there(name, path.parent, known)] == []


def test_names_of_files_are_found_and_missed(known: set[str]) -> None:
    names = names_of_files("`run/lane.py`, lane.py, tests/gpu; run/lame.py, lame.py, DIR/any.py (tests/nowhere).")
    assert names == ["run/lane.py", "lane.py", "run/lame.py", "lame.py", "tests/gpu", "tests/nowhere"]
    missing = [name for name in names if not is_there(name, ROOT, known)]
    assert missing == ["run/lame.py", "lame.py", "tests/nowhere"]


def one_line(text: str) -> str:
    return " ".join(text.split())


def test_notes_that_somebody_cites_are_there() -> None:
    """By their titles, and in the file that is named with them."""
    notes = {
        (path, title)
        for path in PROGRAMS
        for text in explanations(path)
        for title in re.findall(r"\[Note: ([^\]]+)\]", one_line(text))
    }
    texts = [(path, one_line(text)) for path in PROGRAMS for text in explanations(path)]
    texts += [(path, one_line(path.read_text("utf-8"))) for path in DOCUMENTS]
    cited = [(path, found) for path, text in texts for found in NOTE.finditer(text)]
    assert len(cited) > 100
    missing = []
    for path, found in cited:
        before = BEFORE_NOTE.search(found.string[max(0, found.start() - 80) : found.start()])
        where = found["file"] or (before[1] if before else "")
        holders = [holder.as_posix() for holder, title in notes if found["title"].startswith(title)]
        if not any(holder.endswith(f"/{where}" if where else "") for holder in holders):
            missing.append((path.name, found[0]))
    assert missing == []
