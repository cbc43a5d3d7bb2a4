"""Ids of nodes and links in a file of the page: how they are compared, and new ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

FIELDS = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")


def plain(number: Any) -> Any:
    """An id as it is compared: other programs write 1 as "1" or 1.0 too, and not everywhere alike."""
    if isinstance(number, str) and number.isascii() and number.isdigit() and len(number) < 16:
        return int(number)
    return int(number) if isinstance(number, float) and number.is_integer() else number


def field(link: Any, name: str) -> Any:
    """A field of a link, which is a list or an object."""
    return link.get(name) if isinstance(link, dict) else link[FIELDS.index(name)]


def set_field(link: Any, name: str, value: Any) -> None:
    link[name if isinstance(link, dict) else FIELDS.index(name)] = value


def subgraphs_of(workflow: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The definitions of a workflow's subgraphs, nested ones among them."""
    return list((workflow.get("definitions") or {}).get("subgraphs") or ())


class Numbers:
    """Hands out ids of nodes and links that nothing in the file has, in subgraphs neither."""

    def __init__(self, workflow: dict[str, Any]) -> None:
        self._graphs = [workflow, *subgraphs_of(workflow)]
        self._node = self._most("last_node_id", "lastNodeId", self._node_ids())
        self._link = self._most("last_link_id", "lastLinkId", self._link_ids())

    def node(self) -> int:
        self._node += 1
        self._write("last_node_id", "lastNodeId", self._node)
        return self._node

    def link(self) -> int:
        self._link += 1
        self._write("last_link_id", "lastLinkId", self._link)
        return self._link

    def _node_ids(self) -> Iterator[Any]:
        for graph in self._graphs:
            yield from (node["id"] for node in graph["nodes"] if node is not None)
            # Also of what is not there.
            yield from (field(link, end) for link in _links(graph) for end in ("origin_id", "target_id"))

    def _link_ids(self) -> Iterator[Any]:
        for graph in self._graphs:
            yield from (field(link, "id") for link in _links(graph))
            for node in (node for node in graph["nodes"] if node is not None):
                yield from (slot.get("link") for slot in node.get("inputs") or ())
                yield from (link for slot in node.get("outputs") or () for link in slot.get("links") or ())

    def _most(self, name: str, state_name: str, used: Iterable[Any]) -> int:
        counters = [graph.get(name) for graph in self._graphs]
        counters += [(graph.get("state") or {}).get(state_name) for graph in self._graphs]
        return max((number for number in map(plain, (*counters, *used)) if isinstance(number, int)), default=0)

    def _write(self, name: str, state_name: str, number: int) -> None:
        for graph in self._graphs:
            if name in graph:
                graph[name] = number
            if state_name in (graph.get("state") or {}):
                graph["state"][state_name] = number


def _links(graph: Mapping[str, Any]) -> list[Any]:
    return [link for link in graph.get("links") or () if link is not None]
