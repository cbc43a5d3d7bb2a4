"""API prompts: nodes by id, each with its inputs, where a link is a pair of id and output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .graph import LINKED, Node, Taker
from .kinds import DIFFUSION_LOADER, GIVE_MODEL, LOADER, TAKE_MODEL, THROUGH, Kind
from .multigpu import SELECTOR, find


class Link(NamedTuple):
    """Where a link begins, and at which node and input it ends."""

    source: str
    output: int
    target: str
    name: str


class PromptGraph:
    """An API prompt.

    Args:
        prompt: its JSON, which is changed.
    """

    name = ""
    frame: frozenset[Any] = frozenset()

    def __init__(self, prompt: dict[str, Any]) -> None:
        self._prompt = prompt
        for number in [number for number, node in prompt.items() if node is None]:
            del prompt[number]
        self._forget()

    def nodes(self) -> Sequence[Node]:
        return [Node(number, node["class_type"]) for number, node in self._prompt.items()]

    def model_outputs(self, node: Node) -> Sequence[int]:
        if node.kind in TAKE_MODEL:
            return []
        known = {0} if node.kind in GIVE_MODEL else set()
        taken = {link.output for link in self._links_from(node) if self._takes_model(link)}
        takes = any(_is_model(name) for name, value in self._inputs(node).items() if _is_link(value))
        if not known and (takes or not taken or self._is_behind_model(node)):
            return []
        return sorted(known | taken)

    def output(self, node: Node, type_: str, place: int) -> int:
        return place

    def takers(self, node: Node, place: int) -> Sequence[Taker]:
        return [self._taker(link) for link in self._links_from(node) if link.output == place]

    def passed_on(self, taker: Taker) -> Sequence[Taker]:
        links = self._links_from(taker.node)
        places = sorted({link.output for link in links if _is_model(link.name)})
        return [behind for place in places for behind in self.takers(taker.node, place)]

    def followers(self) -> Mapping[Any, set[Any]]:
        found: dict[Any, set[Any]] = {}
        for link in self._links():
            found.setdefault(link.source, set()).add(link.target)
        return found

    def values(self, node: Node, names: Sequence[str]) -> Mapping[str, Any]:
        return {name: self._value(value) for name, value in self._inputs(node).items()}

    def become(self, node: Node, kind: Kind, values: Mapping[str, Any], names: Sequence[str] = ()) -> Sequence[str]:
        there = self._prompt[node.id]
        known = {*kind.widgets, *(socket.name for socket in kind.sockets)}
        kept = {name: value for name, value in there["inputs"].items() if name in known}
        changed = {name: value for name, value in values.items() if value is not LINKED}
        unlinked = [name for name, value in there["inputs"].items() if name not in known and _is_link(value)]
        there["class_type"] = kind.name
        there["inputs"] = {**kept, **changed}
        if "title" in (there.get("_meta") or {}):
            there["_meta"]["title"] = kind.title
        self._forget()
        return unlinked

    def add(self, kind: Kind, near: Node, values: Mapping[str, Any]) -> Node:
        number = self._new_id()
        chosen = {name: value for name, value in kind.widgets.items() if name not in kind.optional} | dict(values)
        self._prompt[number] = {"class_type": kind.name, "inputs": chosen, "_meta": {"title": kind.title}}
        return Node(number, kind.name)

    def set_values(self, node: Node, kind: Kind, values: Mapping[str, Any]) -> None:
        self._inputs(node).update(values)

    def is_linked(self, node: Node, name: str) -> bool:
        return _is_link(self._inputs(node).get(name))

    def lead_through(
        self, source: tuple[Node, int], node: Node, kind: Kind, name: str, stay: frozenset[Any] = frozenset()
    ) -> tuple[Node, int]:
        giving = [socket.name for socket in kind.sockets].index(name)
        for link in self._links_from(source[0]):
            if link.output == source[1] and link.target not in stay:
                self._prompt[link.target]["inputs"][link.name] = [node.id, giving]
        inputs = self._inputs(node)
        links = {name: value for name, value in inputs.items() if _is_link(value)}
        self._prompt[node.id]["inputs"] = {**links, name: [source[0].id, source[1]], **inputs}
        self._forget()
        return node, giving

    def remove_unused(self, kind: str) -> Sequence[Node]:
        used = {link.source for link in self._links()}
        gone = [node for node in self.nodes() if node.kind == kind and node.id not in used]
        for node in gone:
            del self._prompt[node.id]
        self._forget()
        return gone

    def take_open_inputs(self) -> Sequence[str]:
        return ()

    def _links(self) -> Iterator[Link]:
        for number, node in self._prompt.items():
            for name, value in node["inputs"].items():
                if _is_link(value):
                    yield Link(value[0], int(value[1]), number, name)

    def _links_from(self, node: Node) -> Sequence[Link]:
        if not self._by_source:
            for link in self._links():
                self._by_source.setdefault(link.source, []).append(link)
        return self._by_source.get(node.id, ())

    def _forget(self) -> None:
        """What was found out of the links does not hold any more."""
        self._by_source: dict[str, list[Link]] = {}

    def _taker(self, link: Link) -> Taker:
        return Taker(self, Node(link.target, self._prompt[link.target]["class_type"]), link.name)

    def _takes_model(self, link: Link) -> bool:
        return link.name == "model" and self._prompt[link.target]["class_type"] in TAKE_MODEL

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

    def _new_id(self) -> str:
        """An id that no node has, and no link to a node that is not there."""
        known = {*self._prompt, *(link.source for link in self._links())}
        numbers = [int(number) for number in known if number.isascii() and number.isdigit()]
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
    """As ComfyUI says it."""
    is_pair = isinstance(value, list) and len(value) == 2
    return is_pair and isinstance(value[0], str) and isinstance(value[1], (int, float))
