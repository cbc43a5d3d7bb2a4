"""Workflows as ComfyUI's page saves them, made from the schemas of a real host.

What a node is connected to and what its widgets say is given by name; ids, slots and the order of widgets follow from
the host's ``/object_info``. So a workflow never has a value in the wrong place, and a new input needs no new file.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ObjectInfo = Mapping[str, Mapping[str, Any]]

# A dynamic combo has inputs of its own for each of its choices; the first choice of those used here has none.
DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", DYNAMIC_COMBO)
# The page gives these a second widget, which says what becomes of the number after a run.
SEEDS = ("seed", "noise_seed")
NOTE = "MarkdownNote"
BYPASSED = 4

FORMAT_VERSION = 0.4
COLUMN_WIDTH, COLUMN_GAP, ROW_GAP = 340, 60, 70
TITLE_HEIGHT, SLOT_HEIGHT, WIDGET_HEIGHT, TEXT_HEIGHT = 30, 20, 26, 120
# What the page puts on nodes beyond their widgets.
PANEL_HEIGHTS = {"WeightStreamGPUPlacement": 240}
NAMESPACE = uuid.UUID("5a1a9d3c-1c6e-4f0e-9a5d-0b6f2f6d7a10")


@dataclass(frozen=True)
class Model:
    """A file that a loader names: the page offers to download it, and says where it belongs."""

    name: str
    directory: str
    url: str


@dataclass(frozen=True)
class Node:
    """One node.

    Attributes:
        kind: its class in the host.
        column: where it stands, from the left; nodes of one column stand one below the other, in order.
        values: of its widgets; those that are not named have their default.
        links: for an input the name of a node here and the place of one of its outputs.
        title: where it is not the class's own.
        bypassed: it is there to be switched on.
        models: that it loads.
    """

    kind: str
    column: int
    values: Mapping[str, Any] = field(default_factory=dict)
    links: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    title: str | None = None
    bypassed: bool = False
    models: tuple[Model, ...] = ()


@dataclass(frozen=True)
class Workflow:
    """Nodes by name, and what is to know about them: a text in Markdown, in the first column."""

    name: str
    note: str
    nodes: Mapping[str, Node]


def inputs_of(info: Mapping[str, Any]) -> dict[str, tuple[Any, Mapping[str, Any]]]:
    """The inputs of a node in the page's order, each with its type and options."""
    found = {}
    for group in ("required", "optional"):
        for name, spec in info["input"].get(group, {}).items():
            found[name] = (spec[0], spec[1] if len(spec) > 1 else {})
    return found


def is_widget(kind: Any, options: Mapping[str, Any]) -> bool:
    return (isinstance(kind, list) or kind in WIDGET_TYPES) and not options.get("forceInput")


def choices(kind: Any, options: Mapping[str, Any]) -> Sequence[Any] | None:
    """What a combo offers; None for another widget."""
    if isinstance(kind, list):
        return kind
    if kind == DYNAMIC_COMBO:
        return [option["key"] for option in options["options"]]
    return options.get("options", []) if kind == "COMBO" else None


def has_control(name: str, kind: Any, options: Mapping[str, Any]) -> bool:
    return kind == "INT" and bool(options.get("control_after_generate", name in SEEDS))


def widget_values(node: Node, info: Mapping[str, Any]) -> list[Any]:
    """The values of a node's widgets, in the page's order.

    Raises:
        KeyError: there is a value for something that is no widget of this node.
    """
    left, values = dict(node.values), []
    for name, (kind, options) in inputs_of(info).items():
        if not is_widget(kind, options):
            continue
        offered = choices(kind, options)
        default = options.get("default", offered[0] if offered else "" if kind == "STRING" else None)
        values.append(left.pop(name, default))
        if has_control(name, kind, options):
            values.append("fixed")
    if left:
        raise KeyError(f"{node.kind} has no widget {', '.join(left)}")
    return values


