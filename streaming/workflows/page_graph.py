"""Workflows as the page saves them: nodes with slots and places on the canvas, links with ids, and subgraphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import WorkflowError
from .canvas import free_place
from .graph import LINKED, Node, Taker
from .ids import Numbers, field, plain, set_field, subgraphs_of
from .kinds import GET_NODES, GIVE_MODEL, MODEL, PAGE_ONLY, PLAIN_TYPES, SET_NODES, Kind
from .links import Links

# The frame of a subgraph counts as a node for links.
INPUTS, OUTPUTS = -10, -20
OPTIONAL_SHAPE = 7
SELECTOR = "DeviceSelectorMultiGPU"


class PageFile:
    """A file of the page: a workflow and the definitions of its subgraphs."""

    def __init__(self, workflow: dict[str, Any]) -> None:
        numbers = Numbers(workflow)
        # By the class of the nodes that stand for them.
        self.subgraphs = {
            definition["id"]: PageGraph(self, definition, numbers, definition.get("name") or definition["id"])
            for definition in subgraphs_of(workflow)
        }
        self.graphs = [PageGraph(self, workflow, numbers), *self.subgraphs.values()]

    def instances(self, subgraph: PageGraph) -> Sequence[tuple[PageGraph, Node]]:
        """The nodes that stand for a subgraph, with the graphs that they are in."""
        return [
            (graph, node)
            for graph in self.graphs
            for node in graph.nodes()
            if self.subgraphs.get(node.kind) is subgraph
        ]


class PageGraph:
    """A workflow, or one of its subgraphs.

    Args:
        file: that it is in.
        graph: its JSON, which is changed.
        numbers: of the whole file.
        name: of the subgraph.
    """

    frame: frozenset[Any] = frozenset({INPUTS, OUTPUTS})

    def __init__(self, file: PageFile, graph: dict[str, Any], numbers: Numbers, name: str = "") -> None:
        self.name = name
        self._file = file
        self._graph = graph
        self._numbers = numbers
        graph["nodes"] = [node for node in graph["nodes"] if node is not None]
        self._links = Links(graph)
        self._by_id = {plain(there["id"]): there for there in graph["nodes"]}
        if len(self._by_id) < len(graph["nodes"]):
            raise WorkflowError("two nodes have the same id; let ComfyUI's page load it and save it again")
        self._open_inputs: list[str] = []
        # Widgets that are gone, each by its node and name.
        self.gone_widgets: set[tuple[str, str]] = set()

    def saved(self, node: Node) -> dict[str, Any]:
        """The JSON of a node."""
        found = self._look_up(node.id)
        assert found is not None, node
        return found

    def nodes(self) -> Sequence[Node]:
        return list(map(_node, self._graph["nodes"]))

    def model_outputs(self, node: Node) -> Sequence[int]:
        there = self.saved(node)
        inputs = there.get("inputs") or ()
        if node.kind in PAGE_ONLY or node.kind in self._file.subgraphs or any(map(_takes_model, inputs)):
            return []
        # A pipe or a switch gives on what comes from elsewhere.
        if node.kind not in GIVE_MODEL and any(map(_takes_part, inputs)):
            return []
        return [place for place, one in enumerate(there.get("outputs") or ()) if one.get("type") == MODEL]

    def output(self, node: Node, type_: str, place: int) -> int:
        types = [one.get("type") for one in self.saved(node).get("outputs") or ()]
        return types.index(type_) if type_ in types else place

    def takers(self, node: Node, place: int) -> Sequence[Taker]:
        found = []
        for link in self._links.leading_from(node.id, place):
            there = self._look_up(target := plain(field(link, "target_id")))
            found.append(
                Taker(self, Node(target) if there is None else _node(there), plain(field(link, "target_slot")))
            )
        return found

    def passed_on(self, taker: Taker) -> Sequence[Taker]:
        node, place = taker.node, int(taker.place)
        if node.id == OUTPUTS:
            outer = [(graph, node) for graph, node in self._file.instances(self) if not node.mode]
            return [behind for graph, instance in outer for behind in graph.takers(instance, place)]
        if (inner := self._file.subgraphs.get(node.kind)) is not None:
            return [] if node.mode else inner.takers(Node(INPUTS), inner.input_place(self.saved(node), place))
        there = self._look_up(node.id)
        if there is None or not any(map(_takes_model, there.get("inputs") or ())):
            return []
        givers = [node, *(self._getters(there) if node.kind in SET_NODES else ())]
        return [behind for giver in givers for place in self._passing(giver) for behind in self.takers(giver, place)]

    def followers(self) -> Mapping[Any, set[Any]]:
        found: dict[Any, set[Any]] = {}
        for link in self._links:
            found.setdefault(plain(field(link, "origin_id")), set()).add(plain(field(link, "target_id")))
        for there in self._graph["nodes"]:
            if there["type"] in SET_NODES:
                found.setdefault(plain(there["id"]), set()).update(node.id for node in self._getters(there))
        return found

    def values(self, node: Node, names: Sequence[str]) -> Mapping[str, Any]:
        there = self.saved(node)
        found = _widget_values(there, names)
        for one in there.get("inputs") or ():
            link = self._links.leading_to(there["id"], one.get("link"))
            if link is not None and one["name"] in names:
                found[one["name"]] = self._value_behind(link)
        return found

    def become(self, node: Node, kind: Kind, values: Mapping[str, Any], names: Sequence[str] = ()) -> Sequence[str]:
        there = self.saved(node)
        known = {name: value for name, value in values.items() if value is not LINKED}
        old = _widget_values(there, names or list(kind.widgets))
        wanted = {name: known.get(name, old.get(name, default)) for name, default in kind.widgets.items()}
        for one in there.get("inputs") or ():
            link = self._links.leading_to(there["id"], one.get("link"))
            if link is not None and one["name"] in known:
                self._cut(link)
                one["link"] = None
        unlinked = self._keep_inputs(there, {*kind.widgets, *(socket.name for socket in kind.sockets)})
        self.gone_widgets |= {(str(node.id), name) for name in old if name not in kind.widgets}
        there["outputs"] = outputs = there.get("outputs") or []
        outputs += [{"name": name, "type": type_, "links": []} for name, type_, _ in kind.outputs[len(outputs) :]]
        there["type"], there["widgets_values"] = kind.name, list(wanted.values())
        there["properties"] = _properties(kind, there.get("properties") or {})
        return unlinked

    def add(self, kind: Kind, near: Node, values: Mapping[str, Any]) -> Node:
        beside = self.saved(near)
        there: dict[str, Any] = {
            "id": self._numbers.node(),
            "type": kind.name,
            "pos": free_place(beside, kind.size, self._graph["nodes"]),
            "size": list(kind.size),
            "flags": {},
            "order": int(beside.get("order") or 0) + 1,
            "mode": near.mode,
            "inputs": [_input(*socket) for socket in kind.sockets],
            "outputs": [{"name": name, "type": type_, "links": []} for name, type_, _ in kind.outputs],
            "properties": _properties(kind, {}),
            "widgets_values": list({**kind.widgets, **values}.values()),
        }
        self._graph["nodes"].append(there)
        self._by_id[there["id"]] = there
        return _node(there)

    def set_values(self, node: Node, kind: Kind, values: Mapping[str, Any]) -> None:
        there = self.saved(node)
        saved = there.get("widgets_values")
        if isinstance(saved, dict):
            saved.update(values)
        else:
            known = {**kind.widgets, **_widget_values(there, list(kind.widgets)), **values}
            there["widgets_values"] = [*known.values(), *(saved or [])[len(known) :]]

    def is_linked(self, node: Node, name: str) -> bool:
        inputs = self.saved(node).get("inputs") or ()
        return any(one["name"] == name and one.get("link") is not None for one in inputs)

    def lead_through(
        self, source: tuple[Node, int], node: Node, kind: Kind, name: str, stay: frozenset[Any] = frozenset()
    ) -> tuple[Node, int]:
        """Links to what comes behind keep their ids, so reroutes keep them."""
        [socket] = [socket for socket in kind.sockets if socket.name == name]
        origin, there = self.saved(source[0]), self.saved(node)
        slot, place = _slot(there, "inputs", "name", _input(*socket))
        output, giving = _slot(there, "outputs", "type", {"name": socket.type, "type": socket.type, "links": []})
        leading = self._links.leading_from(origin["id"], source[1])
        moved = [link for link in leading if plain(field(link, "target_id")) not in stay]
        kept = [field(link, "id") for link in leading if link not in moved]
        for link in moved:
            self._links.move_origin(link, there["id"], giving)
        output["links"] = [*(output.get("links") or []), *(field(link, "id") for link in moved)]
        slot["link"] = number = self._numbers.link()
        self._links.add(number, origin["id"], source[1], there["id"], place, socket.type)
        origin["outputs"][source[1]]["links"] = [*kept, number]
        return node, giving

    def remove_unused(self, kind: str) -> Sequence[Node]:
        leading = {plain(field(link, "origin_id")) for link in self._links}
        gone = [node for node in self.nodes() if node.kind == kind and node.id not in leading]
        for node in gone:
            self._graph["nodes"].remove(self._by_id.pop(node.id))
        return gone

    def take_open_inputs(self) -> Sequence[str]:
        taken, self._open_inputs = self._open_inputs, []
        return taken

    def input_place(self, instance: Mapping[str, Any], place: int) -> int:
        """Which of this subgraph's inputs one of the node that stands for it is: the page knows them by their names."""
        names = [one.get("name") for one in self._graph.get("inputs") or ()]
        shown = [one.get("name") for one in instance.get("inputs") or ()]
        return names.index(shown[place]) if place < len(shown) and shown[place] in names else place

    # -- links ---------------------------------------------------------------------------------------------------------

    def _keep_inputs(self, there: dict[str, Any], names: set[str]) -> Sequence[str]:
        """Remove the inputs of other names, with their links; those behind them move up.

        Returns the names of those that something came to.
        """
        before = there.get("inputs") or []
        inputs = [one for one in before if one["name"] in names]
        unlinked = []
        for one in before:
            link = self._links.leading_to(there["id"], one.get("link"))
            if link is not None and one["name"] not in names:
                self._cut(link)
                unlinked.append(one["name"])
        for place, one in enumerate(inputs):
            if (link := self._links.leading_to(there["id"], one.get("link"))) is not None:
                set_field(link, "target_slot", place)
        places = {old: place for place, old in enumerate(old for old, one in enumerate(before) if one["name"] in names)}
        self._links.move_floating(there["id"], places.get)
        there["inputs"] = inputs
        return unlinked

    def _cut(self, link: Any) -> None:
        number, origin, place = (plain(field(link, name)) for name in ("id", "origin_id", "origin_slot"))
        self._links.remove(link)
        if origin == INPUTS:
            entry = self._graph["inputs"][place]
            entry["linkIds"] = [other for other in entry.get("linkIds") or () if plain(other) != number]
            if not entry["linkIds"]:
                self._open_inputs.append(entry["name"])
            return
        outputs = (self._look_up(origin) or {}).get("outputs") or ()
        for output in outputs[place : place + 1]:
            output["links"] = [other for other in output.get("links") or () if plain(other) != number]

    def _value_behind(self, link: Any) -> Any:
        """What a device selector at the other end of a link says."""
        source = self._look_up(field(link, "origin_id"))
        if source is None or source["type"] != SELECTOR:
            return LINKED
        return _widget_values(source, ["device"]).get("device", LINKED)

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def _look_up(self, number: Any) -> dict[str, Any] | None:
        return self._by_id.get(plain(number))

    def _passing(self, node: Node) -> list[int]:
        """The places of the outputs that may give on a MODEL."""
        outputs = self.saved(node).get("outputs") or ()
        return [place for place, one in enumerate(outputs) if one.get("type") in (MODEL, "*")]

    def _getters(self, setter: Mapping[str, Any]) -> list[Node]:
        """The nodes that give what a Set node takes: they know each other by a name."""
        if (name := _shared_name(setter)) is None:
            return []
        return [_node(one) for one in self._graph["nodes"] if one["type"] in GET_NODES and _shared_name(one) == name]


