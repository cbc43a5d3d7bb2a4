"""The order of the rooms (docs/architecture.md): imports go downward, in circles nowhere, those for types included."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Each room may import those before it. "" is what lies beside the rooms, above all of them.
ROOMS = {
    "streaming": [
        "workflows",
        "planning",
        "estimating",
        "files",
        "sharing",
        "devices",
        "packing",
        "machine",
        "split",
        "parallel",
        "model",
        "memory",
        "run",
        "handoff",
        "",
    ],
    "nodes": ["host", "tell", "state", "model", "twins", "parallel", "page", "fleet", ""],
}
# Beside the rooms, and for everybody.
SHARED = {"streaming": {"config", "errors", "collector", "threads"}, "nodes": set()}
PROGRAMS = ("benchmarks", "tools")
# Stands by itself: workers get its classes by value, wherever they run.
ALONE = "fleet"

Module = tuple[str, ...]


def modules(folder: str) -> dict[Module, Path]:
    """The files of a folder by what they are imported as, its rooms included."""
    paths = sorted((ROOT / folder).rglob("*.py"))
    return {path.relative_to(ROOT).with_suffix("").parts: path for path in paths}


def imported(module: Module, path: Path, known: dict[Module, Path]) -> Iterator[Module]:
    """Those of ``known`` that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            # A package is named by its __init__, which is one step further in.
            base = (*module[: -node.level], *(node.module.split(".") if node.module else ()))
        elif isinstance(node, ast.ImportFrom) and node.module:
            base = (module[0], *node.module.split("."))
        elif isinstance(node, ast.Import):
            yield from (one for name in node.names if (one := (module[0], *name.name.split("."))) in known)
            continue
        else:
            continue
        for name in node.names:
            found = ((*base, name.name), base, (*base, "__init__"))
            yield from [one for one in found if one in known][:1]


def graph(folder: str) -> dict[Module, set[Module]]:
    known = modules(folder)
    return {module: set(imported(module, path, known)) - {module} for module, path in known.items()}


@pytest.mark.parametrize("folder", [*ROOMS, *PROGRAMS])
def test_nobody_imports_in_a_circle(folder: str) -> None:
    found = graph(folder)
    assert sum(map(len, found.values())) > 10, "imports are not found"
    try:
        TopologicalSorter(found).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join("/".join(module) for module in error.args[1]))


@pytest.mark.parametrize("folder", ROOMS)
def test_rooms_import_what_lies_below_them(folder: str) -> None:
    order = ROOMS[folder]
    upward = [
        f"{'/'.join(module)} imports {'/'.join(other)}"
        for module, others in graph(folder).items()
        for other in others
        if order.index(room_of(other)) > order.index(room_of(module)) and not is_shared(other)
    ]
    assert upward == []


def is_shared(module: Module) -> bool:
    return len(module) == 2 and module[1] in SHARED[module[0]]


def test_what_is_for_everybody_imports_no_room() -> None:
    found = [(module, others) for module, others in graph("streaming").items() if is_shared(module)]
    assert len(found) == len(SHARED["streaming"])
    assert [(module, one) for module, others in found for one in others if not is_shared(one)] == []


def test_the_engine_knows_of_no_other_folder() -> None:
    """Absolute names are for a linter rule; relative ones would reach the pack."""
    above = [
        (module, node.module)
        for module, path in modules("streaming").items()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level >= len(module)
    ]
    assert above == []


def room_of(module: Module) -> str:
    return module[1] if len(module) > 2 else ""


@pytest.mark.parametrize("folder", ROOMS)
def test_each_room_is_in_the_order_and_says_what_it_is_for(folder: str) -> None:
    rooms = {path.parent.name: path for path in (ROOT / folder).glob("*/__init__.py")}
    assert rooms.keys() == {room for room in ROOMS[folder] if room}
    assert all(ast.get_docstring(ast.parse(path.read_text("utf-8"))) for path in rooms.values())


def test_planning_is_pure() -> None:
    """It is tried over all small sizes, and in simulations: nothing there depends on a device or a clock."""
    allowed = {"__future__", "bisect", "collections", "dataclasses", "enum", "functools", "heapq", "itertools", "math"}
    allowed |= {"numpy", "operator", "statistics", "typing"}
    found = {
        (path.name, name.partition(".")[0])
        for path in (ROOT / "streaming" / "planning").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        for name in names_of(node)
    }
    assert {name for name in found if name[1] not in allowed} == set()
    below = {("streaming", name) for name in ("config", "errors", "collector")}
    others = {
        other for module, others in graph("streaming").items() if room_of(module) == "planning" for other in others
    }
    assert {other for other in others if room_of(other) != "planning"} <= below


def names_of(node: ast.AST) -> list[str]:
    """What a line imports that is not ours."""
    if isinstance(node, ast.Import):
        return [name.name for name in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and not node.level and node.module else []


def test_programs_in_strings_import_what_is_there() -> None:
    """Nobody moves the imports of a program in a string along with a file, and some run only where there is a GPU."""
    known = {".".join(name): path for folder in ROOMS for name, path in modules(folder).items()}
    checked = 0
    for path in [path for folder in ("tests", *PROGRAMS) for path in (ROOT / folder).rglob("*.py")]:
        for module, names in [found for text in strings(path) for found in imports_of(text)]:
            source = known.get(module) or known.get(f"{module}.__init__")
            assert source is not None, f"{path.name}: {module} is not there"
            there = source.read_text("utf-8")
            missing = [name for name in names if name not in there and f"{module}.{name}" not in known]
            assert not missing, f"{path.name}: {module} has no {missing[0]}"
            checked += 1
    assert checked > 3, "imports in strings are not found"


def strings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def imports_of(text: str) -> Iterator[tuple[str, list[str]]]:
    """Modules of ours that a program imports, with what it takes from them, or that a string names."""
    if re.fullmatch(rf"weightstream(_pack)?\.({'|'.join(ROOMS)})(\.\w+)+", text):
        yield text.partition(".")[2], []
    if "import" not in text:
        return
    try:
        program = ast.parse(text)
    except SyntaxError:  # Prose.
        return
    for node in ast.walk(program):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            name = re.sub(r"^weightstream(_pack)?\.", "", node.module)
            if name.split(".")[0] in ROOMS:
                yield name, [one.name for one in node.names]


def test_the_fleet_needs_neither_comfyui_nor_the_engine() -> None:
    known = {**modules(ALONE), **modules("streaming"), **modules("nodes")}
    for module, path in modules(ALONE).items():
        assert {other[0] for other in imported(module, path, known)} <= {ALONE}, path
        assert not re.search(
            r"^\s*(from|import) (comfy|torch|folder_paths|nodes|server|execution)", path.read_text("utf-8"), re.M
        )
