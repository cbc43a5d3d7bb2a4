"""Workflows as the page saves them: nodes with slots and places on the canvas, links with ids, and subgraphs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .graph import LINKED, Node
from .kinds import GIVE_MODEL, MODEL, PAGE_ONLY, PLAIN_TYPES, Kind

FIELDS = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
# The frame of a subgraph counts as a node for links.
INPUTS, OUTPUTS = -10, -20
OPTIONAL_SHAPE = 7
GAP, TITLE = 40, 30
MUTED = 2
SELECTOR = "DeviceSelectorMultiGPU"


class Numbers:
    """Hands out ids of nodes and links that nothing in the file has, in subgraphs neither."""

    def __init__(self, workflow: dict[str, Any]) -> None:
        self._graphs = [workflow, *subgraphs_of(workflow)]
        self._node = self._most("nodes", "last_node_id", "lastNodeId")
        self._link = self._most("links", "last_link_id", "lastLinkId")

    def _most(self, items: str, *names: str) -> int:
        found = [0]
        for graph in self._graphs:
            found += [_field(item, "id") for item in graph.get(items) or () if item is not None]
            found += [holder.get(name) for holder in (graph, graph.get("state") or {}) for name in names]
        return max(number for number in map(_plain, found) if isinstance(number, int))

    def node(self) -> int:
        self._node += 1
        self._write("last_node_id", "lastNodeId", self._node)
        return self._node

    def link(self) -> int:
        self._link += 1
        self._write("last_link_id", "lastLinkId", self._link)
        return self._link

    def _write(self, name: str, state_name: str, number: int) -> None:
        for graph in self._graphs:
            if name in graph:
                graph[name] = number
            if state_name in (graph.get("state") or {}):
                graph["state"][state_name] = number


class Links:
    """The links of one graph: lists in a workflow of version 0.4, objects in newer ones and in subgraphs."""

    def __init__(self, items: list[Any], as_objects: bool) -> None:
        items[:] = [item for item in items if item is not None]
        if not all(isinstance(item, dict) or len(item) >= len(FIELDS) - 1 for item in items):
            raise ValueError("a link is too short")
        self._items = items
        self._as_objects = as_objects or any(isinstance(item, dict) for item in items)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def leading_from(self, node: Any, place: int) -> list[Any]:
        return [
            item
            for item in self._items
            if (_plain(_field(item, "origin_id")), _field(item, "origin_slot")) == (_plain(node), place)
        ]

    def find(self, number: Any) -> Any:
        return next((item for item in self._items if _plain(_field(item, "id")) == _plain(number)), None)

    def add(self, *values: Any) -> None:
        self._items.append(dict(zip(FIELDS, values, strict=True)) if self._as_objects else list(values))

    def remove(self, link: Any) -> None:
        self._items.remove(link)


class PageGraph:
    """A workflow, or one of its subgraphs.

    Args:
        graph: its JSON, which is changed.
        numbers: of the whole file.
        subgraphs: ids of all subgraphs, which are classes of nodes too.
    """

    frame: frozenset[Any] = frozenset({INPUTS, OUTPUTS})

    def __init__(self, graph: dict[str, Any], numbers: Numbers, subgraphs: Iterable[str], name: str = "") -> None:
        self.name = name
        self._subgraphs = frozenset(subgraphs)
        # As a class of nodes; none for the workflow itself.
        self.id = graph["id"] if graph.get("id") in self._subgraphs else None
        self._graph = graph
        self._numbers = numbers
        graph["links"] = graph.get("links") or []
        self._links = Links(graph["links"], as_objects="inputNode" in graph)
        self._open_inputs: list[str] = []
        # Widgets that are gone, each by its node and name.
        self.gone_widgets: set[tuple[str, str]] = set()

    def nodes(self) -> Sequence[Node]:
        return [
            Node(_plain(node["id"]), str(node["type"]), int(node.get("mode") or 0)) for node in self._graph["nodes"]
        ]

    def model_output(self, node: Node) -> int | None:
        there = self._find(node.id)
        if node.kind in PAGE_ONLY or node.kind in self._subgraphs:
            return None
        inputs = there.get("inputs") or ()
        if any(map(_takes_model, inputs)):
            return None
        # A pipe or a switch gives on what comes from elsewhere.
        if node.kind not in GIVE_MODEL and any(map(_takes_part, inputs)):
            return None
        types = [one.get("type") for one in there.get("outputs") or ()]
        return types.index(MODEL) if MODEL in types else None

    def output(self, node: Node, type_: str, place: int) -> int:
        types = [one.get("type") for one in self._find(node.id).get("outputs") or ()]
        return types.index(type_) if type_ in types else place

    def consumers(self, node: Node, place: int) -> Sequence[Node | None]:
        known = {other.id: other for other in self.nodes()}
        return [known.get(_plain(_field(link, "target_id"))) for link in self._links.leading_from(node.id, place)]

    def passes_model(self, node: Node) -> Sequence[int]:
        there = self._find(node.id)
        if node.mode == MUTED or not any(map(_takes_model, there.get("inputs") or ())):
            return []
        return [place for place, one in enumerate(there.get("outputs") or ()) if one.get("type") in (MODEL, "*")]

    def followers(self) -> Mapping[Any, set[Any]]:
        found: dict[Any, set[Any]] = {}
        for link in self._links:
            found.setdefault(_plain(_field(link, "origin_id")), set()).add(_plain(_field(link, "target_id")))
        return found

    def values(self, node: Node, names: Sequence[str]) -> Mapping[str, Any]:
        there = self._find(node.id)
        found = _widget_values(there, names)
        for one in there.get("inputs") or ():
            if one.get("link") is not None and one["name"] in names:
                found[one["name"]] = self._value_behind(one["link"])
        return found

    def become(self, node: Node, kind: Kind, values: Mapping[str, Any], names: Sequence[str] = ()) -> None:
        there = self._find(node.id)
        known = {name: value for name, value in values.items() if value is not LINKED}
        old = _widget_values(there, names or list(kind.widgets))
        wanted = {name: known.get(name, old.get(name, default)) for name, default in kind.widgets.items()}
        for one in there.get("inputs") or ():
            if one["name"] in known and (link := self._links.find(one.get("link"))) is not None:
                self._cut(link)
                one["link"] = None
        self._keep_inputs(there, {*kind.widgets, *(socket.name for socket in kind.sockets)})
        self.gone_widgets |= {(str(node.id), name) for name in old if name not in kind.widgets}
        there["outputs"] = outputs = there.get("outputs") or []
        outputs += [{"name": name, "type": type_, "links": []} for name, type_, _ in kind.outputs[len(outputs) :]]
        there["type"], there["widgets_values"] = kind.name, list(wanted.values())
        there["properties"] = _properties(kind, there.get("properties") or {})

    def insert(
        self,
        kind: Kind,
        near: Node,
        values: Mapping[str, Any],
        links: Mapping[str, tuple[Node, int]],
        stay: frozenset[Any] = frozenset(),
    ) -> Node:
        number = self._numbers.node()
        places = {socket.name: place for place, socket in enumerate(kind.sockets)}
        beside = self._find(near.id)
        there: dict[str, Any] = {
            "id": number,
            "type": kind.name,
            "pos": self._free_place(beside, kind.size),
            "size": list(kind.size),
            "flags": {},
            "order": int(beside.get("order") or 0) + 1,
            "mode": near.mode,
            "inputs": [_input(*socket) for socket in kind.sockets],
            "outputs": [{"name": name, "type": type_, "links": []} for name, type_, _ in kind.outputs],
            "properties": _properties(kind, {}),
            "widgets_values": list({**kind.widgets, **values}.values()),
        }
        for name, (source, output) in links.items():
            self._lead(source.id, output, there, places[name], stay if name == "model" else frozenset())
        self._graph["nodes"].append(there)
        return Node(number, kind.name, near.mode)

    def remove_unused(self, kind: str) -> Sequence[Node]:
        leading = {_plain(_field(link, "origin_id")) for link in self._links}
        gone = [node for node in self.nodes() if node.kind == kind and node.id not in leading]
        numbers = {node.id for node in gone}
        self._graph["nodes"][:] = [node for node in self._graph["nodes"] if _plain(node["id"]) not in numbers]
        return gone

    def take_open_inputs(self) -> Sequence[str]:
        taken, self._open_inputs = self._open_inputs, []
        return taken

    # -- links ---------------------------------------------------------------------------------------------------------

    def _lead(self, source: Any, output: int, there: dict[str, Any], place: int, stay: frozenset[Any]) -> None:
        """Put ``there`` between an output and what it leads to. Those links keep their ids, so reroutes keep them."""
        leading = self._links.leading_from(source, output)
        moved = [link for link in leading if _plain(_field(link, "target_id")) not in stay]
        kept = [_field(link, "id") for link in leading if link not in moved]
        for link in moved:
            _set(link, "origin_id", there["id"])
            _set(link, "origin_slot", place)
        there["outputs"][place]["links"] = [_field(link, "id") for link in moved]
        number = self._numbers.link()
        self._links.add(number, self._find(source)["id"], output, there["id"], place, there["inputs"][place]["type"])
        there["inputs"][place]["link"] = number
        self._find(source)["outputs"][output]["links"] = [*kept, number]

    def _keep_inputs(self, there: dict[str, Any], names: set[str]) -> None:
        """Remove the inputs of other names, with their links; those behind them move up."""
        inputs = there.get("inputs") or []
        for one in [one for one in inputs if one["name"] not in names]:
            if (link := self._links.find(one.get("link"))) is not None:
                self._cut(link)
            inputs.remove(one)
        for place, one in enumerate(inputs):
            if (link := self._links.find(one.get("link"))) is not None:
                _set(link, "target_slot", place)
        there["inputs"] = inputs

    def _cut(self, link: Any) -> None:
        number, origin, place = (_plain(_field(link, name)) for name in ("id", "origin_id", "origin_slot"))
        self._links.remove(link)
        if origin == INPUTS:
            entry = self._graph["inputs"][place]
            entry["linkIds"] = [other for other in entry.get("linkIds") or () if _plain(other) != number]
            if not entry["linkIds"]:
                self._open_inputs.append(entry["name"])
            return
        output = self._find(origin)["outputs"][place]
        output["links"] = [other for other in output.get("links") or () if _plain(other) != number]

    def _value_behind(self, number: Any) -> Any:
        """What a device selector at the other end of a link says."""
        link = self._links.find(number)
        source = None if link is None else self._find_or_none(_field(link, "origin_id"))
        if source is None or source["type"] != SELECTOR:
            return LINKED
        return _widget_values(source, ["device"]).get("device", LINKED)

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def _find_or_none(self, number: Any) -> dict[str, Any] | None:
        return next((node for node in self._graph["nodes"] if _plain(node["id"]) == _plain(number)), None)

    def _find(self, number: Any) -> dict[str, Any]:
        found = self._find_or_none(number)
        assert found is not None, number
        return found

    def _free_place(self, beside: dict[str, Any], size: tuple[int, int]) -> list[float]:
        """The nearest place in a node's column, or in one beside it, where no other node lies."""
        taken = [_box(node) for node in self._graph["nodes"]]
        left, top, right, _ = _box(beside)
        width, height = size[0], size[1] + TITLE
        tops = {top, *(box[3] + GAP for box in taken), *(box[1] - height - GAP for box in taken)}
        places = [(x, y) for x in (left, left - width - GAP, right + GAP) for y in tops]
        free = [(x, y) for x, y in places if not any(_overlap((x, y, x + width, y + height), box) for box in taken)]
        x, y = min(free, key=lambda place: (abs(place[0] - left) + abs(place[1] - top), place))
        return [x, y + TITLE]