def _node(there: Mapping[str, Any]) -> Node:
    return Node(plain(there["id"]), str(there["type"]), int(there.get("mode") or 0))


def _slot(there: dict[str, Any], side: str, by: str, wanted: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """An input or output, found by its name or type, with its place; it is added where it is missing."""
    there[side] = slots = there.get(side) or []
    place = next((place for place, one in enumerate(slots) if one.get(by) == wanted[by]), len(slots))
    if place == len(slots):
        slots.append(wanted)
    return slots[place], place


def _takes_model(one: Mapping[str, Any]) -> bool:
    return bool({MODEL, "*"} & set(str(one.get("type")).split(",")))


def _takes_part(one: Mapping[str, Any]) -> bool:
    """Whether something that is no plain value comes through an input. Older pages have a list of choices as a type."""
    type_ = one.get("type")
    is_plain = bool(one.get("widget")) or not isinstance(type_, str) or type_ in PLAIN_TYPES
    return one.get("link") is not None and not is_plain


def _widget_values(node: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    values = node.get("widgets_values") or []
    return dict(values) if isinstance(values, dict) else dict(zip(names, values, strict=False))


def _shared_name(node: Mapping[str, Any]) -> Any:
    """By which a Set node and its Get nodes know each other; None where there is none."""
    return next(iter(_widget_values(node, ["name"]).values()), None) or None


def _properties(kind: Kind, before: Mapping[str, Any]) -> dict[str, Any]:
    """The properties with where the class comes from; another pack's address and version go."""
    kept = {name: value for name, value in before.items() if name not in ("cnr_id", "aux_id", "ver")}
    return {**({"cnr_id": kind.pack} if kind.pack else {}), **kept, "Node name for S&R": kind.name}


def _input(name: str, type_: str, optional: bool) -> dict[str, Any]:
    return {"name": name, "type": type_, **({"shape": OPTIONAL_SHAPE} if optional else {}), "link": None}
