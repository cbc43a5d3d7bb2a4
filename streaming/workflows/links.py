"""The links of a graph of the page, with the points on the canvas that lead them: its reroutes.

In a workflow of version 0.4 links are lists, and what is known of reroutes lies in ``extra``. In newer workflows and in
subgraphs links are objects that name their last reroute themselves. A reroute names all links that go through it.
Floating links have one end only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .ids import FIELDS, field, plain, set_field


class Links:
    """The links of one graph.

    Args:
        graph: its JSON, which is changed.
    """

    def __init__(self, graph: dict[str, Any]) -> None:
        self._graph = graph
        graph["links"] = [item for item in graph.get("links") or () if item is not None]
        self._items: list[Any] = graph["links"]
        if not all(isinstance(item, dict) or len(item) >= len(FIELDS) - 1 for item in self._items):
            raise ValueError("a link is too short")
        self._as_objects = "inputNode" in graph or any(isinstance(item, dict) for item in self._items)
        self._forget()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def leading_from(self, node: Any, place: int) -> list[Any]:
        """All links of an output."""
        if not self._by_origin:
            for item in self._items:
                origin = plain(field(item, "origin_id")), plain(field(item, "origin_slot"))
                self._by_origin.setdefault(origin, []).append(item)
        return list(self._by_origin.get((plain(node), place), ()))

    def leading_to(self, node: Any, number: Any) -> Any:
        """The link with an id that an input of a node names; None if there is none that ends at this node."""
        if not self._by_end:
            ends = ((plain(field(item, "target_id")), plain(field(item, "id"))) for item in self._items)
            self._by_end = dict(zip(ends, self._items, strict=True))
        return None if number is None else self._by_end.get((plain(node), plain(number)))

    def add(self, *values: Any) -> None:
        self._items.append(dict(zip(FIELDS, values, strict=True)) if self._as_objects else list(values))
        self._forget()

    def move_origin(self, link: Any, node: Any, place: int) -> None:
        set_field(link, "origin_id", node)
        set_field(link, "origin_slot", place)
        self._forget()

    def remove(self, link: Any) -> None:
        """Remove a link, and the reroutes that led it alone."""
        self._items.remove(link)
        self._forget()
        self._leave_reroutes(plain(field(link, "id")))

    def move_floating(self, node: Any, place_of: Callable[[int], int | None]) -> None:
        """Links with one end, at an input of a node, follow it to its new place, or go with it."""
        floating = self._graph.get("floatingLinks")
        for link in list(floating or ()):
            if plain(field(link, "target_id")) == plain(node):
                place = place_of(field(link, "target_slot"))
                if place is None:
                    floating.remove(link)
                else:
                    set_field(link, "target_slot", place)

    def _forget(self) -> None:
        """What was found out of the links does not hold any more."""
        self._by_origin: dict[tuple[Any, Any], list[Any]] = {}
        self._by_end: dict[tuple[Any, Any], Any] = {}

    # -- reroutes ------------------------------------------------------------------------------------------------------

    def _leave_reroutes(self, number: Any) -> None:
        extra = self._graph.get("extra")
        extra = extra if isinstance(extra, dict) else {}
        extensions = extra.get("linkExtensions")
        if isinstance(extensions, list):
            extensions[:] = [one for one in extensions if not isinstance(one, dict) or plain(one.get("id")) != number]
        parents = {plain(one.get("parentId")) for one in (*self._objects(extensions), *self._objects(self._items))}
        parents |= {plain(one.get("parentId")) for one in self._objects(self._graph.get("floatingLinks"))}
        for holder in (self._graph, extra):
            if isinstance(reroutes := holder.get("reroutes"), list):
                _leave(reroutes, number, parents)

    @staticmethod
    def _objects(items: Any) -> list[Mapping[str, Any]]:
        return [item for item in items or () if isinstance(item, dict)]


def _leave(reroutes: list[dict[str, Any]], number: Any, parents: set[Any]) -> None:
    """Take a link out of reroutes. One that is left with no link goes, unless it is on the way of what stays."""
    empty = []
    for one in reroutes:
        links = one.get("linkIds") or []
        if number in map(plain, links):
            one["linkIds"] = [other for other in links if plain(other) != number]
            if not one["linkIds"] and not one.get("floating"):
                empty.append(one)
    needed = parents | {plain(one.get("parentId")) for one in reroutes if one not in empty}
    while kept := [one for one in empty if plain(one["id"]) in needed]:
        empty = [one for one in empty if one not in kept]
        needed |= {plain(one.get("parentId")) for one in kept}
    reroutes[:] = [one for one in reroutes if one not in empty]
