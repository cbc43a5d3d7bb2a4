"""API prompts: nodes by id, each with its inputs, where a link is a pair of id and output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .graph import LINKED, Node
from .kinds import DIFFUSION_LOADER, GIVE_MODEL, LOADER, TAKE_MODEL, THROUGH, Kind
from .multigpu import SELECTOR, find


class PromptGraph:
    """An API prompt."""

    name = ""
    frame: frozenset[Any] = frozenset()

    def __init__(self, prompt: dict[str, Any]) -> None:
        self._prompt = prompt

    def nodes(self) -> Sequence[Node]:
        return [Node(number, node["class_type"]) for number, node in self._prompt.items()]

    def model_output(self, node: Node) -> int | None:
        if node.kind in GIVE_MODEL:
            return 0
        takes = any(_is_model(name) for name, value in self._inputs(node).items() if _is_link(value))
        places = [
            value[1]
            for other in self._prompt.values()
            for name, value in other["inputs"].items()
            if name == "model" and other["class_type"] in TAKE_MODEL and _is_link(value) and value[0] == node.id
        ]
        return None if takes or not places or self._is_behind_model(node) else min(places)

    def output(self, node: Node, type_: str, place: int) -> int:
        return place

    def consumers(self, node: Node, place: int) -> Sequence[Node | None]:
        return [
            Node(number, other["class_type"])
            for number, other in self._prompt.items()
            for value in other["inputs"].values()
            if _is_link(value) and value == [node.id, place]
        ]

    def passes_model(self, node: Node) -> Sequence[int]:
        return sorted({place for source, place, name in self._links() if source == node.id and _is_model(name)})

    def followers(self) -> Mapping[Any, set[Any]]:
        found: dict[Any, set[Any]] = {}
        for number, node in self._prompt.items():
            for value in filter(_is_link, node["inputs"].values()):
                found.setdefault(value[0], set()).add(number)
        return found

    def values(self, node: Node, names: Sequence[str]) -> Mapping[str, Any]:
        return {name: self._value(value) for name, value in self._inputs(node).items()}

    def become(self, node: Node, kind: Kind, values: Mapping[str, Any], names: Sequence[str] = ()) -> None:
        there = self._prompt[str(node.id)]
        sockets = {socket.name for socket in kind.sockets}
        kept = {name: value for name, value in there["inputs"].items() if name in kind.widgets or name in sockets}
        changed = {name: value for name, value in values.items() if value is not LINKED}
        there["class_type"] = kind.name
        there["inputs"] = {**kept, **changed}
        if "title" in (there.get("_meta") or {}):
            there["_meta"]["title"] = kind.title

    def insert(
        self,
        kind: Kind,
        near: Node,
        values: Mapping[str, Any],
        links: Mapping[str, tuple[Node, int]],
        stay: frozenset[Any] = frozenset(),
    ) -> Node:
        number = self._new_id()
        places = {socket.name: place for place, socket in enumerate(kind.sockets)}
        for name, (source, output) in links.items():
            self._lead(source.id, output, number, places[name], stay if name == "model" else frozenset())
        chosen = {name: value for name, value in kind.widgets.items() if name not in kind.optional} | dict(values)
        inputs = {name: [source.id, output] for name, (source, output) in links.items()}
        self._prompt[number] = {"class_type": kind.name, "inputs": {**inputs, **chosen}, "_meta": {"title": kind.title}}
        return Node(number, kind.name)

    def remove_unused(self, kind: str) -> Sequence[Node]:
        used = {value[0] for node in self._prompt.values() for value in node["inputs"].values() if _is_link(value)}
        gone = [node for node in self.nodes() if node.kind == kind and node.id not in used]
        for node in gone:
            del self._prompt[node.id]
        return gone

    def take_open_inputs(self) -> Sequence[str]:
        return ()

    def _links(self) -> Iterator[tuple[str, int, str]]:
        """The source, its output and the name of the input of each link."""
        for node in self._prompt.values():
            for name, value in node["inputs"].items():
                if _is_link(value):
                    yield value[0], value[1], name

    def _is_behind_model(self, node: Node) -> bool:
        """Whether the node takes something that comes from what is known to give a MODEL: a pipe, or a switch."""
        seen: set[str] = set()
        waiting = [node.id]
        while waiting:
            inputs = self._prompt.get(waiting.pop(), {}).get("inputs", {})
            sources = {value[0] for value in inputs.values() if _is_link(value)} - seen
            if any(_gives_model(self._prompt.get(source, {}).get("class_type", "")) for source in sources):
                return True
            seen |= sources
            waiting += sources
        return False

    def _inputs(self, node: Node) -> dict[str, Any]:
        return self._prompt[node.id]["inputs"]

    def _value(self, value: Any) -> Any:
        passed: set[str] = set()
        while _is_link(value):
            source = self._prompt.get(value[0], {})
            if source.get("class_type") != SELECTOR or value[0] in passed:
                return LINKED
            passed.add(value[0])
            value = source["inputs"].get("device", LINKED)
        return value

    def _lead(self, source: str, output: int, target: str, place: int, stay: frozenset[Any]) -> None:
        """What came from ``source`` comes from ``target`` from now on."""
        for number, node in self._prompt.items():
            if number in stay:
                continue
            for name, value in node["inputs"].items():
                if _is_link(value) and value == [source, output]:
                    node["inputs"][name] = [target, place]

    def _new_id(self) -> str:
        numbers = [int(number) for number in self._prompt if number.isascii() and number.isdigit()]
        return str(max(numbers, default=0) + 1)


def _is_model(name: str) -> bool:
    """Whether an input of this name takes a MODEL."""
    return name.startswith("model")


def _gives_model(kind: str) -> bool:
    if kind in GIVE_MODEL or kind in (DIFFUSION_LOADER, LOADER.name) or kind in THROUGH:
        return True
    archived = find(kind)
    return archived is not None and "model" in archived.roles


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)