def subgraphs_of(workflow: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The definitions of a workflow's subgraphs, nested ones among them."""
    return list((workflow.get("definitions") or {}).get("subgraphs") or ())


def _plain(number: Any) -> Any:
    """An id as it is compared: other programs write 1 as "1" or 1.0 too, and not everywhere alike."""
    if isinstance(number, str) and number.isascii() and number.isdigit() and len(number) < 16:
        return int(number)
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _field(link: Any, name: str) -> Any:
    return link.get(name) if isinstance(link, dict) else link[FIELDS.index(name)]


def _set(link: Any, name: str, value: Any) -> None:
    link[name if isinstance(link, dict) else FIELDS.index(name)] = value


def _takes_model(one: Mapping[str, Any]) -> bool:
    return bool({MODEL, "*"} & set(str(one.get("type")).split(",")))


def _takes_part(one: Mapping[str, Any]) -> bool:
    """Whether something that is no plain value comes through an input. Older pages have a list of choices as a type."""
    type_ = one.get("type")
    plain = bool(one.get("widget")) or not isinstance(type_, str) or type_ in PLAIN_TYPES
    return one.get("link") is not None and not plain


def _widget_values(node: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    values = node.get("widgets_values") or []
    return dict(values) if isinstance(values, dict) else dict(zip(names, values, strict=False))


def _properties(kind: Kind, before: Mapping[str, Any]) -> dict[str, Any]:
    """The properties with where the class comes from; another pack's address and version go."""
    kept = {name: value for name, value in before.items() if name not in ("cnr_id", "aux_id", "ver")}
    return {**({"cnr_id": kind.pack} if kind.pack else {}), **kept, "Node name for S&R": kind.name}


def _input(name: str, type_: str, optional: bool) -> dict[str, Any]:
    return {"name": name, "type": type_, **({"shape": OPTIONAL_SHAPE} if optional else {}), "link": None}


Box = tuple[float, float, float, float]


def _box(node: Mapping[str, Any]) -> Box:
    """Left, top, right and bottom, the title included."""
    (x, y), (width, height) = _pair(node.get("pos"), (0, 0)), _pair(node.get("size"), (340, 120))
    return x, y - TITLE, x + width, y + height


def _pair(value: Any, default: tuple[float, float]) -> tuple[float, float]:
    """Two numbers; older pages saved them as an object."""
    values = list(value.values()) if isinstance(value, dict) else value
    numbers = isinstance(values, list) and len(values) >= 2 and all(isinstance(one, (int, float)) for one in values[:2])
    return (float(values[0]), float(values[1])) if numbers else default


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] + GAP / 2 and other[0] < one[2] + GAP / 2 and one[1] < other[3] and other[1] < one[3]
