"""locales/ says what the nodes' schemas say: in English word for word, in Chinese completely."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
from comfy_api.latest import io

LOCALES = Path(__file__).resolve().parents[2] / "locales"
LANGUAGES = sorted(folder.name for folder in LOCALES.iterdir())
HELP = LOCALES.parent / "web" / "docs"
ITEM = re.compile(r"^- (\*\*.+?)[:\uff1a]", re.MULTILINE)
# What the host reads (its custom_node_manager.py); it knows no other files.
FILES = {"main.json", "nodeDefs.json", "commands.json", "settings.json"}
CHINESE = re.compile(r"[\u4e00-\u9fff]")
# Terms that Chinese users write in Latin letters too.
NAMES_KEPT = {"CLIP", "VAE", "JSON", "WeightStream"}


def read(language: str, name: str) -> dict[str, Any]:
    return json.loads((LOCALES / language / name).read_text("utf-8"))


def flowing(text: str) -> str:
    """A docstring without the line breaks inside of its paragraphs."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in inspect.cleandoc(text).split("\n\n"))


def said_by(node: type[io.ComfyNode]) -> dict[str, Any]:
    """A node's texts in the form of nodeDefs.json."""
    schema = node.define_schema()
    inputs = {item.id: {"name": item.display_name or item.id, "tooltip": item.tooltip} for item in schema.inputs}
    outputs = {}
    for place, item in enumerate(schema.outputs):
        named = {"name": item.display_name} if item.display_name else {}
        outputs[str(place)] = {**named, "tooltip": item.tooltip}
    texts = {"display_name": schema.display_name, "description": flowing(schema.description)}
    return {**texts, "inputs": inputs, "outputs": outputs}


def leaves(tree: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {key: leaf for name, branch in tree.items() for key, leaf in leaves(branch, (*path, name)).items()}


@pytest.fixture(scope="module")
def schemas(nodes_of_pack: dict[str, type]) -> dict[str, Any]:
    return {node_id: said_by(node) for node_id, node in nodes_of_pack.items()}


def test_every_input_and_output_has_a_tooltip(schemas: dict[str, Any]) -> None:
    assert [path for path, text in leaves(schemas).items() if not text] == []


def test_english_is_what_the_schemas_say(schemas: dict[str, Any]) -> None:
    assert read("en", "nodeDefs.json") == schemas


def test_commands_and_settings_are_those_of_the_page() -> None:
    """Their ids without dots, as the page asks for them, and its own English texts."""
    scripts = "".join(path.read_text("utf-8") for path in (LOCALES.parent / "web").rglob("*.*js"))
    if not scripts:
        pytest.skip("no page is here")
    for name in ("commands.json", "settings.json"):
        for key, texts in read("en", name).items():
            assert f'"{key.replace("_", ".")}"' in scripts, key
            assert all(f'"{text}"' in scripts for text in texts.values()), texts


@pytest.mark.parametrize("language", LANGUAGES)
def test_languages_have_the_same_texts(language: str) -> None:
    assert {path.name for path in (LOCALES / language).iterdir()} <= FILES
    assert {path.name for path in (LOCALES / language).iterdir()} == {path.name for path in (LOCALES / "en").iterdir()}
    for name in (path.name for path in (LOCALES / "en").iterdir()):
        assert leaves(read(language, name)).keys() == leaves(read("en", name)).keys(), name


def test_chinese_is_chinese() -> None:
    for path in (LOCALES / "zh").iterdir():
        texts = leaves(read("zh", path.name))
        assert [key for key, text in texts.items() if not CHINESE.search(text) and text not in NAMES_KEPT] == []


def test_choices_and_flags_are_named_in_every_language(schemas: dict[str, Any]) -> None:
    """What a user types or chooses is the same word in each language."""
    words = re.compile(r"gpu:\d+(?:,gpu:\d+)*|--[\w-]+|WEIGHTSTREAM_\w+|\b\w+_device\b|models/\w+")
    chinese = leaves(read("zh", "nodeDefs.json"))
    for path, text in leaves(read("en", "nodeDefs.json")).items():
        if path[-1] != "name":
            assert sorted(words.findall(text)) == sorted(words.findall(chinese[path])), path


def items_of(page: Path) -> list[str]:
    """The names that begin the items of lists, in their order."""
    return [name for item in ITEM.findall(page.read_text("utf-8")) for name in re.findall(r"\*\*(.+?)\*\*", item)]


def test_help_has_every_input_in_every_language_and_fits_a_narrow_panel(schemas: dict[str, Any]) -> None:
    """Of a table ComfyUI's panel leaves the second column no room."""
    assert {page.stem for page in HELP.glob("*.md")} == set(schemas)
    for node_id, texts in schemas.items():
        others = [HELP / node_id / f"{language}.md" for language in LANGUAGES if language != "en"]
        pages = [HELP / f"{node_id}.md", *others]
        for page in pages:
            assert not [line for line in page.read_text("utf-8").splitlines() if line.startswith("|")], page
            assert set(texts["inputs"]) <= set(items_of(page)), page
            assert items_of(page) == items_of(pages[0]), page
        assert all(CHINESE.search(line) for line in pages[1].read_text("utf-8").splitlines() if line.startswith("- "))