def build(workflow: Workflow, info: ObjectInfo, pack: str) -> dict[str, Any]:
    """The workflow as the page saves it. ``pack``: the version of this pack."""
    ids = {name: place for place, name in enumerate(workflow.nodes, 2)}
    links = _links(workflow, info, ids)
    note = {"id": 1, **_note(workflow.note)}
    nodes = [note, *(_node(ids[name], node, info[node.kind], links, pack) for name, node in workflow.nodes.items())]
    _arrange(nodes, [0, *(node.column for node in workflow.nodes.values())])
    return {
        "id": str(uuid.uuid5(NAMESPACE, workflow.name)),
        "revision": 0,
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {"ds": {"scale": 0.7, "offset": [80, 120]}},
        "version": FORMAT_VERSION,
    }


def _links(workflow: Workflow, info: ObjectInfo, ids: Mapping[str, int]) -> list[list[Any]]:
    """All links: id, from which node and output, to which node and input, type."""
    links = []
    for name, node in workflow.nodes.items():
        sockets = _sockets(info[node.kind])
        for wanted, (source, output) in node.links.items():
            kind = info[workflow.nodes[source].kind]["output"][output]
            links.append([len(links) + 1, ids[source], output, ids[name], list(sockets).index(wanted), kind])
    return links


def _sockets(info: Mapping[str, Any]) -> dict[str, str]:
    return {name: kind for name, (kind, options) in inputs_of(info).items() if not is_widget(kind, options)}


def _node(node_id: int, node: Node, info: Mapping[str, Any], links: Sequence[list[Any]], pack: str) -> dict[str, Any]:
    optional = info["input"].get("optional", {})
    inputs = []
    for place, (name, kind) in enumerate(_sockets(info).items()):
        [link] = [link[0] for link in links if link[3:5] == [node_id, place]] or [None]
        # 7 is how the page draws an input that may stay open.
        inputs.append({"name": name, "type": kind, **({"shape": 7} if name in optional else {}), "link": link})
    outputs = []
    for place, (name, kind) in enumerate(zip(info["output_name"], info["output"], strict=True)):
        outputs.append(
            {"name": name, "type": kind, "links": [link[0] for link in links if link[1:3] == [node_id, place]]}
        )
    ours = info["python_module"].startswith("custom_nodes.")
    origin = {"cnr_id": "weightstream", "ver": pack} if ours else {"cnr_id": "comfy-core"}
    models = [{"name": model.name, "url": model.url, "directory": model.directory} for model in node.models]
    return {
        "id": node_id,
        "type": node.kind,
        "pos": [0, 0],
        "size": [COLUMN_WIDTH, _height(node, info)],
        "flags": {},
        "order": 0,
        "mode": BYPASSED if node.bypassed else 0,
        "inputs": inputs,
        "outputs": outputs,
        **({"title": node.title} if node.title else {}),
        "properties": {**origin, "Node name for S&R": node.kind, **({"models": models} if models else {})},
        "widgets_values": widget_values(node, info),
    }


def _height(node: Node, info: Mapping[str, Any]) -> int:
    widgets = [options for kind, options in inputs_of(info).values() if is_widget(kind, options)]
    texts = sum(bool(options.get("multiline")) for options in widgets)
    slots = max(len(_sockets(info)), len(info["output"]))
    controls = len(widget_values(node, info)) - texts
    height = TITLE_HEIGHT + slots * SLOT_HEIGHT + controls * WIDGET_HEIGHT + texts * TEXT_HEIGHT
    return height + PANEL_HEIGHTS.get(node.kind, 0)


def _note(text: str) -> dict[str, Any]:
    # The longest lines wrap: about 48 letters stand in one line of the note.
    lines = sum(1 + len(line) // 48 for line in text.splitlines())
    return {
        "type": NOTE,
        "pos": [0, 0],
        "size": [COLUMN_WIDTH + 60, 60 + 22 * lines],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "properties": {},
        "widgets_values": [text],
        "color": "#432",
        "bgcolor": "#000",
    }


def _arrange(nodes: Sequence[dict[str, Any]], columns: Sequence[int]) -> None:
    """Give the nodes their places, and the order in which the page would run them."""
    below: dict[int, int] = {}
    for order, (node, column) in enumerate(zip(nodes, columns, strict=True)):
        left = column * (COLUMN_WIDTH + COLUMN_GAP) + (60 if column else 0)
        node["pos"] = [left, below.get(column, 0)]
        node["order"] = order
        below[column] = node["pos"][1] + node["size"][1] + ROW_GAP
