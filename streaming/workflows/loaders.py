"""Makes loaders what stands for them, and tells what each gives and asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from .allocations import CPU, DEFAULT
from .following import Output, takers_of
from .graph import LINKED, Graph, Node
from .kinds import DIFFUSION_LOADER, LOADER, MODEL
from .multigpu import WAN, Archived, Wish, find, is_archived

GROUP_NODE = ("workflow>", "workflow/")

# Takes the code of a note, the node, and values for the text.
Tell = Callable[..., None]


@dataclass
class Found:
    """What a loader gives.

    Attributes:
        node: as it was found.
        gives: by type, the node and the output that give it; another node's once that was put behind.
        wish: what it asks for.
        streams: whether its MODEL streams by itself.
        is_new: whether it was made to stream only now.
    """

    node: Node
    gives: dict[str, Output]
    wish: Wish = field(default_factory=Wish)
    streams: bool = False
    is_new: bool = False

    def leads_on(self, graph: Graph, type_: str) -> bool:
        return type_ in self.gives and bool(takers_of(graph, self.gives[type_]))


def replace_loaders(graph: Graph, tell: Tell) -> list[Found]:
    """Make each loader what stands for it; each MODEL that one gives is an entry of its own."""
    nodes = graph.nodes()
    _tell_of_strangers(nodes, tell)
    return [found for node in nodes for found in _replace(graph, node, tell)]


def _tell_of_strangers(nodes: Iterable[Node], tell: Tell) -> None:
    """Tell of nodes without an equal; of the many of the Wan wrapper that come together once."""
    strangers = [node for node in nodes if is_archived(node.kind) and find(node.kind) is None]
    wan = [node for node in strangers if node.kind.startswith(WAN)]
    for node in strangers:
        if node not in wan:
            tell("no-equal", node)
        elif node is wan[0]:
            tell("no-equal-wan", node, others=len(wan) - 1)


def _replace(graph: Graph, node: Node, tell: Tell) -> list[Found]:
    if (archived := find(node.kind)) is not None:
        return [_replace_archived(graph, node, archived, tell)]
    if is_archived(node.kind):
        return []
    if node.kind.startswith(GROUP_NODE):
        tell("group-node", node)
        return []
    if node.kind == DIFFUSION_LOADER:
        unlinked = graph.become(node, LOADER, {}, list(LOADER.widgets)[:2])
        tell("loader", node)
        _tell_of_links(graph, node, unlinked, tell)
        return [Found(node, {MODEL: (node, 0)}, streams=True, is_new=True)]
    if node.kind == LOADER.name:
        return [Found(node, {MODEL: (node, graph.output(node, MODEL, 0))}, streams=True)]
    return [Found(node, {MODEL: (node, place)}) for place in graph.model_outputs(node)]


def _replace_archived(graph: Graph, node: Node, archived: Archived, tell: Tell) -> Found:
    values = graph.values(node, archived.names)
    wish, kind = archived.read(values), archived.kind
    chosen: dict[str, Any] = {name: values[name] for name in kind.widgets if name in values and name != "device"}
    if archived.own_device:
        chosen["device"] = CPU if wish.clip_device == CPU else DEFAULT
        wish.clip_device = DEFAULT if wish.clip_device == CPU else wish.clip_device
    if values.get("high_precision_loras") is False:
        wish.tell("precision")
    streams = kind is LOADER
    if streams and wish.limit_gib:
        chosen["vram_limit_gb"] = wish.limit_gib
    outputs = {type_: (node, graph.output(node, type_, place)) for type_, place in archived.outputs.items()}
    unlinked = graph.become(node, kind, chosen, archived.names)
    tell("loader" if streams else "host", node, **({} if streams else {"name": kind.name}))
    for code, about in wish.notes:
        if code != "limit" or streams:
            tell(code, node, **about)
    told = {about.get("name") for _, about in wish.notes}
    unread = [name for name in unlinked if values.get(name, LINKED) is LINKED and name not in told]
    _tell_of_links(graph, node, unread, tell)
    return Found(node, outputs, wish, streams, is_new=streams)


def _tell_of_links(graph: Graph, node: Node, unlinked: Iterable[str], tell: Tell) -> None:
    """Tell of inputs that are gone with their links, and of what led to nothing else."""
    for name in unlinked:
        tell("link-gone", node, name=name)
    for name in graph.take_open_inputs():
        tell("input-gone", node, name=name)
