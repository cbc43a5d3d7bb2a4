"""Puts one of our nodes behind loaders: what they gave comes from it from then on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .graph import Graph, Node
from .kinds import MODEL, Kind
from .loaders import Found


def put_behind(
    graph: Graph,
    kind: Kind,
    values: Mapping[str, Any],
    inputs: Mapping[str, Found | None],
    stay: frozenset[Any] = frozenset(),
) -> None:
    """Put a new node behind what ``inputs`` names; what is in ``stay`` keeps the MODEL that it has."""
    connected = {name: found for name, found in inputs.items() if found is not None}
    node = graph.add(kind, next(iter(connected.values())).node, values)
    for name, found in connected.items():
        lead_through(graph, found, node, kind, name, stay)


def lead_through(
    graph: Graph, found: Found, node: Node, kind: Kind, name: str, stay: frozenset[Any] = frozenset()
) -> None:
    """Lead what a loader gives through a node's input of this name, and what it led to behind it."""
    type_ = next(socket.type for socket in kind.sockets if socket.name == name)
    stays = stay if type_ == MODEL else frozenset()
    found.gives[type_] = graph.lead_through(found.gives[type_], node, kind, name, stays)
