"""What a conversion needs of a graph, whichever format it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .kinds import Kind

# A value that comes through a link, from where nobody can read it here.
LINKED = object()


@dataclass(frozen=True)
class Node:
    """A node as it is found.

    Attributes:
        id: as the file has it.
        kind: its class.
        mode: the page's: 0 runs, 2 is muted, 4 is bypassed.
    """

    id: Any
    kind: str
    mode: int = 0


class Graph(Protocol):
    """A workflow, a subgraph, or a prompt; what changes it changes the JSON under it."""

    name: str
    # Ids in links that are no nodes.
    frame: frozenset[Any]

    def nodes(self) -> Sequence[Node]:
        """All nodes, in the order of the file."""
        ...

    def model_output(self, node: Node) -> int | None:
        """The place of the output that gives a MODEL, of a node that takes none; else None."""
        ...

    def output(self, node: Node, type_: str, place: int) -> int:
        """The place of the node's output of a type; ``place`` where the file does not tell."""
        ...

    def consumers(self, node: Node, place: int) -> Sequence[Node | None]:
        """The nodes that an output leads to; None for what is not a node, as a subgraph's own output."""
        ...

    def passes_model(self, node: Node) -> Sequence[int]:
        """The places of the outputs that give on a MODEL which the node takes; none where it gives on none."""
        ...

    def followers(self) -> Mapping[Any, set[Any]]:
        """By the id of a node, the ids of all nodes that any of its outputs leads to."""
        ...

    def values(self, node: Node, names: Sequence[str]) -> Mapping[str, Any]:
        """The node's widget values; ``names`` are its widgets, in the page's order. :data:`LINKED` where it is so."""
        ...

    def become(self, node: Node, kind: Kind, values: Mapping[str, Any], names: Sequence[str] = ()) -> None:
        """Make the node one of another class, with its links; ``names`` as for :meth:`values`."""
        ...

    def insert(
        self,
        kind: Kind,
        near: Node,
        values: Mapping[str, Any],
        links: Mapping[str, tuple[Node, int]],
        stay: frozenset[Any] = frozenset(),
    ) -> Node:
        """Put a node behind others: what they led to comes from the output of the same type of the new node.

        Nodes whose ids are in ``stay`` keep the MODEL that they have.
        """
        ...

    def remove_unused(self, kind: str) -> Sequence[Node]:
        """Remove the nodes of a class that lead nowhere, and return them."""
        ...

    def take_open_inputs(self) -> Sequence[str]:
        """Inputs of this subgraph that lead nowhere since the last call."""
        ...
