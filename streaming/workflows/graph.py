"""What a conversion needs of a graph, whichever format it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .kinds import Kind

# A value that comes through a link, from where nobody can read it here.
LINKED = object()
# The mode of a node that does not run, and gives nothing on.
MUTED = 2


@dataclass(frozen=True)
class Node:
    """A node as it is found.

    Attributes:
        id: as it is compared.
        kind: its class; empty for what is no node, as the frame of a subgraph.
        mode: the page's: 0 runs, 2 is muted, 4 is bypassed.
    """

    id: Any
    kind: str = ""
    mode: int = 0


@dataclass(frozen=True)
class Taker:
    """An input that an output leads to.

    Attributes:
        graph: in which it is.
        node: whose it is.
        place: its number in a page's node, its name in a prompt's.
    """

    graph: Graph
    node: Node
    place: int | str

    @property
    def key(self) -> tuple[int, Any, int | str]:
        return id(self.graph), self.node.id, self.place


class Graph(Protocol):
    """A workflow, a subgraph, or a prompt; what changes it changes the JSON under it."""

    name: str
    # Ids in links that are no nodes.
    frame: frozenset[Any]

    def nodes(self) -> Sequence[Node]:
        """All nodes, in the order of the file."""
        ...

    def model_outputs(self, node: Node) -> Sequence[int]:
        """The places of the outputs that give a MODEL, of a node that takes none; else nothing."""
        ...

    def output(self, node: Node, type_: str, place: int) -> int:
        """The place of the node's output of a type; ``place`` where the file does not tell."""
        ...

    def takers(self, node: Node, place: int) -> Sequence[Taker]:
        """What an output leads to in this graph; among it the frame, for a subgraph's own output."""
        ...

    def passed_on(self, taker: Taker) -> Sequence[Taker]:
        """Where a MODEL that comes to an input goes on to, also in other graphs; nothing where that is not known."""
        ...

    def followers(self) -> Mapping[Any, set[Any]]:
        """By the id of a node, the ids of all nodes that any of its outputs leads to."""
        ...

    def values(self, node: Node, names: Sequence[str]) -> Mapping[str, Any]:
        """The node's widget values; ``names`` are its widgets, in the page's order. :data:`LINKED` where it is so."""
        ...

    def become(self, node: Node, kind: Kind, values: Mapping[str, Any], names: Sequence[str] = ()) -> Sequence[str]:
        """Make the node one of another class, with its links; ``names`` as for :meth:`values`.

        Returns the names of the inputs that have lost their links.
        """
        ...

    def add(self, kind: Kind, near: Node, values: Mapping[str, Any]) -> Node:
        """Put a node, with no links yet, beside another one."""
        ...

    def set_values(self, node: Node, kind: Kind, values: Mapping[str, Any]) -> None:
        """Set some of the widgets of a node, which is of a class that is known here."""
        ...

    def is_linked(self, node: Node, name: str) -> bool:
        """Whether something comes to an input."""
        ...

    def lead_through(
        self, source: tuple[Node, int], node: Node, kind: Kind, name: str, stay: frozenset[Any] = frozenset()
    ) -> tuple[Node, int]:
        """Lead an output to an input of ``node``; what it led to comes from the output of the same type there.

        Nodes whose ids are in ``stay`` keep what they have. Returns that output.
        """
        ...

    def remove_unused(self, kind: str) -> Sequence[Node]:
        """Remove the nodes of a class that lead nowhere, and return them."""
        ...

    def take_open_inputs(self) -> Sequence[str]:
        """Inputs of this subgraph that lead nowhere since the last call."""
        ...
